"""Whole experts of a block: which go, what that loses, and the tensors of those that are left.

When an expert goes its row of the router goes with it, and the router chooses among the others. Which one that is, and
what it costs, is known of the products of all experts' outputs, token by token (`core.routing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.linalg import all_finite, strips
from ..core.routing import PART_BYTES, Removal, Routing, remove
from ..core.stopwatch import timed
from ..dense.skeleton import run_block
from ..dense.stream import Stream
from ..dense.taps import Taps
from ..errors import NumericalError
from ..families import Site
from .session import Session
from .weights import State

# Of so many tokens, evenly spread over the text, all experts are run and the products of their outputs held, or of as
# many as fit: 4 E² bytes each, which are 8192 tokens of 128 experts.
ROUTING_TOKENS, ROUTING_BYTES = 1 << 15, 1 << 29


def tokens_between(experts: int, tokens: int) -> int:
    """Every how-manieth of so many calibration tokens is looked at."""
    return ceil(tokens / max(1, min(ROUTING_TOKENS, ROUTING_BYTES // (4 * experts**2))))


def tokens_looked_at(experts: int, tokens: int) -> int:
    """Of so many calibration tokens."""
    return tokens // tokens_between(experts, tokens)


@torch.no_grad()
def removal_of(
    session: Session, index: int, block: nn.Module, stream: Stream, site: Site, sensitivity: Tensor | None
) -> Removal:
    """In which order the experts of a live block go, and what is lost of its output, as `sensitivity` G weighs it.

    All processes take part, each with its tokens of the stream. Raises `NumericalError` if outputs overflow.
    """
    mixture = session.family.mixture
    assert mixture is not None
    assert site.holder is not None
    assert site.router is not None
    order = session.options.order
    router: Any = block.get_submodule(site.router)
    experts: Any = block.get_submodule(site.holder)
    step, parts = tokens_between(site.experts, stream.windows.numel()), []
    for _, hidden, call in stream.batches(index):
        with Taps(block, [site.holder], stop=True) as taps:
            run_block(block, hidden, call)
        x = taps.input(site.holder)[::step]
        for rows in strips(len(x), max(1, PART_BYTES // (4 * site.experts * x.shape[1]))):
            with timed("order"):
                every = x.new_ones(len(x[rows]), 1)
                outputs = torch.stack([expert(x[rows], every) for expert in experts])
                logits = F.linear(x[rows], router.weight)
                parts.append(Routing.of(logits, outputs, sensitivity, site.picked, mixture.divides(session.config)))
    generator = torch.Generator().manual_seed(session.options.seed + 1_000_003 * index)
    assert order is not None
    with timed("order"):
        found = remove(Routing.cat(parts), session.processes.sum, order, generator)
    if not all_finite(found.loss):
        raise NumericalError(
            f"outputs of the experts at {site.holder} of block {index} overflow the type they are computed in; "
            "use --dtype float32 or bfloat16"
        )
    return session.processes.from_main(lambda: found)


def with_experts(state: State, site: Site, left: Sequence[int]) -> State:
    """The tensors of a block with the experts `left` only, ascending, which are numbered anew, as are their rows of the
    router.
    """
    new = {name: tensor for name, tensor in state.items() if not name.startswith(f"{site.holder}.")}
    for number, expert in enumerate(left):
        prefix = f"{site.holder}.{expert}."
        own = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
        new |= {f"{site.holder}.{number}.{name.removeprefix(prefix)}": tensor for name, tensor in own.items()}
    rows = f"{site.router}.weight"
    new[rows] = state[rows][list(left)].contiguous()
    return new
