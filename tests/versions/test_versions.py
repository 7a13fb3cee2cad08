"""What another version of transformers has written is the same here. `make test-oldest` looks at it both ways."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Prune, Shell
from tiny_models import KNOWN
from transformers import AutoConfig
from write_models import FORMATS, OPTIONS, computed

from llm_snp.documents.writing import read_report
from llm_snp.families import FAMILIES

WRITTEN = os.environ.get("LLM_SNP_WRITTEN")  # the folder that `write_models.py` was given, with the other version
pytestmark = [pytest.mark.cpu, pytest.mark.skipif(WRITTEN is None, reason="needs what another version has written")]
FOLDER = Path(WRITTEN or ".")
# Transformers before 4.53 lets all layers of the last one slide.
NAMES = [name for name in KNOWN if (FOLDER / name).is_dir() and name != "qwen2-partly-sliding"]


@pytest.fixture(params=NAMES)
def place(request: pytest.FixtureRequest) -> Path:
    return FOLDER / request.param


def perplexities(report: dict[str, Any]) -> list[float]:
    return [both[which]["perplexity"] for both in report["evaluation"].values() for which in ("dense", "pruned")]


def test_most_families_are_in_both_versions() -> None:
    assert len(NAMES) > 20


@pytest.mark.parametrize("kind", FORMATS)
def test_a_result_computes_the_same(place: Path, kind: str) -> None:
    """Positions, head and widths."""
    found = torch.load(place / "logits.pt")
    torch.testing.assert_close(computed(place / kind, found["ids"]), found[kind], rtol=1e-4, atol=1e-5)


def test_a_model_is_pruned_to_the_same(place: Path, prune: Prune, tmp_path: Path) -> None:
    text = str(FOLDER / "text.txt")
    report = prune(place / "dense", tmp_path / "out", FORMATS["auto"], calibration=text, evaluate=(text,), **OPTIONS)
    assert perplexities(report) == pytest.approx(perplexities(read_report(place / "auto")), rel=1e-4)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_result_is_pruned_again_and_timed(place: Path, kind: str, shell: Shell) -> None:
    code, _, err = shell.prune(place / kind, "--sparsity", "0.1")
    assert code == 0, err
    short = ("--device", "cpu", "--prompt", "8", "--new", "4", "--runs", "1")
    code, _, err = shell.run("bench", "out", "--against", place / "dense", *short)
    assert code == 0, err


@pytest.mark.parametrize("kind", FORMATS)
def test_a_result_is_healed(place: Path, kind: str, shell: Shell) -> None:
    if FAMILIES[AutoConfig.from_pretrained(place / "dense").model_type].mixture:
        pytest.skip("mixtures of experts are not healed")
    short = ("--tokens", "8192", "--batch", "8", "--learning-rate", "1e-3", "--device", "cpu", "--quiet")
    asked = ("--text", FOLDER / "text.txt", "--teacher", place / "dense", "--output", "healed", *short)
    code, _, err = shell.run("heal", place / kind, *asked)
    assert code == 0, err
    [measured] = read_report(Path("healed"))["healing"][0]["evaluation"].values()
    assert [measured["teacher"], measured["before"]] == pytest.approx(perplexities(read_report(place / kind)), rel=1e-4)
