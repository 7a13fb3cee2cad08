"""What a run will need, from the config alone: memory, disk and floating-point operations, for `--dry-run`.

`benchmarks/memory.py` holds these figures against measured ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil
from typing import Any

import torch

from ..config import PruneConfig
from ..core.linalg import working_dtype
from ..core.routing import PART_BYTES
from ..dense.skeleton import HEAD_TOKENS
from ..dense.storage import stays_on
from ..dense.stream import WAITING, windows_at_once
from ..families import ATTENTION, EXPERTS, WHOLE, Attention, Family, Site, linear, parameters_of
from ..pruning.experts import tokens_looked_at
from ..pruning.kinds import sites_of
from ..pruning.layers import layer_curves
from ..pruning.left_out import LEFT_OUT_TOKENS
from ..pruning.sensitivity import gradient_passes, gradient_windows, inputs_kept

FLOAT64 = 8
# Fisher matrices lie on disk in float32.
FLOAT32 = 4
# Square matrices of the largest site in its working type that are alive at once, beside one float64 factor: the
# covariance, and for `greedy` what it is working on.
WORKING_MATRICES = {"greedy": 2, "zca": 4}
# Logits of a part of a window and what the loss and the drawing of labels make of them.
LOGIT_COPIES = 6
# Copies of the products of experts' outputs, while those of all batches are put together; and of their parts.
ROUTING_COPIES, ROUTING_PARTS = 2, 4
# Fused kernels aside, activations of the hidden width that are alive within a block.
HIDDEN_COPIES = 8
# Of an eigendecomposition, in m³.
EIGENDECOMPOSITION = 9.0
# Of ranking all units by elimination, in m³: rank-3 updates of what is left, and the copies that compaction makes.
ELIMINATION = 1.3


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of a run without the interpreter and its libraries (about 0.5 GB of host memory), and work.

    disk: the result, what --resume needs while the run goes on, and, if asked for, the offloaded hidden states.
    operations: floating-point operations by phase, a multiplication and an addition as two; without evaluation.
    """

    device: int
    host: int
    disk: int
    operations: dict[str, float]


@dataclass(frozen=True)
class _Sizes:
    """tokens: of the calibration; length: of a window; block: linear parameters that work on a token; until: those that
    have run when a site's consumer has; hidden: width of the stream; scores: entries of the moments of query and key;
    passes: how often all blocks are pruned, as shares of the calibration; picked: experts that work on a token, 1 where
    there are none.
    """

    sites: tuple[Site, ...]
    outputs: dict[str, int]
    blocks: int
    block: int
    until: dict[str, int]
    tokens: int
    length: int
    hidden: int
    scores: int
    passes: float
    picked: int = 1


