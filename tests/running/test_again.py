"""A pruned model is pruned again: what it has left is the base, and its report knows what it was made of."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BLOCKS, Prune, Shell, copied, load, logits, weight_files
from safetensors.torch import load_file, save_file

from llm_snp.documents.card import model_card
from llm_snp.documents.shareable import shareable
from llm_snp.documents.summary import summary
from llm_snp.errors import OptionError
from llm_snp.healing.options import HealConfig
from llm_snp.healing.pair import find_pair
from llm_snp.healing.resume import inputs_of
from llm_snp.running.inputs import ADAPTER, UNREAD
from llm_snp.system.journal import Journal


@pytest.fixture(scope="module")
def once(dense: Path, prune: Prune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny OPT with a third less, of other widths in each block."""
    output = tmp_path_factory.mktemp("once") / "once"
    prune(dense, output, 0.3)
    return output


@pytest.fixture(scope="module")
def twice(once: Path, held_out: Path, prune: Prune) -> tuple[Path, dict[str, Any]]:
    return once.with_name("twice"), prune(once, once.with_name("twice"), 0.2, evaluate=(str(held_out),))


def test_both_shares_are_told(twice: tuple[Path, dict[str, Any]], once: Path, dense: Path) -> None:
    output, report = twice
    sizes = [load(path).num_parameters() for path in (dense, once, output)]
    first = json.loads((once / "report.json").read_text())
    base, gone = first["sparsity"]["block_parameters"], sizes[0] - sizes[2]
    assert [report["model"][name] for name in ("parameters", "parameters_pruned")] == sizes[1:]
    assert report["sparsity"]["achieved"] == pytest.approx(0.2, abs=0.01)
    assert report["sparsity"]["block_parameters"] == base - (sizes[0] - sizes[1])
    assert report["sparsity"]["dense_block_parameters"] == base
    assert report["sparsity"]["of_dense"] == pytest.approx(gone / base)
    assert report["parents"] == [{"name": "tiny", "hub": False, "removed": first["sparsity"]["achieved"], "healed": 0}]
    assert report["model"]["name"] == "once"
    shares = f"; {gone / base:.2%} of the dense model's blocks in all"
    assert shares in summary(report)
    assert "of the dense model" not in summary(first | {"output": ""})
    card = model_card(report)
    assert f"It had been pruned before, made of `tiny` ({first['sparsity']['achieved']:.2%} removed): " in card
    assert "|  | before | pruned | change |" in card
    assert "| dense |" not in card


def test_three_in_a_row(twice: tuple[Path, dict[str, Any]], prune: Prune, tmp_path: Path, ids: torch.Tensor) -> None:
    report = prune(twice[0], tmp_path / "out", 0.2)
    assert [parent["name"] for parent in report["parents"]] == ["tiny", "once"]
    left = (1 - report["sparsity"]["achieved"]) * (1 - twice[1]["sparsity"]["of_dense"])
    assert report["sparsity"]["of_dense"] == pytest.approx(1 - left)
    assert torch.isfinite(logits(load(tmp_path / "out"), ids)).all()
    assert shareable(report)["parents"] == report["parents"]


def test_nothing_more_removed_is_the_identity(once: Path, prune: Prune, tmp_path: Path, ids: torch.Tensor) -> None:
    prune(once, tmp_path / "out", 0.0)
    assert torch.equal(logits(load(tmp_path / "out"), ids), logits(load(once), ids))
    widths = [json.loads((path / "config.json").read_text())["block_widths"] for path in (once, tmp_path / "out")]
    assert widths[0] == widths[1]


def test_what_was_trained_and_saved_in_between(once: Path, dense: Path, prune: Prune, tmp_path: Path) -> None:
    """It has no report; how much of the dense model is gone stands in its config."""
    model = load(once)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(tmp_path / "tuned")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(once / name, tmp_path / "tuned")
    report = prune(tmp_path / "tuned", tmp_path / "out", 0.2)
    assert report["parents"] == []
    gone = load(dense).num_parameters() - load(tmp_path / "out").num_parameters()
    assert report["sparsity"]["of_dense"] == pytest.approx(gone / report["sparsity"]["dense_block_parameters"])
    assert "It had been pruned before: " in model_card(report)


def test_an_adapter_beside_the_weights_is_told(once: Path, prune: Prune, tmp_path: Path) -> None:
    model = copied(once, tmp_path / "model")
    (model / ADAPTER).write_text("{}")
    assert UNREAD in prune(model, tmp_path / "out", 0.1)["notes"]


