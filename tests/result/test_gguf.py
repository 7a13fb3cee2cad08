"""What llama.cpp computes from an exported file is what transformers computes from the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, Prune, copy_tokenizer, load
from llama_cpp import ask
from pruned_models import save_pruned
from tiny_models import BLOCKS, KNOWN, NEURONS, save_tiny, tiny_config

from llm_snp.errors import CheckpointError, UnsupportedModelError
from llm_snp.system.progress import Progress

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
pytest.importorskip("xllamacpp", reason="the package xllamacpp, llama.cpp's wheel, is not installed")
export = pytest.importorskip("llm_snp.result.gguf.writing").export

IDS = torch.randint(4, VOCABULARY, (40,), generator=torch.Generator().manual_seed(7))
# Engine and transformers both compute in 32 bits; the engine has a table of 16 bits for GELU.
EXACT, TABLE = 1e-4, 5e-3
DIFFERENT = [{"heads": 4, "neurons": 48}, {"heads": 2, "neurons": 17}, {"heads": 1, "neurons": 40}]
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def same(blocks: int = BLOCKS, **kept: int) -> list[dict[str, int]]:
    return [kept] * blocks


def rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """The field of a config, which has another name from transformers 5 on."""
    return {"rope_parameters" if hasattr(tiny_config("llama"), "rope_parameters") else "rope_scaling": parameters}


def period(every: int, blocks: int) -> dict[str, Any]:
    """Windows in all blocks but every so many."""
    return {"layer_types": [f"{'sliding' if (i + 1) % every else 'full'}_attention" for i in range(blocks)]}


def compare(model: Any, directory: Path, architecture: str, limit: float, count: int = 40) -> None:
    """Log-probabilities of a text, and the greedy tokens after a part of it."""
    path = directory.with_suffix(".gguf")
    written = export(directory, path, "f32", None, Progress(quiet=True))
    assert written.architecture.name == architecture
    ids, start = IDS[:count], count // 2
    found, greedy = ask(path, ["log_probabilities", ids.tolist()], ["greedy", ids[:start].tolist(), 8])
    with torch.no_grad():
        expected = model(ids[None]).logits[0].double().log_softmax(-1).numpy()
        new = model.generate(ids[None, :start], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=1)
    assert expected.std() > 0.5  # of a text that the model sees
    assert np.abs(found - expected).max() < limit
    assert greedy.tolist() == new[0, start:].tolist()


@pytest.mark.parametrize(
    ("name", "kept", "architecture", "fields"),
    [
        ("llama", DIFFERENT, "deci", {}),
        ("llama-tied", DIFFERENT, "deci", {}),
        ("llama-one-query-each", [{"heads": 5, "neurons": 9}, *DIFFERENT[1:]], "deci", {}),  # and biases everywhere
        ("llama-one-key", DIFFERENT, "deci", {}),
        ("llama-3.1", [{"heads": 2, "neurons": 48}, *DIFFERENT[1:]], "deci", {"head_dim": 8}),
        ("llama", DIFFERENT, "deci", rope(YARN) | {"head_dim": 16}),
        ("llama", DIFFERENT, "deci", rope(YARN | {"original_max_position_embeddings": 16.0}) | {"head_dim": 16}),
        ("llama", DIFFERENT, "deci", rope(LINEAR)),
        ("mistral", DIFFERENT, "deci", {"sliding_window": None}),
        ("qwen2", DIFFERENT, "deci", {}),
        ("qwen3", DIFFERENT, "openelm", {"tie_word_embeddings": True}),
    ],
)
def test_widths_of_their_own(
    name: str, kept: list[dict[str, int]], architecture: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    if name not in KNOWN:
        pytest.skip("this transformers does not have it")
    if "yarn" in str(fields) and "rope_scaling" in fields:
        pytest.skip("before transformers 5 it took the stretched length for the one it was stretched from")
    compare(save_pruned(name, kept, tmp_path / "model", **fields), tmp_path / "model", architecture, EXACT)


@pytest.mark.parametrize(
    ("name", "kept", "architecture", "fields", "limit"),
    [
        ("llama", same(heads=3, neurons=33), "llama", {}, EXACT),
        ("llama-tied", same(heads=3, neurons=33), "llama", {}, EXACT),
        ("llama-one-query-each", same(heads=3, neurons=33), "llama", {}, EXACT),
        ("llama-one-key", same(heads=3, neurons=33), "llama", {}, EXACT),
        ("llama-3.1", same(heads=1, neurons=33), "llama", {}, EXACT),
        ("mistral", same(heads=3, neurons=33), "llama", {"sliding_window": None}, EXACT),
        ("qwen2", same(neurons=33), "qwen2", {}, EXACT),
        ("qwen2", same(neurons=33), "qwen2", {"tie_word_embeddings": True}, EXACT),
        ("qwen2", same(heads=3, neurons=33), "deci", {}, EXACT),
        ("qwen3", same(heads=3, neurons=33), "qwen3", {}, EXACT),
        ("gemma", same(heads=3, neurons=33), "gemma", {}, TABLE),
        ("gemma2", same(heads=3, neurons=33), "gemma2", {}, TABLE),
        ("gemma3", same(7, heads=3, neurons=33), "gemma3", {"num_hidden_layers": 7} | period(6, 7), TABLE),
        ("phi", same(neurons=33), "phi2", {}, TABLE),
        ("gpt2", same(neurons=33), "gpt2", {}, TABLE),
        ("gpt2-default-width", same(neurons=33), "gpt2", {}, TABLE),
        ("gpt_neox", same(neurons=33), "gptneox", {}, TABLE),
        ("gpt_neox", same(neurons=33), "gptneox", {"tie_word_embeddings": True}, TABLE),
        ("gpt_neox-in-a-row", same(neurons=33), "gptneox", {}, TABLE),
        ("falcon-one-key", same(neurons=33), "falcon", {}, TABLE),
        ("falcon-new", same(neurons=33), "falcon", {}, TABLE),
        ("olmo", same(neurons=33), "olmo", {}, EXACT),
        ("olmo-clipped", same(neurons=33), "olmo", {"clip_qkv": 0.3}, EXACT),
        ("olmo2", same(neurons=33), "olmo2", {}, EXACT),
        ("olmo3", same(5, neurons=33), "olmo2", {"num_hidden_layers": 5} | period(4, 5), EXACT),
        ("phi3", same(neurons=33), "phi3", {}, EXACT),
        ("phi3-turned-in-part", same(neurons=33), "phi3", {"head_dim": 4}, EXACT),
    ],
)
def test_uniform_widths(
    name: str, kept: list[dict[str, int]], architecture: str, fields: dict[str, Any], limit: float, tmp_path: Path
) -> None:
    if name not in KNOWN:
        pytest.skip("this transformers does not have it")
    compare(save_pruned(name, kept, tmp_path / "model", **fields), tmp_path / "model", architecture, limit)


MIXED = [{"neurons": 24, "experts": 3}] * BLOCKS
QWEN2 = {"mlp_only_layers": [], "norm_topk_prob": False}
QWEN3, OLMOE = {"norm_topk_prob": True}, {"num_key_value_heads": 8}


@pytest.mark.parametrize(
    ("name", "kept", "architecture", "fields"),
    [
        ("mixtral", MIXED, "llama", {}),
        ("mixtral", [{"heads": 3} | block for block in MIXED], "llama", {"tie_word_embeddings": True}),
        ("qwen2_moe", [{"shared": 24} | block for block in MIXED], "qwen2moe", QWEN2),
        ("qwen2_moe", MIXED, "qwen2moe", QWEN2 | {"tie_word_embeddings": True, "qkv_bias": False}),
        ("qwen3_moe", [{"heads": 3} | block for block in MIXED], "qwen3moe", QWEN3),
        ("qwen3_moe", MIXED, "qwen3moe", QWEN3 | {"tie_word_embeddings": True, "num_experts_per_tok": 1}),
        ("olmoe", MIXED, "olmoe", OLMOE),
        ("olmoe", MIXED, "olmoe", OLMOE | {"tie_word_embeddings": True, "num_experts_per_tok": 3}),
    ],
)
def test_mixtures_of_experts(
    name: str, kept: list[dict[str, int]], architecture: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    if name not in KNOWN:
        pytest.skip("this transformers does not have it")
    compare(save_pruned(name, kept, tmp_path / "model", **fields), tmp_path / "model", architecture, EXACT)


@pytest.mark.parametrize(
    ("name", "architecture", "fields", "experts"),
    [
        ("mixtral", "llama", {}, "both"),
        ("qwen2_moe", "qwen2moe", QWEN2, "neurons"),
        ("qwen3_moe", "qwen3moe", QWEN3, "whole"),
        ("olmoe", "olmoe", OLMOE, "whole"),
    ],
)
def test_stock_results_of_mixtures(
    name: str, architecture: str, fields: dict[str, Any], experts: str, prune: Prune, tmp_path: Path
) -> None:
    """Of which neurons or experts went, as the file says it."""
    if name not in KNOWN:
        pytest.skip("this transformers does not have it")
    dense = save_tiny(name, tmp_path / "dense", **fields)
    plan = prune(dense, tmp_path / "model", 0.3, format="stock", experts=experts, samples=8)["plan"]["kept"][0]
    compare(load(tmp_path / "model"), tmp_path / "model", architecture, EXACT)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    found = {"experts": fields[f"{architecture}.expert_count"]}
    found["neurons"] = fields[f"{architecture}.expert_feed_forward_length"]
    expected = {"experts": plan.get("experts", 4), "neurons": plan.get("neurons", 2 * NEURONS)}
    assert found == expected != {"experts": 4, "neurons": 2 * NEURONS}
    assert fields[f"{architecture}.expert_used_count"] == 2
    shared = plan.get("shared") if name == "qwen2_moe" else None
    assert fields.get(f"{architecture}.expert_shared_feed_forward_length") == shared


def test_experts_of_a_layer_from_several_files(tmp_path: Path) -> None:
    """Their stack is the same; it is quantised, the router is not."""
    if "qwen2_moe" not in KNOWN:
        pytest.skip("this transformers does not have it")
    kept = [{"neurons": 24, "experts": 3}] * BLOCKS
    model = save_pruned("qwen2_moe", kept, tmp_path / "one", **QWEN2)
    model.save_pretrained(tmp_path / "many", max_shard_size="8KB")
    copy_tokenizer(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2 * BLOCKS
    found = []
    for name in ("one", "many"):
        export(tmp_path / name, tmp_path / f"{name}.gguf", "q8_0", None, Progress(quiet=True))
        found.append({tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors})
    one, many = found
    assert one.keys() == many.keys()
    assert all(np.array_equal(one[name].data, many[name].data) for name in one)
    kinds = {"up_exps": "Q8_0", "gate_exps": "Q8_0", "down_exps": "F16", "gate_inp": "F32", "gate_inp_shexp": "F32"}
    assert {part: one[f"blk.1.ffn_{part}.weight"].tensor_type.name for part in kinds} == kinds


def test_a_number_that_no_gguf_holds(tmp_path: Path) -> None:
    save_pruned("llama", same(neurons=40), tmp_path, rms_norm_eps=1e60)
    with pytest.raises(CheckpointError, match=r"config\.json has a number that no GGUF file holds"):
        export(tmp_path, tmp_path / "out.gguf", "f16", None, Progress(quiet=True))
    assert not list(tmp_path.glob("*.gguf"))


def refusal(name: str, kept: list[dict[str, int]], directory: Path, **fields: Any) -> str:
    save_pruned(name, kept, directory, **fields)
    with pytest.raises(UnsupportedModelError) as refused:
        export(directory, directory / "out.gguf", "f16", None, Progress(quiet=True))
    assert not list(directory.glob("*.gguf"))
    return str(refused.value)


@pytest.mark.parametrize(
    ("name", "kept", "fields", "parts"),
    [
        ("opt", same(neurons=33), {}, ("no architecture for models of type 'opt'",)),
        ("llama", same(values=2), {}, ("directions inside its heads", "--format blockwise", "--format stock")),
        ("llama", same(pairs=1), {}, ("directions inside its heads", "--format blockwise")),
        ("llama", same(queries=6), {}, ("single query heads", "--format blockwise")),
        ("gemma2", DIFFERENT, {}, ("its gemma2 has one number of heads", "--format stock")),
        ("gpt2", [{"heads": 3}] * 3, {}, ("its gpt2 has as many heads as fill", "--format stock")),
        ("qwen3", DIFFERENT, {}, ("its qwen3 has one number", "its openelm takes tie_word_embeddings true, not false")),
        ("phi-normed", same(neurons=33), {}, ("its phi2 takes qk_layernorm false, not true",)),
        ("falcon-in-a-row", same(neurons=33), {}, ("its falcon takes",)),
        ("gemma3", same(neurons=33), {}, ("its gemma3 has windows in all blocks but every 6th",)),
        ("gemma2", same(neurons=33), {"query_pre_attn_scalar": 16}, ("query_pre_attn_scalar 8, not 16",)),
        ("llama", same(neurons=33), {"hidden_act": "relu"}, ("takes hidden_act 'silu', not 'relu'",)),
        *(
            ("llama", same(neurons=33), rope(YARN | {name: value}), (f"takes a number as {name} of positions, not",))
            for name, value in (
                ("original_max_position_embeddings", 16.5),
                ("original_max_position_embeddings", 2**31),
                ("factor", True),
            )
        ),
        ("gemma", same(neurons=33), {"hidden_act": "relu"}, ("takes hidden_act 'gelu_new', not 'relu'",)),
        ("qwen2", same(neurons=33), rope({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), ("'dynamic'",)),
        ("gemma", same(values=2), {}, ("directions inside its heads", "with --format stock")),
        ("mixtral", same(values=2), {}, ("directions inside its heads", "with --format stock")),
        (
            "mixtral",
            [{"experts": 3}, {"experts": 4}, {"experts": 4}],
            {},
            ("its llama has one number of heads, neurons and experts for all blocks", "--format stock"),
        ),
        ("olmoe", [{"neurons": 24}, *same(2, neurons=32)], OLMOE, ("its olmoe has one number", "--format stock")),
        ("olmoe", same(neurons=24), {}, ("its olmoe has as many key/value heads as query heads",)),
        ("olmoe", same(neurons=24), OLMOE | {"norm_topk_prob": True}, ("takes norm_topk_prob false, not true",)),
        ("olmoe", same(neurons=24), OLMOE | {"clip_qkv": 0.3}, ("its olmoe takes clip_qkv none, not 0.3",)),
        ("qwen2_moe", same(neurons=24), QWEN2 | {"norm_topk_prob": True}, ("takes norm_topk_prob false, not true",)),
        (
            "qwen2_moe",
            same(neurons=24),
            QWEN2 | {"mlp_only_layers": [1]},
            ("every block, and this model none in block 1",),
        ),
        ("qwen3_moe", same(neurons=24), QWEN3 | {"decoder_sparse_step": 2}, ("this model none in block 0",)),
        ("qwen3_moe", same(neurons=24), {}, ("its qwen3moe takes norm_topk_prob true, not false",)),
        ("qwen3_moe", same(neurons=24), QWEN3 | {"attention_bias": True}, ("attention_bias false, not true",)),
    ],
)
def test_what_it_cannot_have_is_refused_with_what_helps(
    name: str, kept: list[dict[str, int]], fields: dict[str, Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    if name not in KNOWN:
        pytest.skip("this transformers does not have it")
    said = refusal(name, kept, tmp_path, **fields)
    for part in parts:
        assert part in said
    stock = any("--format" in part for part in parts) or name == "qwen3"
    assert ("--format stock" in said) == stock
    assert ("--format blockwise" in said) == ("--format blockwise" in parts)
    assert ("serve this one with transformers" in said) != stock


@pytest.mark.parametrize(
    ("name", "kept", "architecture"), [("mistral", DIFFERENT, "deci"), ("mixtral", MIXED, "llama")]
)
def test_where_the_engine_knows_no_windows_the_context_is_one(
    name: str, kept: list[dict[str, int]], architecture: str, tmp_path: Path
) -> None:
    """Mistral's first version and some Qwen2; up to there both compute the same."""
    if name not in KNOWN:
        pytest.skip("this transformers does not have it")
    model = save_pruned(name, kept, tmp_path / "model", sliding_window=16)
    compare(model, tmp_path / "model", architecture, EXACT, count=16)
    (tokens,) = ask(tmp_path / "model.gguf", ["context"])
    assert tokens == 16


@pytest.mark.parametrize("several", [False, True])
def test_a_chat_template_that_is_no_text(several: bool, tmp_path: Path) -> None:
    """Half of a surrogate pair, as JSON can spell it."""
    save_pruned("llama", same(neurons=33), tmp_path / "out")
    half, name = "a \ud800 b", "default"
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": name, "template": half}, {"name": "x", "template": "x"}] if several else half
    (tmp_path / "out" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"has a chat template that is none .*surrogates"):
        export(tmp_path / "out", tmp_path / "out.gguf", "f32", None, Progress(quiet=True))


def test_a_model_with_more_tokens_than_embeddings_is_damaged(tmp_path: Path) -> None:
    save_pruned("llama", same(neurons=33), tmp_path, vocab_size=1000)
    with pytest.raises(CheckpointError, match="tokens up to 2047, and the model embeddings for 1000"):
        export(tmp_path, tmp_path / "out.gguf", "f16", None, Progress(quiet=True))
