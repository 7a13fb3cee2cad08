"""A result is a Hugging Face checkpoint like any other, also where llm_snp is not installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import BLOCKS, NEURONS, Prune, load, logits, tiny_opt
from elsewhere import elsewhere
from safetensors.torch import load_file
from tiny_models import save_tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, OPTForCausalLM, PreTrainedModel

import llm_snp.pruning.plan
from llm_snp.dense.hub import EMBEDDED, load_config, transformers_is
from llm_snp.dense.rotary import older_fields
from llm_snp.families import FAMILIES


@pytest.fixture(scope="module", params=["dims", "heads"])
def result(request: pytest.FixtureRequest, prune: Prune, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model with different widths in every block."""
    output = tmp_path_factory.mktemp("result") / request.param
    prune(dense, output, 0.4, attention=request.param)
    return output


@pytest.fixture(scope="module")
def found(result: Path, tmp_path_factory: pytest.TempPathFactory, ids: torch.Tensor) -> dict[str, Any]:
    return elsewhere(result, tmp_path_factory.mktemp("elsewhere"), ids)


def test_loads_without_llm_snp(found: dict[str, Any], result: Path, ids: torch.Tensor) -> None:
    assert found["llm_snp"] == "absent"
    assert found["class"] == "SnpOPTForCausalLM"
    assert found["module"].startswith("transformers_modules.")
    assert torch.equal(torch.tensor(found["logits"]), logits(load(result), ids))


def test_generates_the_same_with_and_without_cache(found: dict[str, Any]) -> None:
    assert found["cached"] == found["uncached"] == found["stepwise"]


def test_padding_on_the_left_changes_nothing(found: dict[str, Any]) -> None:
    assert found["padded"] < 1e-4


def test_pipeline_writes_text(found: dict[str, Any]) -> None:
    assert found["pipeline"].startswith("Ba den ki")
    assert len(found["pipeline"]) > len("Ba den ki")


def test_saves_and_loads_again(found: dict[str, Any]) -> None:
    assert found["again"] is True
    assert "modeling_snp.py" in found["files again"]


def test_half_precision(found: dict[str, Any]) -> None:
    dtype, error = found["half"]
    assert dtype == "torch.float16"
    assert error < 0.1


def test_trains(found: dict[str, Any]) -> None:
    before, after = found["losses"]
    assert after < before
    assert found["idle"] == []


def test_trains_with_gradient_checkpointing(found: dict[str, Any]) -> None:
    assert found["checkpointed losses"] == pytest.approx(found["losses"], rel=1e-5)
    assert found["checkpointed"] < 1e-5


