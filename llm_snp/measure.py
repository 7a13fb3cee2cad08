"""The measuring pass: one sweep over the dense model gives every site's exact loss and variance curve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate import block_moments
from .config import PruneConfig
from .core import heads as head_space
from .core.allocation import SiteCurve
from .core.moments import Moments
from .core.repair import subspace_of_units
from .core.subspace import Subspace
from .families import ATTENTION, Attention, Site, linear
from .plan import dims_curve
from .processes import Processes
from .prune_site import linear_weights, value_subspace
from .sensitivity import read_sensitivity
from .session import Session
from .skeleton import Call, run_block
from .stream import Stream, Taps

# The cost of truncated scores cannot be read off moments (a softmax lies behind them): it is measured on windows of
# so many tokens, at the ranks that divide the head into so many parts; between them it follows the tail of the squared
# singular values.
SCORE_TOKENS = 4096
SCORE_PARTS = 4


@dataclass(frozen=True)
class _Sample:
    """Windows to measure scores on: the first few of all processes, whatever their number and the device's batch.

    batches: hidden states (B, T, d) before the block, how many of their tokens belong to the sample, and the block's
    call, on this process; of: tokens of the sample in all processes together.
    """

    batches: list[tuple[Tensor, int, Call]]
    of: int

    @classmethod
    def of_stream(cls, stream: Stream, index: int) -> _Sample:
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


def measured_curves(session: Session, curves: list[SiteCurve]) -> list[SiteCurve]:
    """`curves` with their variance and loss filled in, block by block over the dense model.

    `both` gets the cheaper of heads and dims for each block, compared at the share of parameters asked for. With
    several processes the wide sites of as many blocks are solved at once, one by each. What the journal has of an
    interrupted run is not measured again.
    """
    skeleton, options, processes = session.skeleton, session.options, session.processes
    sites = session.sites
    attention = session.family.attention(session.config) if options.directions else None
    by_site = {(curve.block, curve.site): curve for curve in curves}
    known = _measured_before(session)
    missing = [i for i in range(len(skeleton)) if i not in known]
    if not missing:
        session.progress.say("curves: measured by the interrupted run")
        return [curve for i in range(len(skeleton)) for curve in known[i]]
    upto = missing[-1] + 1
    with session.progress.phase("measure", upto) as step:
        stream = session.stream()
        mine: list[SiteCurve] = []
        waiting: list[Callable[[], SiteCurve]] = []
        group: list[int] = []
        for i, state in skeleton.block_states(range(upto)):
            block = skeleton.load_block(i, state)
            if i in known:
                stream.advance(i, block)
                step()
                continue
            sample = None if attention is None else _Sample.of_stream(stream, i)
            moments = block_moments(i, block, stream, sites, attention, advance=True)
            sensitivity = read_sensitivity(session, i)
            group.append(i)
            for site in sites:
                curve, g = by_site[i, site.name], sensitivity.get(site.name)
                weight, _ = linear_weights(state, site.consumer, skeleton.device)
                if site.name != ATTENTION:
                    if processes.index == len(group) - 1:
                        waiting.append(partial(_unit_curve, curve, weight, site, moments[site.name], options, g))
                    continue
                costs = None
                if sample is not None and attention is not None:
                    costs = _score_costs(block, weight, site, attention, moments, options, g, sample, processes)
                if processes.main:
                    choices = []
                    if curve.unit != "dims":
                        choices.append(_unit_curve(curve, weight, site, moments[site.name], options, g))
                    if costs is not None and attention is not None:
                        dims = curve if curve.unit == "dims" else dims_curve(curve, attention, options)
                        values = moments[site.name].covariance
                        choices.append(_dims_curve(dims, weight, attention, values, options, g, costs))
                    mine.append(_better(choices, options.sparsity))
            del moments, block, sensitivity, sample
            if len(group) == processes.count or i + 1 == upto:
                while waiting:
                    mine.append(waiting.pop()())
                for curve in processes.gather(mine):
                    by_site[curve.block, curve.site] = curve
                for done in group:
                    known[done] = [by_site[done, site.name] for site in sites]
                    session.journal.write(_name(done), {"curves": [_to_json(curve) for curve in known[done]]})
                mine, group = [], []
            step()
    return [curve for i in range(len(skeleton)) for curve in known[i]]


def _measured_before(session: Session) -> dict[int, list[SiteCurve]]:
    """Block -> its curves, for the blocks whose curves an interrupted run left in the journal."""
    found = {}
    for i in range(len(session.skeleton)):
        record = session.journal.read(_name(i))
        if record is not None:
            found[i] = [_from_json(entry) for entry in record["curves"]]
    return found


def _name(index: int) -> str:
    return f"curves-{index:05d}"


def _to_json(curve: SiteCurve) -> dict[str, Any]:
    """JSON keeps every bit of a float64."""
    assert curve.variance is not None
    assert curve.loss is not None
    return vars(curve) | {"variance": curve.variance.tolist(), "loss": curve.loss.tolist()}


def _from_json(entry: dict[str, Any]) -> SiteCurve:
    values = {name: torch.tensor(entry[name], dtype=torch.float64) for name in ("variance", "loss")}
    return SiteCurve(**(entry | values))


def _better(choices: list[SiteCurve], share: float) -> SiteCurve:
    """Of heads and dims, those that lose less where a share of the site goes; only one of them may be able to."""
    able = [curve for curve in choices if curve.removable >= share * curve.units * curve.cost]
    if not able:
        return max(choices, key=lambda curve: curve.removable)
    return min(able, key=lambda curve: _loss_at_share(curve, share))


def _loss_at_share(curve: SiteCurve, share: float) -> float:
    """Loss of removing a share of the site's parameters, between kept counts by linear interpolation."""
    assert curve.loss is not None
    kept = (1.0 - share) * curve.units
    low = int(kept)
    values = curve.loss.tolist()
    return values[low] + (kept - low) * (values[min(low + 1, curve.units)] - values[low])


