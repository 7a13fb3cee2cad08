"""Calibrate: run the windows through a block and collect the moments that ordering and repairing need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor, nn

from ..config import HELD_OUT
from ..core.moments import Moments
from ..dense.experts import routes
from ..dense.skeleton import Call, run_block
from ..dense.stream import Stream
from ..dense.taps import Taps
from ..errors import NumericalError
from ..families import PAIRS, Attention, Site, linear, turn


@dataclass(frozen=True)
class SiteMoments:
    """Moments of a consumer's input on the fitting windows, and on those held out for `--damping auto`."""

    fit: Moments
    held: Moments | None = None

    @property
    def all(self) -> Moments:
        return self.fit if self.held is None else self.fit.merge(self.held)


@dataclass(frozen=True)
class Reference:
    """The dense block that a repair refits to.

    stream       hidden states of the dense model; None: the dense block reads the pruned stream (target self)
    residual     whether the difference of the residual streams counts as well (target residual)
    advance      whether the reference's stream moves on to the next block in the same pass
    """

    block: nn.Module
    stream: Stream | None
    residual: bool = False
    advance: bool = False


@torch.no_grad()
def calibrate_site(
    index: int, block: nn.Module, stream: Stream, site: Site, reference: Reference | None, hold_out: bool
) -> list[SiteMoments]:
    """Moments of what the consumers of a site's members read in block `index`, with the repair's target from
    `reference` if there is one.

    The residual is r = reference output - present output, plus the difference of the residual streams at the site; an
    expert is to correct as much of it as the router has it say of the token. Raises `NumericalError` naming the layer
    if activations overflow.
    """
    centred = linear(block, site.consumer).bias is not None
    fits: list[Moments] = []
    helds: list[Moments | None] = []
    dense: Iterable[Tensor | None] = repeat(None)
    if reference is not None and reference.stream is not None:
        dense = (hidden for _, hidden in reference.stream.parts())
    for (rows, hidden, call), other in zip(stream.batches(index), dense, strict=False):
        tokens = hidden.shape[0] * hidden.shape[1]
        out = _held_out(stream, rows).repeat_interleave(hidden.shape[1]) if hold_out else None
        for number, (x, residual, at) in enumerate(_read(block, site, rows, hidden, other, call, reference)):
            if number == len(fits):
                fits.append(Moments.like(x, residual, centred=centred, routed=at is not None))
                stream.processes.same(fits[-1].shift)
                helds.append(fits[-1].empty() if hold_out else None)
            held = helds[number]
            if out is None or held is None:
                fits[number].add(x, residual, tokens)
                continue
            for part, choice in ((fits[number], ~out), (held, out)):
                if choice.any():  # on the host, where it is known
                    own = choice if at is None else choice[at.cpu()]
                    here = own.nonzero().squeeze(1).to(x.device)
                    part.add(x[here], None if residual is None else residual[here], int(choice.sum()))
    del x, residual, at, hidden, other, dense  # solving follows, and needs the memory
    for member, fit, held in zip(site.members, fits, helds, strict=True):
        for moments in (fit, held):
            if moments is not None:
                moments.reduce(stream.processes.sum)
        check_finite(fit, index, member.consumer)
    return [SiteMoments(fit, held) for fit, held in zip(fits, helds, strict=True)]


def _held_out(stream: Stream, rows: slice) -> Tensor:
    """Which of the windows `rows` of this process are held out for `--damping auto`; on the host."""
    windows = stream.first + torch.arange(rows.start, rows.stop)
    return (windows % HELD_OUT == HELD_OUT - 1) | (windows == stream.windows.shape[0] - 1)