def test_without_trust_remote_code_where_llm_snp_is_imported(result: Path, ids: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(result, trust_remote_code=False)
    assert type(model).__module__ == "llm_snp.modeling.opt"
    assert AutoConfig.from_pretrained(result, trust_remote_code=False).model_type == "snp_opt"
    assert torch.equal(logits(model.eval(), ids), logits(load(result), ids))


def test_same_widths_in_every_block_and_whole_heads_is_stock_opt(
    prune: Prune, dense: Path, tmp_path: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No allocation gives exactly this on purpose; decide as if one had.
    kept = NEURONS - 10

    def only_neurons(name: str, curves: Any, budget: float) -> list[int]:
        return [kept if curve.unit == "neurons" else curve.units for curve in curves]

    monkeypatch.setattr(llm_snp.pruning.plan, "allocate", only_neurons)
    prune(dense, tmp_path / "out", allocation="uniform", attention="heads")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "opt"
    assert config["architectures"] == ["OPTForCausalLM"]
    assert config["ffn_dim"] == kept
    assert "auto_map" not in config
    assert "block_widths" not in config
    assert not (tmp_path / "out" / "modeling_snp.py").exists()
    assert type(load(tmp_path / "out")) is OPTForCausalLM
    found = elsewhere(tmp_path / "out", tmp_path, ids)
    assert found["class"] == "OPTForCausalLM"
    assert torch.equal(torch.tensor(found["logits"]), logits(load(tmp_path / "out"), ids))
    assert found["cached"] == found["uncached"]


def test_tokenizer_in_the_files_that_opt_has_on_the_hub(prune: Prune, tmp_path: Path, ids: torch.Tensor) -> None:
    dense, output = tmp_path / "dense", tmp_path / "out"
    tiny_opt().save_pretrained(dense)
    model = json.loads((EMBEDDED / "tokenizer.json").read_text())["model"]
    (dense / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (dense / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n")
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    (dense / "special_tokens_map.json").write_text(json.dumps(special))
    fields = {"add_bos_token": True, "add_prefix_space": False, "errors": "replace", "tokenizer_class": "GPT2Tokenizer"}
    (dense / "tokenizer_config.json").write_text(json.dumps(special | fields))
    sample = "Ba den ki lo, per saver!\n\n Nu"
    expected = AutoTokenizer.from_pretrained(dense)(sample)["input_ids"]
    assert expected[0] == 2
    assert len(expected) > 10
    prune(dense, output)
    assert AutoTokenizer.from_pretrained(output)(sample)["input_ids"] == expected
    assert elsewhere(output, tmp_path, ids)["tokens"] == expected


def test_code_of_the_dense_model_does_not_travel(prune: Prune, dense: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(dense, tmp_path / "dense"))
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (model / "config.json").write_text(json.dumps(config))
    prune(model, tmp_path / "same", 0.0)
    assert "auto_map" not in json.loads((tmp_path / "same" / "config.json").read_text())
    prune(model, tmp_path / "out")
    auto_map = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert set(auto_map.values()) == {f"modeling_snp.SnpOPT{kind}" for kind in ("Config", "Model", "ForCausalLM")}


def test_stock_fields(dense: Path) -> None:
    config = load_config(dense)
    whole = FAMILIES["opt"].widths(config, {})
    assert FAMILIES["opt"].stock_fields(config, [whole] * BLOCKS) == {"ffn_dim": NEURONS}
    assert FAMILIES["opt"].stock_fields(config, [whole | {"neurons": 7}] * BLOCKS) == {"ffn_dim": 7}
    assert FAMILIES["opt"].stock_fields(config, [whole | {"neurons": 7}, *[whole] * (BLOCKS - 1)]) is None
    assert FAMILIES["opt"].stock_fields(config, [whole | {"heads": 3}] * BLOCKS) is None
    assert FAMILIES["opt"].stock_fields(config, [{"dims": 3}] * BLOCKS) is None


def test_wrong_widths_are_refused(result: Path) -> None:
    config = AutoConfig.from_pretrained(result)
    config.block_widths = config.block_widths[:-1]
    with pytest.raises(ValueError, match=f"block_widths has {BLOCKS - 1} entries, expected one for each of {BLOCKS}"):
        AutoModelForCausalLM.from_config(config)


@pytest.mark.skipif(not hasattr(PreTrainedModel, "generate_batch"), reason="this transformers has no such method")
def test_continuous_batching_works_or_says_why_not(prune: Prune, dense: Path, tmp_path: Path) -> None:
    """Its cache has one shape for all blocks: that of the config, which whole attention still has."""
    small = transformers.ContinuousBatchingConfig(num_blocks=8, page_size=16, max_batch_tokens=64)
    greedy = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=2, pad_token_id=1)
    prompts = [[5, 6, 7, 8], [9, 10, 11]]

    def batched(attention: str) -> tuple[Any, list[list[int]]]:
        prune(dense, tmp_path / attention, attention=attention)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / attention)
        found = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=small, warmup=False)
        return model, [one.generated_tokens for one in found.values()]

    model, found = batched("none")
    alone = [model.generate(torch.tensor([ids]), generation_config=greedy)[0, len(ids) :].tolist() for ids in prompts]
    assert found == alone
    with pytest.raises(ValueError, match="continuous batching keeps the keys and values of all blocks in one shape"):
        batched("dims")


@pytest.mark.parametrize("format", ["auto", "stock"])
def test_rotary_positions_as_older_versions_and_engines_read_them(format: str, prune: Prune, tmp_path: Path) -> None:
    """Beside `rope_parameters`, which transformers 4 does not know: it would take its defaults, without a word."""
    directory = save_tiny("llama", tmp_path / "dense")
    fields = json.loads((directory / "config.json").read_text())
    fields.pop("rope_parameters", None)
    scaling = {"rope_type": "linear", "factor": 4.0}
    older = {"rope_theta": 500000.0, "rope_scaling": scaling, "torch_dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(fields | older))
    prune(directory, tmp_path / "out", 0.3, format=format)
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: found[name] for name in older} == older
    assert getattr(load_config(tmp_path / "out"), "rope_parameters", None) == getattr(
        load_config(directory), "rope_parameters", None
    )


@pytest.mark.parametrize(("installed", "newer"), [("4.50.0", False), ("4.56.0.dev0", True), ("5.0.0rc1", True)])
def test_versions_are_compared_and_not_what_a_config_has(
    installed: str, newer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config that a newer transformers has saved has its fields in an older one, too."""
    monkeypatch.setattr("llm_snp.dense.hub.version", lambda name: installed)
    assert transformers_is(4, 56) is newer
    assert transformers_is(4, 50)
    assert transformers_is(5) is installed.startswith("5")


def test_rotary_positions_of_a_model_that_transformers_5_has_saved() -> None:
    llama3 = {"rope_type": "llama3", "factor": 8.0}
    made = older_fields({"rope_parameters": llama3 | {"rope_theta": 5e5, "partial_rotary_factor": 0.5}})
    assert made == {"rope_theta": 5e5, "rope_scaling": llama3, "partial_rotary_factor": 0.5}
    assert older_fields({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}) == {
        "rope_theta": 1e6,
        "rope_scaling": None,
    }
    several = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    gemma3 = {"rope_theta": 1e6, "rope_scaling": None, "rope_local_base_freq": 1e4}
    assert older_fields({"rope_parameters": several}) == gemma3
    assert older_fields({"rope_parameters": {"full_attention": None}}) == older_fields({}) == {}
    factors = {"short_factor": [1.0], "long_factor": [2.0]}
    long = factors | {"rope_theta": 1e4, "rope_type": "longrope", "original_max_position_embeddings": 32}
    assert older_fields({"rope_parameters": long, "partial_rotary_factor": 0.75}) == {
        "rope_theta": 1e4,
        "rope_scaling": factors | {"type": "longrope"},
        "original_max_position_embeddings": 32,
        "partial_rotary_factor": 0.75,
    }
    given = {"rope_theta": 2e4, "rope_scaling": None}
    assert older_fields(given | {"rope_parameters": {"rope_theta": 1e6}}) == given
    phi3 = {"partial_rotary_factor": 0.5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e2}}
    assert older_fields(phi3) == {"rope_theta": 5e2, "rope_scaling": None, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize("format", ["auto", "stock"])
def test_the_head_of_gpt_neox_has_its_name_in_files(format: str, prune: Prune, tmp_path: Path) -> None:
    """transformers 5 calls it `lm_head`, and nothing else would find it under that."""
    directory = save_tiny("gpt_neox", tmp_path / "dense")
    prune(directory, tmp_path / "out", 0.3, format=format)
    names = {name for file in (tmp_path / "out").glob("*.safetensors") for name in load_file(file)}
    assert "embed_out.weight" in names
    assert "lm_head.weight" not in names
    loaded, information = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_loading_info=True
    )
    assert not information["missing_keys"]
    assert not information["unexpected_keys"]
    head = loaded.get_output_embeddings().weight
    torch.testing.assert_close(head, load(directory).get_output_embeddings().weight, rtol=0, atol=0)
    loaded.save_pretrained(tmp_path / "again")
    assert "embed_out.weight" in load_file(tmp_path / "again" / "model.safetensors")
