"""Everything that is called OPT: its architectural options, and the spellings and formats of its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    BLOCKS,
    HEADS,
    HIDDEN,
    LENGTH,
    NEURONS,
    SAMPLES,
    Prune,
    copy_tokenizer,
    load,
    logits,
    save,
    tiny_opt,
    weight_files,
)
from safetensors.torch import save_file
from transformers import OPTForCausalLM

from llm_snp.dense.checkpoint import Checkpoint
from llm_snp.dense.data import calibration_windows
from llm_snp.dense.tokenizer import load_tokenizer
from llm_snp.errors import CheckpointError

VARIANTS: dict[str, dict[str, Any]] = {
    "opt-350m": {"do_layer_norm_before": False, "word_embed_proj_dim": HIDDEN // 2},
    "norm after, no projection": {"do_layer_norm_before": False},
    "no final norm": {"_remove_final_layer_norm": True},
    "no bias": {"enable_bias": False},
    "galactica": {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    "norm without weights": {"layer_norm_elementwise_affine": False},
    "gelu": {"activation_function": "gelu"},
    "untied": {"tie_word_embeddings": False},
    "one block, one head": {"num_hidden_layers": 1, "num_attention_heads": 1},
}


@pytest.fixture(params=VARIANTS)
def fields(request: pytest.FixtureRequest) -> dict[str, Any]:
    return VARIANTS[request.param]


def test_sparsity_0_changes_no_logit(prune: Prune, tmp_path: Path, ids: torch.Tensor, fields: dict[str, Any]) -> None:
    dense = save(tiny_opt(**fields), tmp_path / "dense")
    prune(dense, tmp_path / "out", 0.0)
    assert torch.equal(logits(load(tmp_path / "out"), ids), logits(load(dense), ids))


@pytest.mark.parametrize("options", [{"method": "snp"}, {"method": "best"}], ids=["snp", "best"])
def test_prunes_and_loads(
    prune: Prune, tmp_path: Path, ids: torch.Tensor, fields: dict[str, Any], options: dict[str, Any]
) -> None:
    if fields.get("num_attention_heads") == 1:
        options = {**options, "attention": "dims"}
    dense = save(tiny_opt(**fields), tmp_path / "dense")
    report = prune(dense, tmp_path / "out", 0.4, **options)
    model, whole = load(tmp_path / "out"), load(dense)
    assert whole.num_parameters() - model.num_parameters() == report["sparsity"]["block_parameters_removed"] > 0
    assert report["sparsity"]["achieved"] == pytest.approx(0.4, abs=0.004)
    found = logits(model, ids)
    assert torch.isfinite(found).all()
    assert (found - logits(whole, ids)).square().mean() < logits(whole, ids).square().mean()


def duplicate(model: OPTForCausalLM, half: bool) -> OPTForCausalLM:
    """Make the last neuron and head of each block copies of the first, or the second half copies of the first half."""
    with torch.no_grad():
        for block in model.model.decoder.layers:
            attention = block.self_attn
            for layer in (block.fc1, attention.q_proj, attention.k_proj, attention.v_proj):
                for tensor in layer.parameters():
                    unit = 1 if layer is block.fc1 else attention.head_dim
                    copies = tensor.shape[0] // 2 if half else unit
                    tensor[-copies:] = tensor[:copies]
    return model


# Zca and loo judge every unit beside all others, so both of two copies seem free: they can find one pair, not many.
# Greedy finds copies of half of all units in every variant; the rest is of the orders, for which one variant will do.
@pytest.mark.parametrize(
    ("fields", "order", "half"),
    [(name, "greedy", True) for name in VARIANTS]
    + [(next(iter(VARIANTS)), order, False) for order in ("greedy", "zca", "loo")],
    indirect=["fields"],
)
def test_copies_are_free_to_remove(
    prune: Prune,
    tmp_path: Path,
    text: Path,
    fields: dict[str, Any],
    order: str,
    half: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if fields.get("num_attention_heads") == 1:
        pytest.skip("one head has no copy")
    dense = save(duplicate(tiny_opt(**fields), half), tmp_path / "dense")

    def all_copies(name: str, curves: Any, budget: float) -> list[int]:
        return [curve.units // 2 if half else curve.units - 1 for curve in curves]

    monkeypatch.setattr("llm_snp.pruning.plan.allocate", all_copies)
    choices = {"order": order, "allocation": "uniform", "attention": "heads", "target": "self", "damping": 1e-9}
    report = prune(dense, tmp_path / "out", 0.5, **choices)
    expected = (HEADS // 2, NEURONS // 2) if half else (HEADS - 1, NEURONS - 1)
    assert {tuple(kept.values()) for kept in report["plan"]["kept"]} == {expected}
    # On the calibration windows: what never fires there is as free as a copy.
    ids = calibration_windows(str(text), load_tokenizer(dense), SAMPLES, LENGTH, seed=0).tokens
    whole = logits(load(dense), ids)
    error = (logits(load(tmp_path / "out"), ids) - whole).abs().max()
    assert error < 1e-3 * whole.abs().max()
    for block in report["blocks"]:
        for site in ("attention", "mlp"):
            assert block[site]["lost"] < 1e-5 * block[site]["total"]


def test_order_that_needs_relu_says_so(prune: Prune, tmp_path: Path) -> None:
    from llm_snp.errors import OptionError

    dense = save(tiny_opt(activation_function="gelu"), tmp_path / "dense")
    with pytest.raises(OptionError, match=r"i-spasp needs activations that cannot be negative.*greedy"):
        prune(dense, tmp_path / "out", order="i-spasp", attention="dims")
    assert not (tmp_path / "out").exists()


# Ways to store one and the same model.


def tensors_of(model: OPTForCausalLM) -> dict[str, torch.Tensor]:
    """The state dict without the tied head."""
    return {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}


def sharded(tensors: dict[str, torch.Tensor], directory: Path, safe: bool, shards: int = 3) -> None:
    """Write shards and their index by hand, the keys spread over all of them."""
    stem, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    weight_map = {}
    for i in range(shards):
        part = dict(list(tensors.items())[i::shards])
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}"
        if safe:
            save_file(part, directory / file, metadata={"format": "pt"})
        else:
            torch.save(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def as_safetensors(model: OPTForCausalLM, directory: Path) -> None:
    save_file(tensors_of(model), directory / "model.safetensors", metadata={"format": "pt"})


def with_head(model: OPTForCausalLM, directory: Path) -> None:
    tensors = tensors_of(model)
    head = {"lm_head.weight": model.lm_head.weight.detach().clone()}
    save_file(tensors | head, directory / "model.safetensors", metadata={"format": "pt"})


def head_only(model: OPTForCausalLM, directory: Path) -> None:
    tensors = tensors_of(model)
    tensors["lm_head.weight"] = tensors.pop("model.decoder.embed_tokens.weight")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def base_model(model: OPTForCausalLM, directory: Path) -> None:
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors_of(model).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def fairseq_norm(model: OPTForCausalLM, directory: Path) -> None:
    tensors = {k.replace("decoder.final_layer", "decoder.layer"): v for k, v in tensors_of(model).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def as_bin(model: OPTForCausalLM, directory: Path) -> None:
    torch.save(model.state_dict(), directory / "pytorch_model.bin")


def as_old_bin(model: OPTForCausalLM, directory: Path) -> None:
    torch.save(model.state_dict(), directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def as_views(model: OPTForCausalLM, directory: Path) -> None:
    """One storage for q, k and v, and a weight that was stored transposed."""
    tensors = dict(model.state_dict())
    for i in range(BLOCKS):
        names = [f"model.decoder.layers.{i}.self_attn.{x}_proj.weight" for x in "qkv"]
        joined = torch.cat([tensors[name] for name in names])
        tensors |= dict(zip(names, joined.chunk(3), strict=True))
        fc1 = f"model.decoder.layers.{i}.fc1.weight"
        tensors[fc1] = tensors[fc1].mT.contiguous().mT
    torch.save(tensors, directory / "pytorch_model.bin")


def as_base_model_bin(model: OPTForCausalLM, directory: Path) -> None:
    torch.save(model.model.state_dict(), directory / "pytorch_model.bin")


def as_sharded_bin(model: OPTForCausalLM, directory: Path) -> None:
    sharded(tensors_of(model), directory, safe=False)


def as_sharded_safetensors(model: OPTForCausalLM, directory: Path) -> None:
    sharded(tensors_of(model), directory, safe=True)


FORMATS: list[Callable[[OPTForCausalLM, Path], None]] = [
    *(with_head, head_only, base_model, fairseq_norm, as_bin, as_old_bin, as_views, as_base_model_bin),
    *(as_sharded_bin, as_sharded_safetensors),
]


def store(model: OPTForCausalLM, directory: Path, write: Callable[[OPTForCausalLM, Path], None]) -> Path:
    directory.mkdir()
    model.config.architectures = ["OPTForCausalLM"]
    model.config.save_pretrained(directory)
    copy_tokenizer(directory)
    write(model, directory)
    return directory


@pytest.fixture(scope="module")
def plain(prune: Prune, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Bytes of the pruned model from one safetensors file."""
    directory = tmp_path_factory.mktemp("plain")
    prune(store(tiny_opt(), directory / "dense", as_safetensors), directory / "out")
    return weight_files(directory / "out")


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_every_way_to_store_a_model_prunes_to_the_same_bytes(
    prune: Prune, tmp_path: Path, plain: dict[str, bytes], write: Callable[[OPTForCausalLM, Path], None]
) -> None:
    dense = store(tiny_opt(), tmp_path / "dense", write)
    prune(dense, tmp_path / "out")
    assert weight_files(tmp_path / "out") == plain
    # What is not pruned is written as it was read.
    prune(dense, tmp_path / "same", 0.0)
    same = Checkpoint(tmp_path / "same")
    expected = tensors_of(tiny_opt())
    assert set(same.names()) == set(expected)
    assert all(torch.equal(same.tensor(name), tensor) for name, tensor in expected.items())