def test_what_was_trained_in_place_says_so(once: Path, prune: Prune, tmp_path: Path) -> None:
    """The report beside the weights is of what they were before."""
    model = copied(once, tmp_path / "trained")
    assert not any("have changed since" in note for note in prune(model, tmp_path / "untrained", 0.1)["notes"])
    shard = min(model.glob("*.safetensors"))
    save_file({name: tensor + 0.001 for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    report = prune(model, tmp_path / "out", 0.1)
    assert (
        "the model's weights have changed since they were pruned, as by training: its report is of before"
        in report["notes"]
    )


def test_twice_to_the_same_widths_is_as_good_as_once(
    dense: Path, prune: Prune, tmp_path: Path, ids: torch.Tensor
) -> None:
    exact = {"allocation": "uniform", "attention": "heads", "target": "dense", "samples": 48}
    prune(dense, tmp_path / "half", 0.25, **exact)
    step = prune(tmp_path / "half", tmp_path / "twice", 1 / 3, **exact)
    straight = prune(dense, tmp_path / "once", 0.5, **exact)
    assert step["sparsity"]["of_dense"] == pytest.approx(straight["sparsity"]["achieved"], abs=0.01)
    for kept, other in zip(step["plan"]["kept"], straight["plan"]["kept"], strict=True):
        assert kept["heads"] == pytest.approx(other["heads"], abs=1)
        assert kept["neurons"] == pytest.approx(other["neurons"], abs=2)
    reference = logits(load(dense), ids)
    errors = [(logits(load(tmp_path / n), ids) - reference).square().mean().item() for n in ("twice", "once")]
    assert errors[0] < 1.25 * errors[1]


@pytest.mark.parametrize("first", ["blockwise", "stock"])
def test_results_of_other_formats(first: str, dense: Path, prune: Prune, tmp_path: Path, ids: torch.Tensor) -> None:
    prune(dense, tmp_path / "first", 0.2, format=first)
    report = prune(tmp_path / "first", tmp_path / "out", 0.2, format=first)
    assert report["sparsity"]["of_dense"] == pytest.approx(0.36, abs=0.02)
    assert [parent["name"] for parent in report["parents"]] == ["tiny"]
    assert report["model"]["custom_code"] is (first == "blockwise")
    assert torch.isfinite(logits(load(tmp_path / "out"), ids)).all()


def test_a_format_that_cannot_have_it(once: Path, shell: Shell) -> None:
    assert shell.refused(once, "--format", "stock").startswith("--format stock is for models whose blocks are alike")
    assert "has lost parts of heads" in shell.refused(once, "--format", "blockwise")


def test_beforehand(once: Path, shell: Shell) -> None:
    code, out, _ = shell.prune(once, "--dry-run", "--sparsity", "0.2")
    widths = json.loads((once / "config.json").read_text())["block_widths"]
    assert code == 0
    (shown,) = re.findall(rf"block   2/.* neurons (\d+)/{widths[1]['neurons']}", out)
    assert int(shown) == pytest.approx(0.8 * widths[1]["neurons"], abs=2)  # directions go by whole numbers, too
    assert f"parameters  {load(once).num_parameters():,} -> " in out


def test_speed_beside_the_parent_or_another(
    twice: tuple[Path, dict[str, Any]], dense: Path, once: Path, shell: Shell, tmp_path: Path
) -> None:
    output = copied(twice[0], tmp_path / "copy")
    short = ("--device", "cpu", "--prompt", "8", "--new", "2", "--runs", "1")
    sizes = {path: load(path).num_parameters() for path in (dense, once)}
    for against in (dense, once):
        code, out, err = shell.run("bench", output, "--against", against, *short)
        assert code == 0, err
        assert "pruned" in out
    known = json.loads((output / "report.json").read_text())["speed"]  # of what it was made of
    assert known["dense"]["weight_bytes"] == 4 * sizes[once]


def test_what_a_model_was_made_of_stays(twice: tuple[Path, Any], once: Path, dense: Path, shell: Shell) -> None:
    pair = find_pair(HealConfig(str(twice[0]), ("x",), 1))
    assert pair.ancestors == [once, dense]
    assert {once, dense, twice[0]} <= set(inputs_of(HealConfig(str(twice[0]), ("x",), 1), pair))
    assert "its model was made of; give another" in shell.refused(twice[0], "--output", once, "--overwrite")


def test_a_model_before_whose_report_is_damaged(twice: tuple[Path, Any], once: Path) -> None:
    report = (once / "report.json").read_bytes()
    (once / "report.json").write_bytes(report[:99])
    try:
        with pytest.raises(OptionError, match=r"damaged or truncated.*; give it with --teacher"):
            find_pair(HealConfig(str(twice[0]), ("x",), 1))
    finally:
        (once / "report.json").write_bytes(report)


def test_an_interrupted_run_goes_on(once: Path, prune: Prune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prune(once, tmp_path / "whole", 0.2, attention="dims")
    written, write = [], Journal.write

    def stop(self: Journal, name: str, record: dict[str, Any]) -> None:
        if name == "block-00001":
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, record)

    monkeypatch.setattr(Journal, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        prune(once, tmp_path / "out", 0.2, attention="dims")
    monkeypatch.undo()
    assert "block-00000" in written
    prune(once, tmp_path / "out", 0.2, attention="dims", resume=True)
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "whole")


def change_first(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda config: change(config["block_widths"][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config["block_widths"].pop(), f"block_widths in config.json has {BLOCKS - 1} entries for"),
        (lambda config: config.update(block_widths=3), "block_widths in config.json has no entries for 3 blocks"),
        (change_first(lambda block: block.pop("neurons")), "block_widths of block 0 in config.json is {"),
        (change_first(lambda block: block.update(values=3)), "expected heads, neurons, head_dim; is it the config"),
        (change_first(lambda block: block.update(heads=True)), "config.json has True heads, expected 1 to 4"),
        (change_first(lambda block: block.update(neurons=-1)), "config.json has -1 neurons, expected 0 to 64"),
        (change_first(lambda block: block.update(neurons=65)), "config.json has 65 neurons, expected 0 to 64"),
        (change_first(lambda block: block.update(neurons=3)), r"has shape \(.*\), but config.json implies \(3"),
    ],
)
def test_widths_that_are_none_of_these_weights(
    change: Callable[[dict[str, Any]], Any], message: str, once: Path, shell: Shell
) -> None:
    copy = shutil.copytree(once, shell.directory / "copy")
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))
    assert re.search(message, shell.refused(copy))


def test_tensors_that_are_not_of_these_widths(once: Path, shell: Shell) -> None:
    copy = shutil.copytree(once, shell.directory / "copy")
    file = next(copy.glob("model-00002-*.safetensors"))
    tensors = load_file(file)
    name, tensor = next(iter(tensors.items()))
    save_file(tensors | {name: tensor[:-1].clone()}, file, {"format": "pt"})
    assert "has shape" in shell.refused(copy)
