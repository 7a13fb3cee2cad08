"""What the predictions lose without a layer: the KL divergence of the model without it from the model, measured.

Second-order losses, as the curves of units are, tell little of what is as large as a whole layer. So every layer is
left out once, on a few windows, and what becomes of the hidden states is followed to the end: all these branches
together in one sweep over the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.linalg import all_finite, strips
from ..dense.skeleton import HEAD_TOKENS, run_block
from ..dense.stream import Stream
from ..dense.taps import Taps
from ..errors import NumericalError
from ..families import ATTENTION, Site, first_attentions, linear
from .session import Session

# Windows of so many tokens; there are twice as many branches as blocks.
LEFT_OUT_TOKENS = 4096
NAME = "left-out"

# Block and site; where whole blocks go, half of what a block loses is each site's.
Losses = dict[tuple[int, str], float]


@torch.no_grad()
def losses_without(session: Session) -> Losses:
    """KL divergence in nats per token of the model's predictions without each site that may go.

    All processes take part. A site is left out as if it were gone: its bias keeps the mean of its output. Raises
    `NumericalError` where logits overflow without one.
    """
    skeleton, journal = session.skeleton, session.journal
    known = journal.read(NAME)
    if known is not None:
        session.progress.say("layers: measured by the interrupted run")
        return _losses(session, known["losses"])
    with session.progress.phase("measure", len(skeleton)) as step:
        left_out = LeftOut(session)
        for i, state in skeleton.block_states(range(len(skeleton))):
            left_out.block(i, skeleton.load_block(i, state), _able(session, i))
            step()
        found = left_out.divergences()
    journal.write(NAME, {"losses": found})
    return _losses(session, found)


class LeftOut:
    """The branches of one sweep over the blocks of a model: dense ones, or what has become of them.

    The windows are the first ones of `session`. Each block is given once, in order.
    """

    def __init__(self, session: Session):
        windows = min(session.tokens.shape[0], max(1, LEFT_OUT_TOKENS // session.tokens.shape[1]))
        self.session, self.stream = session, session.stream(windows)
        self.branches: list[Stream] = []
        self.keys: list[tuple[int, str]] = []
        self.left_out: list[str] = []  # of each branch, in words

    @torch.no_grad()
    def block(self, index: int, block: nn.Module, able: Sequence[Site | None]) -> None:
        """Move on through a block, and begin the branches without its sites `able`; None: without the block."""
        for branch in self.branches:
            branch.advance(index, block)
        means = _means(self.session, self.stream, index, block, [site for site in able if site is not None])
        for site in able:
            self.branches.append(self.stream.copy())
            self.left_out.append(f"block {index}" if site is None else f"the {site.name} of block {index}")
            if site is not None:
                self.keys.append((index, site.name))
                with _without(block, site, means[site.name]):
                    self.branches[-1].advance(index, block)
        self.stream.advance(index, block)

    @torch.no_grad()
    def divergences(self) -> list[float]:
        """KL divergence in nats per token of each branch, after the last block.

        Raises `NumericalError` naming what was left out where logits overflow without it.
        """
        divergence = _divergence(self.stream, self.branches)
        self.session.processes.sum(divergence)
        if not all_finite(divergence):
            first = self.left_out[int(divergence.isfinite().int().argmin())]
            raise NumericalError(
                f"without {first} the model's logits overflow the type they are computed in; use --dtype float32 or "
                "bfloat16"
            )
        return self.session.processes.from_main((divergence / self.stream.windows.numel()).tolist)

    def losses(self) -> Losses:
        """The same by block and site, where every branch is without a site."""
        return dict(zip(self.keys, self.divergences(), strict=True))


def _able(session: Session, index: int) -> list[Site | None]:
    """The sites of a block that may go; None for all of them together, where they go only so."""
    sites: list[Site | None] = [
        site for site in session.sites(index) if site.name != ATTENTION or index not in first_attentions(session.config)
    ]
    if session.options.whole_blocks:
        return [None] if len(sites) == len(session.sites(index)) else []
    return sites


def _losses(session: Session, found: list[float]) -> Losses:
    """By block and site what `losses_without` has measured in this order."""
    keys = [(i, site) for i in range(len(session.skeleton)) for site in _able(session, i)]
    losses: Losses = {}
    for (i, site), value in zip(keys, found, strict=True):
        sites = session.sites(i) if site is None else (site,)
        losses |= {(i, one.name): value / len(sites) for one in sites}
    return losses


def _means(session: Session, stream: Stream, index: int, block: nn.Module, sites: list[Site]) -> dict[str, Tensor]:
    """What the bias of each consumer would be if nothing else were left: the mean (d,) of its output, or zero."""
    found = {}
    for site in sites:
        layer = linear(block, site.consumer)
        total = torch.zeros(layer.out_features, dtype=torch.float64, device=session.skeleton.device)
        if layer.bias is not None:
            for _, hidden, call in stream.batches(index):
                with Taps(block, outputs=[site.consumer], stop=True) as taps:
                    run_block(block, hidden, call)
                total += taps.output(site.consumer).sum(0, dtype=torch.float64)
            session.processes.sum(total)
        found[site.name] = (total / stream.windows.numel()).to(layer.weight.dtype)
    return found


@contextmanager
def _without(block: nn.Module, site: Site, mean: Tensor) -> Iterator[None]:
    """The block as if nothing were left of a site but a bias, `mean` (d,)."""

    def gone(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return mean.expand_as(output).clone()

    hook = linear(block, site.consumer).register_forward_hook(gone)
    try:
        yield
    finally:
        hook.remove()


def _divergence(stream: Stream, branches: list[Stream]) -> Tensor:
    """(branches,) float64: the sum over this process's tokens of KL(model, model without); after the last block."""
    skeleton = stream.skeleton
    total = torch.zeros(len(branches), dtype=torch.float64, device=skeleton.device)
    with skeleton.outer_weights():
        for (rows, hidden), *others in zip(stream.parts(), *(branch.parts() for branch in branches), strict=True):
            for window, ids in enumerate(stream.tokens[rows]):
                for part in strips(ids.shape[0], HEAD_TOKENS):
                    expected = skeleton.leave(ids[None, part], hidden[None, window, part])[0].float().log_softmax(-1)
                    for j, (_, other) in enumerate(others):
                        found = skeleton.leave(ids[None, part], other[None, window, part])[0].float().log_softmax(-1)
                        total[j] += (expected.exp() * (expected - found)).sum(dtype=torch.float64)
    return total
