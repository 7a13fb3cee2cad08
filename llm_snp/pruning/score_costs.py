"""What directions or rotary pairs that go from between query and key cost the attention's output.

A softmax lies behind the scores, so that cannot be read off moments: it is measured, on a few windows at a few ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..core.heads import transform_rows
from ..core.linalg import tail_sums
from ..core.scores import FreeScores, RotaryPairs
from ..dense.skeleton import Call, run_block
from ..dense.stream import Stream
from ..dense.taps import Taps
from ..families import Attention, Site, linear
from ..system.processes import Processes

# Windows of so many tokens, and ranks that divide the head into so many parts; between these the cost follows the
# power of what goes.
SCORE_TOKENS = 4096
SCORE_PARTS = 4


@dataclass(frozen=True)
class Sample:
    """Windows to measure scores on: the first few of all processes, whatever their number and the device's batch.

    batches: hidden states (B, T, d) before the block, how many of their tokens belong to the sample, and the block's
    call, on this process; of: tokens of the sample in all processes together.
    """

    batches: list[tuple[Tensor, int, Call]]
    of: int

    @classmethod
    def of_stream(cls, stream: Stream, index: int) -> Sample:
        count, length = stream.windows.shape
        windows = min(count, max(1, SCORE_TOKENS // length))
        batches = []
        for rows, hidden, call in stream.batches(index):
            inside = windows - stream.first - rows.start
            if inside <= 0:
                break
            # On the CPU the batch is a view of the stream, which is about to move on.
            batches.append((hidden.clone(), min(inside, hidden.shape[0]) * length, call))
        return cls(batches, windows * length)


def score_costs(
    block: nn.Module,
    weight: Tensor,
    site: Site,
    attention: Attention,
    scores: FreeScores | RotaryPairs,
    g: Tensor | None,
    sample: Sample,
    processes: Processes,
) -> Tensor:
    """What keeping each number of them adds to the output error, (units+1,); all processes take part.

    weight (d, m): of the consumer; g: sensitivity (d, d) or None.
    """
    units = attention.score_units
    tail = tail_sums(scores.power)
    ranks = sorted({max(1, units * j // SCORE_PARTS) for j in range(1, SCORE_PARTS)})
    first = weight.new_zeros(len(ranks), weight.shape[0])
    second = weight.new_zeros(len(ranks))
    if sample.batches:
        reference = _consumer_input(block, site, sample)
        layers = {layer: linear(block, layer) for layer, _ in attention.projections.values()}
        dense = {name: (layer.weight, layer.bias) for name, layer in layers.items()}
        for j, rank in enumerate(ranks):
            for (name, rows), transform in zip(attention.projections.values(), scores.masked(rank), strict=True):
                _set_rows(layers[name], rows, transform)
            error = (_consumer_input(block, site, sample) - reference).double() @ weight.mT
            first[j] = error.sum(0)
            second[j] = (error * (error if g is None else error @ g)).sum()
            for name, layer in layers.items():
                layer.weight, layer.bias = dense[name]
    processes.sum(first)
    processes.sum(second)
    costs = second / sample.of
    if linear(block, site.consumer).bias is not None:  # which takes the mean error
        mean = first / sample.of
        costs -= (mean * (mean if g is None else mean @ g)).sum(1)
    per_power = costs.clamp_min(0.0) / tail[torch.tensor(ranks)].clamp_min(torch.finfo(tail.dtype).tiny)
    return tail * (_between(len(tail), ranks).to(per_power) @ per_power)


def _set_rows(layer: Any, rows: Tensor, transform: Tensor) -> None:
    """Transform the rows (h, w) of each head by (h, w, w) and leave the others."""
    flat = rows.flatten().to(layer.weight.device)
    bias = None if layer.bias is None else layer.bias[flat].double()
    turned, turned_bias = transform_rows(layer.weight[flat].double(), bias, transform)
    for name, value in (("weight", turned), ("bias", turned_bias)):
        if value is not None:
            changed = getattr(layer, name).clone()
            changed[flat] = value.to(changed.dtype)
            setattr(layer, name, nn.Parameter(changed, requires_grad=False))


@torch.no_grad()
def _consumer_input(block: nn.Module, site: Site, sample: Sample) -> Tensor:
    """What the consumer reads of the sample's tokens of this process, (tokens, m) float32."""
    found = []
    for hidden, tokens, call in sample.batches:
        with Taps(block, inputs=[site.consumer], stop=True) as taps:
            run_block(block, hidden, call)
        found.append(taps.input(site.consumer)[:tokens].float())
    return torch.cat(found)


def _between(count: int, ranks: list[int]) -> Tensor:
    """(count, len(ranks)): how to make a curve of values at `ranks`: linear between them, constant outside."""
    weights = torch.zeros(count, len(ranks), dtype=torch.float64)
    weights[: ranks[0] + 1, 0] = weights[ranks[-1] :, -1] = 1.0
    for i, (a, b) in enumerate(pairwise(ranks)):
        right = torch.arange(b - a + 1) / (b - a)
        weights[a : b + 1, i], weights[a : b + 1, i + 1] = 1.0 - right, right
    return weights
