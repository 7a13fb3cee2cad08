"""`--method everything`: a whole run, going on with it, and what cannot be; what is said of it: test_steps_told.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Prune, Shell, load, logits, weight_files
from pruned_models import save_pruned

from llm_snp.documents.summary import summary
from llm_snp.system.journal import Journal

CHEAP: dict[str, Any] = {"method": "everything", "attention": "heads", "sensitivity": "relative", "samples": 16}


@pytest.fixture(scope="module")
def whole(dense: Path, prune: Prune, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("everything") / "out"
    return output, prune(dense, output, 0.35, **CHEAP)


def test_an_interrupted_run_goes_on_at_the_step(
    whole: tuple[Path, dict[str, Any]], dense: Path, prune: Prune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, made = Journal.write, []

    def stop(self: Journal, name: str, record: dict[str, Any]) -> None:
        if name == "step-00001":
            raise KeyboardInterrupt
        write(self, name, record)

    monkeypatch.setattr(Journal, "write", stop)
    with pytest.raises(
        KeyboardInterrupt, match=r"interrupted; 1 step is decided and kept in .*out\.partial; go on with"
    ):
        prune(dense, tmp_path / "out", 0.35, **CHEAP)

    def note(self: Journal, name: str, record: dict[str, Any]) -> None:
        made.append(name)
        write(self, name, record)

    monkeypatch.setattr(Journal, "write", note)
    report = prune(dense, tmp_path / "out", 0.35, **CHEAP, resume=True)
    assert next(name for name in made if name.startswith("step")) == "step-00001"
    assert report["steps"] == whole[1]["steps"]
    assert weight_files(tmp_path / "out") == weight_files(whole[0])


def test_a_result_is_a_base(prune: Prune, tmp_path: Path, ids: torch.Tensor) -> None:
    """Whose blocks have lost layers and directions already."""
    kept = [{"values": 3, "pairs": 1, "neurons": 40}, {"heads": 0, "neurons": 30}, {"heads": 2, "neurons": 0}]
    save_pruned("llama", kept, tmp_path / "once")
    report = prune(tmp_path / "once", tmp_path / "out", 0.3, **(CHEAP | {"attention": "both"}))
    assert report["sparsity"]["achieved"] == pytest.approx(0.3, abs=0.02)
    assert "with the model's before" in summary(report)
    assert torch.isfinite(logits(load(tmp_path / "out"), ids)).all()


def test_a_model_of_one_block(prune: Prune, tmp_path: Path) -> None:
    """Its attention stays, its MLP may go."""
    save_pruned("llama", [{}], tmp_path / "one", num_hidden_layers=1)
    report = prune(tmp_path / "one", tmp_path / "out", 0.65, **CHEAP)
    assert report["steps"]
    assert {step["layer"]["site"] for step in report["steps"] if step["layer"]} <= {"mlp"}
    assert report["plan"]["kept"][0]["heads"]


def test_beforehand(dense: Path, shell: Shell) -> None:
    code, out, _ = shell.prune(dense, "--dry-run", "--sparsity", "0.4", "--method", "everything")
    assert code == 0
    assert "which layers and units go is decided step by step; shown is the uniform plan" in out
    work = {}
    for method in ("best", "everything"):
        code, out, _ = shell.prune(dense, "--dry-run", "--sparsity", "0.4", "--method", method)
        line = next(line for line in out.splitlines() if line.startswith("work"))
        work[method] = float(line.split()[1])
    assert 3 * work["best"] < work["everything"] < 20 * work["best"]


def test_nothing_to_remove(dense: Path, prune: Prune, tmp_path: Path, ids: torch.Tensor) -> None:
    report = prune(dense, tmp_path / "out", 0.0, **CHEAP)
    assert "steps" not in report
    assert torch.equal(logits(load(tmp_path / "out"), ids), logits(load(dense), ids))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--structures", "units"),
            "--method everything and --structures units exclude each other: it is about",
        ),
        (("--structures", "layers"), "--method everything and --structures layers exclude each other"),
        (("--format", "stock"), "--method everything and --format stock exclude each other"),
        (("--format", "blockwise"), "or give --method best --structures layers"),
        (("--allocation", "uniform"), "--method everything and --allocation uniform exclude each other: which layers"),
        (("--samples", "1"), "--method everything holds out part of the windows; give --samples of at least 2"),
        (("--samples", "2", "--damping", "auto"), "--damping auto holds out part of the windows; give --samples of at"),
        (("--sparsity", "0.99"), "--sparsity 0.99 would leave a block empty; with one unit left everywhere at most 0."),
    ],
)
def test_what_cannot_be(flags: tuple[str, ...], message: str, dense: Path, shell: Shell) -> None:
    assert message in shell.refused(dense, "--method", "everything", *flags)
