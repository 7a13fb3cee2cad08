"""What a run will need, from the config alone: for `--dry-run`, and to refuse early what cannot fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .config import PruneConfig
from .families import Family, linear
from .sensitivity import gradient_windows
from .stream import BATCH_TOKENS

FLOAT64 = 8
# Square float64 matrices of the largest site that are alive at once: greedy elimination holds covariance, inverse,
# energy, and a compacted copy of two; the other orders hold fewer.
SQUARE_MATRICES = {"greedy": 6, "zca": 6}
SQUARE_MATRICES_OTHER = 5


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of a run, without the interpreter and its libraries (about 0.6 GB of host memory)."""

    device: int
    host: int
    disk: int


def estimate(
    model: Any,
    family: Family,
    config: Any,
    options: PruneConfig,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    kept_share: float,
) -> Estimate:
    """Estimate peaks. model: on meta; length: tokens per window; kept_share: of all parameters, for the disk."""
    sites = family.sites(config)
    blocks = model.get_submodule(family.blocks)
    size = dtype.itemsize
    per_block = sum(p.numel() for p in blocks[0].parameters())
    outer = sum(p.numel() for p in model.parameters()) - per_block * len(blocks)
    widest = max(site.units * site.group for site in sites)
    d = linear(blocks[0], sites[-1].consumer).out_features
    matrices = SQUARE_MATRICES.get(options.order or "", SQUARE_MATRICES_OTHER)
    solve = FLOAT64 * (matrices * widest**2 + 4 * d * widest)
    batch = max(BATCH_TOKENS.get(device.type, 4096), length)
    activations = size * batch * (8 * d + 3 * widest) + 4 * batch * widest
    live_blocks = 2 if options.target in ("dense", "residual") or options.attention != "heads" else 1
    logits = 4 * length * model.get_input_embeddings().weight.shape[0] * 2
    on_device = size * (outer + live_blocks * per_block) + max(solve + activations, logits)
    hidden = size * options.samples * length * d
    streams = 2.0 if options.target in ("dense", "residual") else 1.0
    if options.needs_gradient:
        share = gradient_windows(options.samples, len(blocks)) / options.samples
        streams = max(streams, share * (len(blocks) + 2))
    on_host = int(streams * hidden) + 2 * 4 * per_block
    if device.type == "cpu":
        on_host, on_device = on_host + on_device, 0
    return Estimate(on_device, on_host, int(2 * kept_share * sum(p.numel() for p in model.parameters())))
