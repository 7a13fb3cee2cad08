"""What report, summary, card, page and plots say of `--method everything`."""

from __future__ import annotations

import json
from html import unescape
from pathlib import Path

import pytest
import torch
from conftest import Prune, load, logits

from llm_snp.documents.schema import fault
from llm_snp.documents.shareable import shareable
from llm_snp.documents.summary import summary

pytestmark = pytest.mark.documents


def test_every_document_knows_the_steps(prune: Prune, dense: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    output = tmp_path / "out"
    report = prune(dense, output, 0.35, method="everything", attention="heads", sensitivity="relative", samples=16)
    model = load(output)
    assert torch.isfinite(logits(model, ids)).all()
    assert model.num_parameters() == report["model"]["parameters_pruned"]
    assert report["sparsity"]["achieved"] == pytest.approx(0.35, abs=0.02)
    gone = load(dense).num_parameters() - model.num_parameters()
    assert sum(step[step["taken"]]["parameters"] for step in report["steps"]) == pytest.approx(gone, abs=65)
    assert fault(json.loads(json.dumps(shareable(report)))) == ""
    broken = json.loads(json.dumps(report))
    broken["steps"][0][broken["steps"][0]["taken"]] = None
    assert "which was no candidate" in fault(broken)
    last = report["steps"][-1]
    said = f"CKA of the hidden states with the dense model's {last[last['taken']]['to_dense']:.4f}"
    assert said in summary(report)
    card, page = (output / "README.md").read_text(), unescape((output / "report.html").read_text())
    layer = report["steps"][0]["layer"]
    for text in (card, page):
        assert said in text
        assert f"{layer['site']} of block {layer['block']}" in text
        assert f"{layer['to_parent']:.4f}" in text
        assert report["plan"]["why"] in text
    assert (output / "plots" / "steps.png").is_file()
    assert report["seconds"]["steps"] > 0
    assert "--method everything" in report["command"]
    assert "--structures" not in report["command"]