def test_one_file_is_taken_before_shards_as_transformers_does(tmp_path: Path) -> None:
    dense = store(tiny_opt(0), tmp_path / "dense", as_safetensors)
    sharded(tensors_of(tiny_opt(1)), dense, safe=True)
    sharded(tensors_of(tiny_opt(2)), dense, safe=False)
    name = "model.decoder.embed_tokens.weight"
    assert torch.equal(Checkpoint(dense).tensor(name), load(dense).model.decoder.embed_tokens.weight)


def test_a_name_that_occurs_in_two_spellings_is_refused(tmp_path: Path) -> None:
    tensors = tensors_of(tiny_opt())
    tensors["decoder.embed_tokens.weight"] = tensors["model.decoder.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has model\.decoder\.embed_tokens\.weight twice, as .* and as "):
        Checkpoint(tmp_path, [(r"^decoder\.", "model.decoder.")])


BLOCK = 4 * 768 * 769 + 3072 * 769 + 768 * 3073  # linear parameters of a block of opt-125m


def test_shape_of_opt_125m(prune: Prune, tmp_path: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real shape, but two blocks instead of twelve, with random weights; the embedded model is pruned elsewhere."""
    sizes = {"vocab_size": 50272, "hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 2}
    more = {"ffn_dim": 3072, "max_position_embeddings": 2048, "word_embed_proj_dim": 768, "init_std": 0.02}
    dense = store(tiny_opt(dtype=torch.float16, **sizes, **more), tmp_path / "dense", as_sharded_safetensors)

    # Pruning a block of this size takes three seconds, an eigendecomposition of 3072 columns fourteen: only the second
    # one, and without zca.
    def last_block(name: str, curves: Any, budget: float) -> list[int]:
        return [curve.units * 2 // 3 if curve.block else curve.units for curve in curves]

    monkeypatch.setattr("llm_snp.pruning.plan.allocate", last_block)
    choices = {"method": "snp", "order": "energy", "allocation": "uniform", "samples": 4, "sequence_length": 64}
    report = prune(dense, tmp_path / "out", 0.1, **choices)
    assert report["model"]["parameters"] == 125_239_296 - 10 * (BLOCK + 4 * 768)
    assert report["sparsity"]["block_parameters"] == 2 * BLOCK
    model = load(tmp_path / "out")
    assert torch.isfinite(logits(model, ids)).all()
    assert sum(p.numel() for p in model.parameters()) == report["model"]["parameters_pruned"]
    assert model.model.decoder.layers[1].fc1.weight.shape == (2048, 768)
    assert model.model.decoder.layers[1].self_attn.q_proj.weight.shape == (512, 768)
