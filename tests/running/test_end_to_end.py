"""Whole runs on a tiny model: what comes out is smaller, loads, and is what the report says."""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    BLOCKS,
    HEADS,
    HIDDEN,
    LENGTH,
    NEURONS,
    POSITIONS,
    Prune,
    load,
    logits,
    save,
    tiny_opt,
    weight_files,
)
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, OPTForCausalLM

import llm_snp
from llm_snp.config import ATTENTION_MODES, DAMPING, METHODS, SENSITIVITIES, TARGETS
from llm_snp.core.allocation import ALLOCATIONS
from llm_snp.core.orders import ORDERS
from llm_snp.dense import stream
from llm_snp.dense.checkpoint import Checkpoint
from llm_snp.dense.data import calibration_windows, evaluation_windows
from llm_snp.dense.hub import load_config
from llm_snp.dense.mixture import fitted_and_unseen
from llm_snp.dense.skeleton import Skeleton
from llm_snp.dense.stream import Stream
from llm_snp.documents.summary import summary
from llm_snp.errors import NumericalError
from llm_snp.families import FAMILIES
from llm_snp.modeling.opt import SnpOPTForCausalLM
from llm_snp.result import assembly, own_code
from llm_snp.running import run as run_module
from llm_snp.system.workspace import JOURNAL

HEAD_DIM = HIDDEN // HEADS
NEURON_COST = 2 * HIDDEN + 1  # a row and a bias of fc1, a column of fc2
BLOCK_PARAMETERS = 4 * HIDDEN * (HIDDEN + 1) + 2 * NEURONS * HIDDEN + NEURONS + HIDDEN

# An OPT has no query heads that could go alone; tests/test_families.py has them.
MODES = [mode for mode in ATTENTION_MODES if mode != "queries"]
ONE_SHOT = [method for method in METHODS if method != "everything"]  # which test_steps.py has
# Every value of every choice, each allocation with each attention mode, each target with both ways of damping.
RUNS: list[dict[str, Any]] = [
    *({"method": method, "attention": attention} for method, attention in product(ONE_SHOT, MODES)),
    *({"allocation": by, "attention": mode, "target": "self"} for by, mode in product(ALLOCATIONS, MODES)),
    *({"target": target, "attention": "heads"} for target in TARGETS),
    *({"target": target, "attention": "dims", "damping": "auto"} for target in TARGETS),
    *({"sensitivity": sensitivity, "attention": "both"} for sensitivity in SENSITIVITIES),
    {"method": "snp", "sparsity": 0.8},
    {"method": "best", "sparsity": 0.8},
    {"method": "best", "sparsity": 0.004},
]


def check_result(dense: Path, output: Path, report: dict[str, Any], sparsity: float) -> Any:
    """What must hold for every result; returns the loaded model."""
    whole, model = load(dense), load(output)
    removed = whole.num_parameters() - model.num_parameters()
    asked = sparsity * BLOCKS * BLOCK_PARAMETERS
    assert abs(removed - asked) <= NEURON_COST / 2
    assert report["sparsity"]["block_parameters"] == BLOCKS * BLOCK_PARAMETERS
    assert report["sparsity"]["block_parameters_removed"] == removed
    assert report["sparsity"]["achieved"] == removed / (BLOCKS * BLOCK_PARAMETERS)
    assert report["model"]["parameters"] == whole.num_parameters()
    assert report["model"]["parameters_pruned"] == model.num_parameters()
    for kept, block in zip(report["plan"]["kept"], model.model.decoder.layers, strict=True):
        heads, dims = kept.get("heads", HEADS), kept.get("dims", HEAD_DIM)
        for name in ("q_proj", "k_proj", "v_proj"):
            assert block.self_attn.get_submodule(name).weight.shape == (heads * dims, HIDDEN)
            assert block.self_attn.get_submodule(name).bias.shape == (heads * dims,)
        assert block.self_attn.out_proj.weight.shape == (HIDDEN, heads * dims)
        assert block.fc1.weight.shape == (kept["neurons"], HIDDEN)
        assert block.fc2.weight.shape == (HIDDEN, kept["neurons"])
    shards = [path for path in output.iterdir() if path.suffix == ".safetensors"]
    assert len(shards) == BLOCKS + 1
    assert report["model"]["bytes_pruned"] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert not (output / JOURNAL).exists()
    assert [path.name for path in output.iterdir() if path.name.startswith(".")] == [".cache"]
    assert not output.with_name(output.name + ".partial").exists()
    return model