def _read(
    block: nn.Module,
    site: Site,
    rows: slice,
    hidden: Tensor,
    other: Tensor | None,
    call: Call,
    reference: Reference | None,
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """For each member what its consumer reads in a batch (n, m), the residual (n, d) if there is a reference, and of
    which tokens (n,) that is; None: of all.

    hidden (B, T, d): what the block reads; other: what the reference reads, None for the same.
    """
    wanted = [member.consumer for member in site.members]
    if site.holder is not None:
        wanted.append(site.holder)
    streams = []
    if reference is not None and reference.residual:
        assert site.stream is not None
        streams.append(site.stream)
    outputs = [] if reference is None else [site.joined]
    with Taps(block, wanted + streams, outputs, stop=True) as taps:
        run_block(block, hidden, call)
    residual = None
    if reference is not None:
        advanced = reference.stream if reference.advance else None
        with Taps(reference.block, streams, outputs, stop=advanced is None) as dense:
            output = run_block(reference.block, hidden if other is None else other, call)
        residual = dense.output(site.joined).float() - taps.output(site.joined).float()
        for name in streams:
            residual += dense.input(name).float() - taps.input(name).float()
        if advanced is not None:  # last: what the taps hold may be a view of what is overwritten
            advanced.put(rows, output)
    if site.holder is None:
        yield taps.input(site.consumer), residual, None
        return
    _, picked, weights = taps.arguments[site.holder]
    shares = weights / weights.sum(-1, keepdim=True)
    for member, (tokens, places) in zip(site.members, routes(picked, site.experts), strict=True):
        own = None if residual is None else residual[tokens] * shares[tokens, places, None].float()
        yield taps.input(member.consumer), own, tokens


@torch.no_grad()
def calibrate_block(
    index: int,
    block: nn.Module,
    stream: Stream,
    sites: tuple[Site, ...],
    attention: Attention | None = None,
    advance: bool = False,
) -> dict[str, Moments]:
    """Moments of the inputs of all consumers of the members of `sites`, by the members' names, in one pass.

    With `attention` also those of `query` and `key`, grouped by head, if they can lose directions; as the scores see
    them, turned by position. With `advance` the stream moves on to the next block. Raises `NumericalError` if
    activations overflow.
    """
    found: dict[str, Moments] = {}
    if not sites:  # an earlier pruning has left nothing that may go
        if advance:
            stream.advance(index, block)
        return found
    members = [member for site in sites for member in site.members]
    layers = {member.name: member.consumer for member in members}
    projections = {} if attention is None else attention.projections
    layers |= {name: layer for name, (layer, _) in projections.items()}
    outputs = {layer for layer, _ in projections.values()}
    for rows, hidden, call in stream.batches(index):
        with Taps(block, [member.consumer for member in members], outputs, stop=not advance) as taps:
            output = run_block(block, hidden, call)
        for member in members:
            x = taps.input(member.consumer)
            if member.name not in found:
                centred = linear(block, member.consumer).bias is not None
                found[member.name] = Moments.like(x, centred=centred, routed=member.expert is not None)
                stream.processes.same(found[member.name].shift)
            found[member.name].add(x, tokens=hidden.shape[0] * hidden.shape[1])
        for name, (layer, heads) in projections.items():
            x = taps.output(layer)
            if heads.numel() < x.shape[1]:  # one layer for several of them
                x = x[:, heads.flatten().to(x.device)]
            assert attention is not None
            if attention.scores == PAIRS:
                table = getattr(block.get_submodule(attention.module), "pair_table", None)
                x = _turned(x, len(heads), hidden.shape[1], call, table)
            if name not in found:
                found[name] = Moments.like(x, groups=len(heads))
                stream.processes.same(found[name].shift)
            found[name].add(x)
        if advance:
            stream.put(rows, output)
            del output
    del taps, x  # solving follows, and needs the memory
    for name, moments in found.items():
        moments.reduce(stream.processes.sum)
        check_finite(moments, index, layers[name])
    return found


def _turned(x: Tensor, heads: int, length: int, call: Call, left: Tensor | None) -> Tensor:
    """Queries or keys (n, heads · w) of windows of `length` tokens, turned by position as the block does.

    left (key/value heads, pairs) long: the pairs that an earlier pruning has left; None: all.
    """
    cos, sin = (table[..., : table.shape[-1] // 2].unsqueeze(2) for table in call.kwargs["position_embeddings"])
    if left is not None:
        left = left.repeat_interleave(heads // len(left), 0)
        cos, sin = (table[:, :, 0, left] for table in (cos, sin))  # (B, T, heads, pairs left)
    return turn(x.view(-1, length, heads, x.shape[1] // heads), cos, sin).flatten(2).flatten(0, 1)


def check_finite(moments: Moments, index: int, name: str) -> None:
    """Raise `NumericalError` naming the layer whose activations are infinite or NaN."""
    if not moments.finite:
        raise NumericalError(
            f"activations at {name} of block {index} overflow the type they are computed in; "
            "use --dtype float32 or bfloat16"
        )