def fisher_bytes(options: PruneConfig, widths: Iterable[int], blocks: int) -> int:
    """What the Fisher matrices of a run take on disk; widths: of the outputs of a block's sites."""
    measured = options.needs_gradient and options.sensitivity == "fisher"
    return FLOAT32 * blocks * sum(width**2 for width in widths) if measured else 0


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
    """Estimate peaks and work. model: on meta; length: tokens per window; kept_share: of all parameters."""
    blocks = model.get_submodule(family.blocks)
    size, stored = dtype.itemsize, 2
    sizes_of = [sum(p.numel() for p in block.parameters()) for block in blocks]
    # The largest, which stands for all: in a pruned model they differ.
    index = max(range(len(blocks)), key=sizes_of.__getitem__)
    block, per_block = blocks[index], sizes_of[index]
    sites = sites_of(family, config, options, index)
    total = sum(p.numel() for p in model.parameters())
    outer = total - sum(sizes_of)
    outputs = {site.name: linear(block, site.consumer).out_features for site in sites}
    # Moments are collected of all experts of a block at once, and solved for one after the other.
    widest = max(sites, key=lambda site: site.columns * len(site.members))
    experts, picked = len(widest.members), getattr(config, family.mixture.picked) if family.mixture else 1
    m, d = widest.columns, outputs[widest.name]
    working = working_dtype(m).itemsize
    follows_dense = options.target in ("dense", "residual")

    batch = windows_at_once(device, length) * length
    activations = size * batch * (HIDDEN_COPIES * d + 2 * m * picked) + FLOAT32 * batch * m
    moments = experts * working * (m * m + (d * m if follows_dense else 0))
    live_blocks = 2 if follows_dense or options.directions else 1
    measuring = live_blocks * per_block * size + moments + activations
    matrices = WORKING_MATRICES.get(options.order or "", 1)
    solving = per_block * size + moments + max(matrices * working * m * m, FLOAT64 * m * m) + 4 * FLOAT64 * d * m
    vocabulary = model.get_input_embeddings().weight.shape[0]
    heading = outer * size + LOGIT_COPIES * FLOAT32 * min(HEAD_TOKENS, length) * vocabulary
    on_device = max(measuring, solving, heading)
    if widest.experts and options.whole_experts:
        products = ROUTING_COPIES * FLOAT32 * tokens_looked_at(experts, options.samples * length) * experts**2
        on_device = max(on_device, live_blocks * per_block * size + products + ROUTING_PARTS * PART_BYTES)

    hidden = size * options.samples * length * d
    states = ceil(streams_of(options, length, len(blocks), len(sites)) * hidden)
    staying = device.type == "cuda" and not options.offload and stays_on(device, hidden)
    if device.type == "cuda":
        on_device += states if staying else WAITING * size * batch * d
    on_host = 3 * stored * per_block + (0 if options.offload or staying else states)
    on_disk = int(stored * kept_share * total) + (states if options.offload else 0)
    on_disk += fisher_bytes(options, outputs.values(), len(blocks))
    if device.type == "cpu":
        on_host, on_device = on_host + on_device, 0
    sizes = _Sizes(
        sites,
        outputs,
        len(blocks),
        family.linear_parameters(block, config) - sum(_idle(block, site, picked) for site in sites),
        _run_until(block, family.sites(config, index), picked),
        options.samples * length,
        length,
        d,
        _score_moments(family.attention(config, index)),
        passes(family, config, blocks, options),
        picked,
    )
    return Estimate(on_device, on_host, on_disk, operations(sizes, options))


def streams_of(options: PruneConfig, length: int, blocks: int, sites: int) -> float:
    """How often a run has the hidden states of all calibration windows at once, at its peak; sites: of a block."""
    streams = 2.0 if options.target in ("dense", "residual") else 1.0
    if options.needs_gradient:
        share = gradient_windows(options.samples, blocks) / options.samples
        streams = max(streams, share * (inputs_kept(blocks) + 1))
    if options.in_steps:  # of the first model, of a parent and of two candidates; and the branches without each layer
        streams += 4 * options.held_out / options.samples
        streams += blocks * sites * min(LEFT_OUT_TOKENS, options.held_out * length) / (options.samples * length)
    return streams


def passes(family: Family, config: Any, blocks: Sequence[torch.nn.Module], options: PruneConfig) -> float:
    """How often all blocks are pruned: once, and for every candidate of `--method everything`, the dense one first.

    Steps are as large as the layers on average. Candidates are fitted to the windows that are not held out.
    """
    if not options.sparsity:
        return 0.0
    if not options.in_steps:
        return 1.0
    sizes = [layer.gone(0) for layer in layer_curves(family, config, blocks, options, {})]
    base = sum(family.linear_parameters(block, config) for block in blocks)
    steps = ceil(options.sparsity * base * len(sizes) / sum(sizes))
    return 1.0 + (1 - options.held_out / options.samples) * 2 * steps


def _run_until(block: torch.nn.Module, sites: tuple[Site, ...], picked: int) -> dict[str, int]:
    """Linear parameters of a block that have run on a token when each site's consumer has; `sites` in the order of the
    forward.
    """
    of = [parameters_of(block, site) - _idle(block, site, picked) for site in sites]
    return dict(zip((site.name for site in sites), accumulate(of), strict=True))


def _idle(block: torch.nn.Module, site: Site, picked: int) -> int:
    """Parameters of a site that do not work on a token: those of the experts that are not picked."""
    return parameters_of(block, site) * (site.experts - picked) // site.experts if site.experts else 0