@pytest.mark.parametrize("options", RUNS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_choice_gives_a_smaller_model_that_loads(
    prune: Prune, dense: Path, tmp_path: Path, ids: torch.Tensor, options: dict[str, Any]
) -> None:
    options = {"sparsity": 0.3, **options}
    report = prune(dense, tmp_path / "out", **options)
    model = check_result(dense, tmp_path / "out", report, options["sparsity"])
    assert torch.isfinite(logits(model, ids)).all()


@pytest.mark.parametrize("order", [name for name in ORDERS if name != "i-spasp"])
def test_orders(prune: Prune, dense: Path, tmp_path: Path, order: str) -> None:
    report = prune(dense, tmp_path / "out", order=order, allocation="uniform", attention="heads", target="self")
    check_result(dense, tmp_path / "out", report, 0.3)


def test_repair_keeps_more_than_no_repair(prune: Prune, dense: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    whole = logits(load(dense), ids)
    error = {}
    for target in ("none", "self", "residual"):
        prune(dense, tmp_path / target, order="greedy", allocation="uniform", attention="heads", target=target)
        error[target] = (logits(load(tmp_path / target), ids) - whole).square().mean().item()
    assert max(error["self"], error["residual"]) < error["none"]


def slow_perplexity(model: Any, tokenizer: Any, text: str, length: int) -> tuple[float, int]:
    """The protocol once more, one token at a time."""
    ids = tokenizer(text)["input_ids"]
    losses = []
    for start in range(0, len(ids) - length + 1, length):
        window = torch.tensor(ids[start : start + length])
        log_probabilities = F.log_softmax(logits(model, window[None])[0], dim=-1)
        losses += [-log_probabilities[t, window[t + 1]].item() for t in range(length - 1)]
    return math.exp(math.fsum(losses) / len(losses)), len(losses)


def test_report_is_complete_and_true(prune: Prune, dense: Path, tmp_path: Path, held_out: Path) -> None:
    output = tmp_path / "out"
    report = prune(dense, output, evaluate=(str(held_out),), seed=3)
    stored = json.loads((output / "report.json").read_text(), parse_constant=pytest.fail)
    assert stored.pop("seal")  # of the file
    # What is returned has places as they were given, the file has none.
    given = {"options": report["options"], "output": str(output), "command": report["command"]}
    assert report["options"]["model"] == str(dense)
    evaluation = {
        str(held_out): {
            which: one | {"source": str(held_out)} for which, one in stored["evaluation"][held_out.name].items()
        }
    }
    calibration = {key: report["calibration"][key] for key in ("source", "texts")}
    assert json.loads(json.dumps(report)) == stored | json.loads(json.dumps(given)) | {
        "evaluation": evaluation,
        "calibration": stored["calibration"] | calibration,
    }
    assert set(stored) >= {
        *("format", "versions", "command", "options", "seed", "model", "device", "calibration", "blocks"),
        *("evaluation", "notes", "sparsity", "plan", "output", "seconds", "peak_memory"),
    }
    assert stored["seed"] == 3
    assert stored["versions"]["torch"] == version("torch")
    assert stored["calibration"]["sequence_length"] == LENGTH
    assert stored["model"]["dtype"] == "float32"
    assert [block["block"] for block in stored["blocks"]] == list(range(BLOCKS))
    for block, kept in zip(stored["blocks"], stored["plan"]["kept"], strict=True):
        assert {site["unit"]: site["kept"] for name, site in block.items() if name != "block"} == kept
    tokenizer = AutoTokenizer.from_pretrained(output)
    for which, directory in (("dense", dense), ("pruned", output)):
        perplexity, tokens = slow_perplexity(load(directory), tokenizer, held_out.read_text(), LENGTH)
        found = stored["evaluation"][held_out.name][which]
        assert found["tokens"] == tokens
        assert found["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    card = (output / "README.md").read_text()
    assert card.startswith("---\n")
    assert f"{stored['evaluation'][held_out.name]['pruned']['perplexity']:.2f}" in card


def test_sparsity_0_is_the_dense_model(
    prune: Prune, dense: Path, tmp_path: Path, ids: torch.Tensor, held_out: Path
) -> None:
    for name, options in {"best": {}, "snp": {"method": "snp"}, "both": {"attention": "both"}}.items():
        report = prune(dense, tmp_path / name, 0.0, evaluate=(str(held_out),), **options)
        assert report["sparsity"]["achieved"] == 0
        model = load(tmp_path / name)
        assert type(model) is OPTForCausalLM
        assert AutoConfig.from_pretrained(tmp_path / name).model_type == "opt"
        assert not (tmp_path / name / "modeling_snp.py").exists()
        assert torch.equal(logits(model, ids), logits(load(dense), ids))
        evaluation = report["evaluation"][str(held_out)]
        assert evaluation["dense"] == evaluation["pruned"]


def test_streamed_logits_equal_those_in_memory(prune: Prune, dense: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    prune(dense, tmp_path / "out")
    for directory in (dense, tmp_path / "out"):
        checkpoint = Checkpoint(directory)
        skeleton = Skeleton(
            load_config(directory), FAMILIES["opt"].blocks, checkpoint, torch.device("cpu"), torch.float32
        )
        stream = Stream(skeleton, ids)
        for i in range(len(skeleton)):
            stream.advance(i, skeleton.load_block(i, skeleton.block_state(i)))
        with skeleton.outer_weights():
            streamed = skeleton.leave(ids, stream.states)
        assert torch.equal(streamed, logits(load(directory), ids))


def test_the_tests_compute_on_the_device_that_is_asked_for(
    prune: Prune, dense: Path, tmp_path: Path, device: str
) -> None:
    """On a machine with a GPU that is the GPU, unless the module is marked `cpu`."""
    report = prune(dense, tmp_path / "out", order="random", samples=2)
    assert report["device"]["type"] == torch.device(device).type


def test_windows_in_uneven_batches(prune: Prune, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prune(dense, tmp_path / "one")
    for kind in stream.BATCH_TOKENS:
        monkeypatch.setitem(stream.BATCH_TOKENS, kind, 5 * LENGTH)  # 5, 5 and 2 windows
    prune(dense, tmp_path / "many")
    one, many = load(tmp_path / "one"), load(tmp_path / "many")
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_an_upgrade_during_the_run_costs_nothing(
    prune: Prune, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code that a result brings along is this version's, whatever is installed by the time that it is written."""
    prune(dense, tmp_path / "before")
    save = assembly.PrunedBlocks.save

    def upgraded(*arguments: Any) -> None:
        monkeypatch.setattr(own_code, "bundle", lambda source: pytest.fail(f"{source} is read late"))
        save(*arguments)

    monkeypatch.setattr(assembly.PrunedBlocks, "save", upgraded)
    prune(dense, tmp_path / "after")
    code = [(tmp_path / name / own_code.MODELING).read_bytes() for name in ("before", "after")]
    assert code[0] == code[1]


def test_same_seed_same_bytes(prune: Prune, dense: Path, tmp_path: Path) -> None:
    reports = [prune(dense, tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    a, b, c = (weight_files(tmp_path / name) for name in "abc")
    assert len(a) == BLOCKS + 3
    assert a == b
    assert a != c
    hashes = [report["calibration"]["sha256"] for report in reports]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_checkpoint_keeps_its_type(prune: Prune, tmp_path: Path, ids: torch.Tensor, dtype: torch.dtype) -> None:
    dense = save(tiny_opt(dtype=dtype), tmp_path / "dense")
    report = prune(dense, tmp_path / "out")
    assert report["model"]["dtype"] == str(dtype).removeprefix("torch.")
    assert report["device"]["dtype"] == "float32"
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {dtype}  # noqa: SIM118
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == str(dtype).removeprefix("torch.")
    prune(dense, tmp_path / "same", 0.0)
    assert torch.equal(logits(load(tmp_path / "same"), ids), logits(load(dense), ids))


def test_computing_in_half_precision(prune: Prune, dense: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    prune(dense, tmp_path / "float32")
    prune(dense, tmp_path / "bfloat16", dtype="bfloat16")
    whole = logits(load(dense), ids)
    for name in ("float32", "bfloat16"):
        model = load(tmp_path / name)
        assert model.lm_head.weight.dtype == torch.float32
        assert (logits(model, ids) - whole).square().mean() < 0.5 * whole.square().mean()


@pytest.mark.parametrize("computed", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_outliers_in_sixteen_bits(
    prune: Prune, tmp_path: Path, ids: torch.Tensor, stored: torch.dtype, computed: str
) -> None:
    """A neuron and a residual channel a thousand times larger than the others, as large models have them."""
    model = tiny_opt(dtype=torch.float32)
    with torch.no_grad():
        for block in model.model.decoder.layers:
            block.fc1.bias[3] += 1000.0
            block.fc2.weight[:, 3] /= 1000.0
            block.fc2.bias[5] += 50.0
    dense = save(model.to(stored), tmp_path / "dense")
    report = prune(dense, tmp_path / "out", dtype=computed, samples=24)
    whole, pruned = logits(load(dense), ids), logits(load(tmp_path / "out"), ids)
    assert torch.isfinite(pruned).all()
    # Sixteen bits compute the outliers' products to a hundredth or so; what is lost is not that.
    assert (pruned - whole).square().mean() < 0.5 * whole.var()
    assert all(
        site["damping"] in (None, DAMPING) for block in report["blocks"] for site in (block["attention"], block["mlp"])
    )


@pytest.mark.parametrize("attention", MODES)
def test_round_to(prune: Prune, dense: Path, tmp_path: Path, attention: str) -> None:
    sparsity = 0.4 if attention == "none" else 0.5
    report = prune(dense, tmp_path / "out", sparsity, round_to=4, attention=attention)
    for kept in report["plan"]["kept"]:
        assert kept["neurons"] % 4 == 0
        assert kept.get("dims", 0) % 4 == 0
    assert abs(report["sparsity"]["block_parameters_removed"] - sparsity * BLOCKS * BLOCK_PARAMETERS) <= 2 * NEURON_COST
    assert isinstance(load(tmp_path / "out"), SnpOPTForCausalLM)


def test_windows_are_as_long_as_the_model_allows(prune: Prune, dense: Path, tmp_path: Path) -> None:
    report = prune(dense, tmp_path / "out", sequence_length=4096)
    assert report["calibration"]["sequence_length"] == POSITIONS
    assert report["calibration"]["sequence_length_asked"] == 4096
    assert any(f"windows have {POSITIONS} tokens: the model has no more positions" in n for n in report["notes"])


def test_whole_heads_by_one_kind_of_text_are_pointed_out(
    prune: Prune,
    dense: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a published model they lost most there: before the blocks are pruned, and in the report."""

    def said(**options: Any) -> bool:
        notes = prune(dense, tmp_path / "out", 0.5, overwrite=True, quiet=False, **options)["notes"]
        printed = capsys.readouterr().err
        assert ("whole heads go" in printed) == any("whole heads go" in note for note in notes)
        assert "whole heads go" not in printed or printed.index("whole heads go") < printed.index("\nprune ...")
        return "whole heads go" in printed

    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    monkeypatch.setattr("llm_snp.pruning.measure.cheapest_kind", lambda choices, *_: choices[0])  # the heads
    assert said(attention="both")
    assert not said(attention="both", calibration=(str(text), str(other)))
    assert not said(attention="both", calibration="self")
    assert not said(attention="heads")
    monkeypatch.setattr("llm_snp.pruning.measure.cheapest_kind", lambda choices, *_: choices[-1])
    assert not said(attention="both")


def test_whole_heads_go_only_where_several_kinds_of_text_judge_them(
    prune: Prune, dense: Path, text: Path, tmp_path: Path
) -> None:
    """What `auto`, the default, comes to."""
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    for texts, attention in (
        ((str(text),), "dims"),
        ((f"{text}:2",), "dims"),
        ((str(text), str(other)), "both"),
        (("self",), "both"),
        (("self:2",), "both"),
    ):
        report = prune(dense, tmp_path / "out", 0.3, overwrite=True, method="best", calibration=texts)
        assert report["options"]["attention"] == attention
        assert "--attention" not in report["command"]
        assert "--experts" not in report["command"]
    report = prune(dense, tmp_path / "out", 0.3, overwrite=True, attention="both")
    assert report["command"].count("--attention both") == 1


def test_text_that_the_model_writes(prune: Prune, dense: Path, tmp_path: Path) -> None:
    report = prune(dense, tmp_path / "out", calibration="self", evaluate=("self",))
    assert report["calibration"]["source"].startswith("self")
    # Evaluated on other text than it was calibrated on, and calibrated on nothing from elsewhere.
    assert report["evaluation"]["self"]["dense"]["source"] != report["calibration"]["source"]
    again = prune(dense, tmp_path / "again", calibration="self", evaluate=())
    assert again["calibration"]["sha256"] == report["calibration"]["sha256"]
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "again")


def test_the_embedded_model_with_text_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import llm_snp

    monkeypatch.chdir(tmp_path)
    report = llm_snp.prune(sparsity=0.2, samples=8, sequence_length=32, quiet=True, device="cpu")
    assert report["output"] == "opt-wiki-1m-snp-20"
    assert report["calibration"]["source"].startswith("self")
    evaluation = report["evaluation"]["self"]
    # Of so little text, which is another one with every version of torch, the pruned model may know more by chance.
    ratio = evaluation["pruned"]["perplexity"] / evaluation["dense"]["perplexity"]
    assert 0.95 < ratio < 10
    assert report["model"]["bytes_pruned"] < report["model"]["bytes"]


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_report_says_how_closely_the_calibration_was_fitted(
    dense: Path, text: Path, tmp_path: Path, sparsity: float
) -> None:
    """Nothing where nothing was removed; otherwise what evaluating on those very windows says."""
    report = llm_snp.prune(
        str(dense),
        sparsity,
        output=str(tmp_path / "out"),
        calibration=str(text),
        samples=8,
        sequence_length=LENGTH,
        evaluate=(str(text),),
        device="cpu",
        quiet=True,
    )
    pair = fitted_and_unseen(calibration_windows(str(text), AutoTokenizer.from_pretrained(dense), 8, LENGTH, seed=0))
    assert pair is not None
    for measured, windows in zip(report["overfit"], pair, strict=True):
        loss = [_loss(load(model), windows.tokens) for model in (tmp_path / "out", dense)]
        assert (measured["source"], measured["windows"]) == (windows.source, 8)
        assert measured["loss"] == pytest.approx(loss[0] - loss[1], abs=1e-4)
        assert bool(measured["loss"]) == bool(sparsity)
    fitted, unseen = (measured["loss"] for measured in report["overfit"])
    assert f"over-fit {unseen - fitted:+.3f} nats a token" in summary(report)


def test_logits_that_overflow_cost_no_result(
    prune: Prune, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two neurons cancel each other in the dense model, and each alone is beyond float16."""
    model = tiny_opt(dtype=torch.float16)
    with torch.no_grad():
        last = model.model.decoder.layers[-1]
        last.fc1.weight[:2], last.fc1.bias[:2] = 0.0, 2.0
        last.fc2.weight[:, 0], last.fc2.weight[:, 1] = 50_000.0, -50_000.0
    options: dict[str, Any] = {"order": "random", "allocation": "uniform", "target": "none", "attention": "none"}
    options |= {"evaluate": (str(held_out),), "dtype": "float16", "device": "cpu"}
    dense, noted = save(model, tmp_path / "dense"), []
    for seed in range(20):
        report = prune(dense, tmp_path / "out", 0.3, **options, seed=seed, overwrite=True)
        noted = [note for note in report["notes"] if "not finite" in note]
        if noted:
            break
    said = "the pruned model's logits are not finite in float16: perplexity was measured in float32; load it in float32"
    assert [note.startswith(said) for note in noted] == [True]
    windows = evaluation_windows(str(held_out), AutoTokenizer.from_pretrained(dense), LENGTH)
    measured = report["evaluation"][str(held_out)]["pruned"]["nll"] / windows.tokens[:, 1:].numel()
    assert measured == pytest.approx(_loss(load(tmp_path / "out"), windows.tokens), rel=1e-4)

    streamed = run_module.perplexity_streamed

    def broken(skeleton: Any, *rest: Any) -> Any:
        if skeleton.checkpoint.directory != dense:
            raise NumericalError("the model's logits are not finite")
        return streamed(skeleton, *rest)

    monkeypatch.setattr(run_module, "perplexity_streamed", broken)
    report = prune(dense, tmp_path / "out", 0.3, **options, overwrite=True)
    assert report["evaluation"][str(held_out)]["pruned"]["perplexity"] == pytest.approx(math.exp(700))
    assert [note for note in report["notes"] if "perplexity has no number" in note]


def _loss(model: Any, ids: torch.Tensor) -> float:
    """Mean loss in nats of all predicted tokens of windows (N, T)."""
    with torch.no_grad():
        return float(F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()))
