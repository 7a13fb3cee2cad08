"""`--structures layers` and `both`: a whole run, its documents, and what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BLOCKS, Prune, Shell, load, logits, weight_files
from pruned_models import save_pruned

from llm_snp.documents.schema import fault
from llm_snp.documents.shareable import shareable
from llm_snp.system.journal import Journal

pytestmark = pytest.mark.documents


@pytest.fixture(scope="module")
def layers(dense: Path, held_out: Path, prune: Prune, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    output = tmp_path_factory.mktemp("layers") / "out"
    return output, prune(dense, output, 0.5, structures="layers", evaluate=(str(held_out),))


def test_the_documents_know_it(layers: tuple[Path, dict[str, Any]], dense: Path, ids: torch.Tensor) -> None:
    output, report = layers
    kept = report["plan"]["kept"]
    assert kept[0]["heads"] == 4
    gone = sum(left == 0 for block in kept for left in block.values())
    assert gone
    assert report["plan"]["why"].startswith("layers go as a whole, those without which least is lost per parameter: ")
    model = load(output)
    assert model.num_parameters() == report["model"]["parameters_pruned"]
    assert report["sparsity"]["of_all_parameters"] == pytest.approx(
        1 - model.num_parameters() / load(dense).num_parameters()
    )
    assert fault(json.loads(json.dumps(shareable(report)))) == ""
    card, page = (output / "README.md").read_text(), (output / "report.html").read_text()
    assert "0 of 4 heads" in card or "0 of 64 neurons" in card
    assert "vllm serve" not in card
    assert report["plan"]["why"] in page
    assert {path.stem for path in (output / "plots").iterdir()} >= {"kept", "curves", "errors"}
    for block, left in zip(report["blocks"], kept, strict=True):
        for site in ("attention", "mlp"):
            assert block[site]["kept"] == left[block[site]["unit"]]
            assert (block[site]["lost"] is None) is (set(left.values()) == {0})
    assert torch.isfinite(logits(model, ids)).all()


def test_what_a_layer_loses_is_its_energy(layers: tuple[Path, dict[str, Any]]) -> None:
    """But for the mean: its bias takes that, and what the stream has lost before."""
    _, report = layers
    lone = [
        site
        for block, left in zip(report["blocks"], report["plan"]["kept"], strict=True)
        if set(left.values()) != {0}
        for site in block.values()
        if isinstance(site, dict) and site["kept"] == 0
    ]
    assert lone
    assert all(0.5 * site["total"] < site["lost"] < 2 * site["total"] for site in lone)


def test_both_is_no_worse_by_the_plan(dense: Path, prune: Prune, tmp_path: Path) -> None:
    lost = {}
    for structures in ("units", "layers", "both"):
        report = prune(dense, tmp_path / structures, 0.4, structures=structures, attention="heads")
        curves, kept = report["plan"]["curves"], report["plan"]["kept"]
        assert report["sparsity"]["achieved"] == pytest.approx(0.4, abs=0.09 if structures == "layers" else 0.01)
        at = (dict(zip(curve["at_kept"], curve["loss"], strict=True)) for curve in curves)
        left = (kept[curve["block"]][curve["unit"]] for curve in curves)
        if structures != "layers":
            lost[structures] = sum(
                min(values.items(), key=lambda item: abs(item[0] - count))[1]
                for values, count in zip(at, left, strict=True)
            )
    assert lost["both"] <= 1.1 * lost["units"]


def test_an_interrupted_run_goes_on(dense: Path, prune: Prune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"structures": "layers", "format": "stock", "sparsity": 1 / 3}
    whole = prune(dense, tmp_path / "whole", **options)
    write = Journal.write
    last = max(i for i, kept in enumerate(whole["plan"]["kept"]) if set(kept.values()) != {0})

    def stop(self: Journal, name: str, record: dict[str, Any]) -> None:
        if name == f"block-{last:05d}":
            raise KeyboardInterrupt
        write(self, name, record)

    monkeypatch.setattr(Journal, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        prune(dense, tmp_path / "out", **options)
    monkeypatch.undo()
    prune(dense, tmp_path / "out", **options, resume=True)
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "whole")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == BLOCKS - 1
    assert "It is a checkpoint of the stock class" in (tmp_path / "out" / "README.md").read_text()


def test_beforehand(dense: Path, shell: Shell) -> None:
    code, out, _ = shell.prune(dense, "--dry-run", "--sparsity", "0.4", "--structures", "layers")
    assert code == 0
    assert "heads 0/4" in out or "neurons 0/64" in out
    assert "is decided by a measuring pass" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sparsity", "0.9"), "--sparsity 0.9 would need layers that have to stay: but for the first attention"),
        (("--sparsity", "0.7", "--format", "stock"), "at most 0.666 can be removed from this model as whole blocks"),
        (("--method", "snp"), "--structures layers and --allocation variance exclude each other: which layers go"),
        (("--format", "stock", "--attention", "none"), "takes whole blocks with this --format, and --attention none"),
    ],
)
def test_what_cannot_be(flags: tuple[str, ...], message: str, dense: Path, shell: Shell) -> None:
    assert message in shell.refused(dense, "--structures", "layers", *flags)


def test_both_in_a_format_that_is_alike(dense: Path, shell: Shell) -> None:
    assert "--structures both and --format stock exclude" in shell.refused(
        dense, "--structures", "both", "--format", "stock"
    )


def test_a_model_of_one_block(shell: Shell, dense: Path) -> None:
    model = shell.directory / "one"
    save_pruned("llama", [{}], model, num_hidden_layers=1)
    message = shell.refused(model, "--structures", "layers", "--sparsity", "0.9")
    assert "would need layers that have to stay" in message


def test_llama_cpp_is_told(shell: Shell) -> None:
    model = shell.directory / "gone"
    save_pruned("llama", [{}, {"heads": 0}, {}], model)
    code, _, err = shell.run("export", model, "--gguf", "out.gguf")
    assert code == 2
    assert "has lost attention or MLP layers as a whole" in err