def _score_moments(attention: Attention | None) -> int:
    if attention is None or attention.scores == WHOLE:
        return 0
    return int(attention.heads * (attention.queries + 1) * attention.head_dim**2)


def operations(sizes: _Sizes, options: PruneConfig) -> dict[str, float]:
    """Floating-point operations of each phase, as `core.stopwatch` names them."""
    follows_dense = options.target in ("dense", "residual")
    dims = options.directions
    # Attention counts every pair of positions: that is what a kernel without a causal shortcut computes.
    scores = 4.0 * sizes.length * sizes.hidden
    once = sizes.tokens * (2.0 * sizes.block + scores)
    measures = options.measures and options.structures != "layers"  # which are measured on a few windows only
    forward = once * measures
    pruned = sizes.passes
    if options.sparsity > 0:
        forward += pruned * once * (1 - 1 / sizes.blocks)  # on to the next block, if there is one
        for site in sizes.sites:
            # A pass for the moments of a site ends in front of its consumer, or behind it if outputs are compared.
            behind = sizes.tokens * (2.0 * sizes.until[site.name] + scores)
            before = behind - 2.0 * sizes.tokens * sizes.outputs[site.name] * _working(site, sizes)
            narrowed = dims and site.name == ATTENTION
            if follows_dense:  # the dense block goes through whole at the last site
                forward += pruned * (behind + (once if site is sizes.sites[-1] else behind) + narrowed * before)
            else:
                forward += pruned * (2 * behind + before if narrowed else before)
    found = {"forward": forward, "backward": 0.0, "moments": 0.0, "order": 0.0, "subspace": 0.0, "repair": 0.0}
    if options.needs_gradient:
        share = gradient_windows(options.samples, sizes.blocks) * sizes.length / sizes.tokens
        found["forward"] += gradient_passes(sizes.blocks) * share * once
        found["backward"] += share * once  # to the inputs only: the weights need no gradient
        if options.sensitivity == "fisher":
            found["moments"] += 2 * share * sizes.tokens * sum(d * d for d in sizes.outputs.values())
    for site in sizes.sites:
        m, d = float(site.columns), float(sizes.outputs[site.name])
        experts, tokens = len(site.members), sizes.tokens * _working(site, sizes) / m  # of all experts together
        by_direction = site.name == ATTENTION and dims
        if site.experts and options.whole_experts:
            looked_at = tokens_looked_at(site.experts, sizes.tokens)
            each = 6 * d * m + 2 * d * (site.experts + options.needs_gradient * d)  # run it, and multiply what it gives
            until = sizes.until[site.name] - 3 * d * _working(site, sizes)  # a pass ends in front of the experts
            found["forward"] += (measures + pruned) * sizes.tokens * (2 * until + scores)
            found["order"] += (measures + pruned) * looked_at * site.experts * each
        by_neuron = site.unit != EXPERTS
        collected = measures * by_neuron + pruned * (1 + by_direction)
        found["moments"] += collected * tokens * m * m
        found["moments"] += follows_dense * pruned * 2 * tokens * d * m
        if by_direction:
            found["moments"] += (measures + pruned) * 2 * sizes.tokens * sizes.scores
        order = {
            "greedy": m**3 + 2 * d * m * m + ELIMINATION * m**3,
            "zca": (EIGENDECOMPOSITION + 2) * m**3,
            "loo": m**3,
            "leverage": m**3,
        }.get(options.order or "", d * m)
        measured = float(measures * by_neuron)
        found["order"] += experts * (measured + pruned * (by_neuron and not by_direction)) * order
        found["subspace"] += experts * ((measured + pruned * by_neuron) * m**3 / 3 + measured * 2 * d * m * m)
        k = (1 - options.sparsity) * m
        fold = 2 * d * (m - k) * k + d * k * k
        refit = (m**3 / 3 + 2 * d * m * m) if follows_dense else 0.0
        found["repair"] += experts * pruned * (fold + refit + 4 * d * m * m)
    return {name: value * sizes.blocks for name, value in found.items()}


def _working(site: Site, sizes: _Sizes) -> int:
    """Columns of a site's consumers that work on a token."""
    return site.columns * (sizes.picked if site.experts else 1)
