"""Weights that would not fit into their type cost no run: that layer gets more damping, and the report says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import Prune, load, save, tiny_opt


def test_weights_near_the_end_of_float16_are_repaired_with_more_damping(prune: Prune, tmp_path: Path) -> None:
    """The last block's MLP computes what it did, with a matrix that fills its type: hardly any repair fits."""
    model = tiny_opt()
    layer: Any = model.model.decoder.layers[-1]
    with torch.no_grad():
        scale = 60000 / layer.fc2.weight.abs().max()
        layer.fc2.weight.mul_(scale)
        layer.fc1.weight.div_(scale)
        layer.fc1.bias.div_(scale)
    directory = save(model.half(), tmp_path / "dense")
    report = prune(directory, tmp_path / "out", 0.7, damping=1e-6, dtype="float16")
    dampings = [block["mlp"]["damping"] for block in report["blocks"]]
    assert dampings[-1] > 10 * max(dampings[:-1])
    said = "moments were singular, or weights too large for their type; damping raised from 1e-06 to"
    assert any(f"block {len(dampings) - 1} mlp: {said}" in note for note in report["notes"])
    written = load(tmp_path / "out").state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in written.values())