def _with_curves(curve: SiteCurve, subspace: Subspace, extra: Tensor | None, options: PruneConfig) -> SiteCurve:
    """Fill in the curves; a relative loss is a share of the site's output energy."""
    loss = subspace.loss_curve
    total = loss[0].clone()
    if extra is not None:
        loss = loss + extra
    if options.sensitivity == "relative" or not options.needs_gradient:
        loss = loss / total.clamp_min(torch.finfo(loss.dtype).tiny)
    return replace(curve, variance=subspace.variance_curve.cpu(), loss=loss.cpu())


def _unit_curve(
    curve: SiteCurve, weight: Tensor, site: Site, moments: Moments, options: PruneConfig, g: Tensor | None
) -> SiteCurve:
    assert options.order is not None
    keep = max(1, round(site.units * (1 - options.sparsity)))
    seed = torch.Generator().manual_seed(options.seed)
    subspace = subspace_of_units(
        moments,
        weight,
        options.order,
        site.group,
        options.curve_damping,
        g,
        keep,
        site.nonnegative,
        seed,
        options.sensitive_order,
    )
    return _with_curves(curve, subspace, None, options)


def _dims_curve(
    curve: SiteCurve,
    weight: Tensor,
    attention: Attention,
    covariance: Tensor,
    options: PruneConfig,
    g: Tensor | None,
    score_costs: Tensor,
) -> SiteCurve:
    """Value path: exact, from the subspace of directions. Scores: measured, see `_score_costs`."""
    damping = options.curve_damping
    _, _, subspace = value_subspace(covariance, weight, attention.heads, damping, g, options.sensitive_order)
    return _with_curves(curve, subspace, score_costs, options)


def _score_costs(
    block: nn.Module,
    weight: Tensor,
    site: Site,
    attention: Attention,
    moments: dict[str, Moments],
    options: PruneConfig,
    g: Tensor | None,
    sample: _Sample,
    processes: Processes,
) -> Tensor:
    """What truncating the scores to each rank adds to the output error, (w+1,); all processes take part."""
    w = attention.head_dim
    query, key, power = head_space.score_basis(
        moments[attention.query].uncentred, moments[attention.key].covariance, options.curve_damping
    )
    tail = torch.cat([power.sum(0), power.new_zeros(1)]).flip(0).cumsum(0).flip(0)
    ranks = sorted({max(1, w * j // SCORE_PARTS) for j in range(1, SCORE_PARTS)})
    first = weight.new_zeros(len(ranks), weight.shape[0])
    second = weight.new_zeros(len(ranks))
    if sample.batches:
        reference = _consumer_input(block, site, sample)
        projections = [linear(block, name) for name in (attention.query, attention.key)]
        dense = [(layer.weight, layer.bias) for layer in projections]
        for j, rank in enumerate(ranks):
            for layer, saved, transform in zip(projections, dense, (query, key), strict=True):
                _set_rows(layer, saved, transform, rank)
            error = (_consumer_input(block, site, sample) - reference).double() @ weight.mT
            first[j] = error.sum(0)
            second[j] = (error * (error if g is None else error @ g)).sum()
        for layer, saved in zip(projections, dense, strict=True):
            layer.weight, layer.bias = saved
    processes.sum(first)
    processes.sum(second)
    # The mean error is no loss: the bias takes it.
    mean = first / sample.of
    costs = second / sample.of - (mean * (mean if g is None else mean @ g)).sum(1)
    per_power = torch.zeros_like(tail)
    for rank, cost in zip(ranks, costs.clamp_min(0.0), strict=True):
        per_power[rank] = cost / tail[rank].clamp_min(torch.finfo(tail.dtype).tiny)
    return tail * _between(per_power, ranks)


def _set_rows(layer: Any, saved: tuple[Tensor, Tensor | None], transform: Tensor, rank: int) -> None:
    """Load the first `rank` transformed rows of every head, zeros below: same shape, truncated scores."""
    truncated = transform.clone()
    truncated[:, rank:] = 0.0
    weight, bias = saved
    rows, row_bias = head_space.transform_rows(weight.double(), None if bias is None else bias.double(), truncated)
    layer.weight = nn.Parameter(rows.to(weight.dtype), requires_grad=False)
    if bias is not None and row_bias is not None:
        layer.bias = nn.Parameter(row_bias.to(bias.dtype), requires_grad=False)


@torch.no_grad()
def _consumer_input(block: nn.Module, site: Site, sample: _Sample) -> Tensor:
    """What the consumer reads of the sample's tokens of this process, (tokens, m) float32."""
    found = []
    for hidden, tokens, call in sample.batches:
        with Taps(block, inputs=[site.consumer]) as taps:
            run_block(block, hidden, call)
        found.append(taps.input(site.consumer)[:tokens].float())
    return torch.cat(found)


def _between(values: Tensor, ranks: list[int]) -> Tensor:
    """values (w+1,) known at `ranks`: linear between them, constant outside."""
    filled = values.clone()
    filled[: ranks[0]] = values[ranks[0]]
    filled[ranks[-1] :] = values[ranks[-1]]
    for a, b in pairwise(ranks):
        for r in range(a + 1, b):
            filled[r] = values[a] + (values[b] - values[a]) * (r - a) / (b - a)
    return filled
