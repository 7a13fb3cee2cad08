"""What llama.cpp computes from an exported file is what transformers computes from the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCABULARY
from llama_cpp import ask
from pruned_models import save_pruned
from tiny_models import BLOCKS, KNOWN, tiny_config

from llm_snp.errors import CheckpointError, UnsupportedModelError
from llm_snp.system.progress import Progress

pytest.importorskip("gguf", reason="the package gguf is not installed")
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


def rename_token(directory: Path, name: str, new: str) -> None:
    for path in directory.glob("tokenizer*.json"):
        path.write_text(path.read_text().replace(json.dumps(name), json.dumps(new)))


def compare(model: Any, directory: Path, architecture: str, limit: float, count: int = 40) -> None:
    """Log-probabilities of a text, and the greedy tokens after a part of it."""
    path = directory.with_suffix(".gguf")
    if architecture == "phi3":
        rename_token(directory, "<pad>", "<|endoftext|>")
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
    if YARN in fields.values() and "rope_scaling" in fields:
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
        ("gemma", same(neurons=33), {"hidden_act": "relu"}, ("takes hidden_act 'gelu_new', not 'relu'",)),
        ("qwen2", same(neurons=33), rope({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), ("'dynamic'",)),
        ("phi3", same(neurons=33), {}, ("with the token '<|endoftext|>' only",)),
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
    assert ("--format stock" in said) == ("--format stock" in parts or "--format blockwise" in parts or name == "qwen3")


def test_where_the_engine_knows_no_windows_the_context_is_one(tmp_path: Path) -> None:
    """Mistral's first version and some Qwen2; up to there both compute the same."""
    model = save_pruned("mistral", DIFFERENT, tmp_path / "model")
    assert model.config.sliding_window == 16
    compare(model, tmp_path / "model", "deci", EXACT, count=16)
    (tokens,) = ask(tmp_path / "model.gguf", ["context"])
    assert tokens == 16


def test_a_model_with_more_tokens_than_embeddings_is_damaged(tmp_path: Path) -> None:
    save_pruned("llama", same(neurons=33), tmp_path, vocab_size=1000)
    with pytest.raises(CheckpointError, match="tokens up to 2047, and the model embeddings for 1000"):
        export(tmp_path, tmp_path / "out.gguf", "f16", None, Progress(quiet=True))
