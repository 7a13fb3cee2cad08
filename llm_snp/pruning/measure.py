"""The measuring pass: one sweep over the dense model gives every site's exact loss and variance curve.

For each block: calibrate, order, advance. What is allocated over the curves is `plan`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PruneConfig
from ..core.allocation import SiteCurve
from ..core.linalg import all_finite, tail_sums
from ..core.moments import Moments
from ..core.scores import FreeScores, RotaryPairs
from ..dense.stream import Stream
from ..errors import NumericalError
from ..families import ATTENTION, EXPERTS, MLP, SCORES, SHARED, WHOLE, Attention, Site
from .calibrate import calibrate_block
from .experts import removal_of
from .kinds import cheapest_kind
from .order import damping_of, order_scores, order_units, order_values
from .plan import direction_curves, due_of_attentions, unit_curve
from .score_costs import Sample, score_costs
from .sensitivity import read_sensitivity
from .session import Session
from .weights import State, linear_weights

# A block's curves in this order.
SITES = (ATTENTION, SCORES, SHARED, EXPERTS, MLP)


def measured_curves(session: Session) -> list[SiteCurve]:
    """The curves of every site with their variance and loss, block by block over the dense model.

    With several processes the wide sites of as many blocks are ordered at once, one by each. What the journal has of an
    interrupted run is not measured again.
    """
    skeleton, processes, blocks = session.skeleton, session.processes, len(session.skeleton)
    known = _measured_before(session)
    missing = [i for i in range(blocks) if i not in known]
    if not missing:
        session.progress.say("curves: measured by the interrupted run")
        return [curve for i in range(blocks) for curve in known[i]]
    upto = missing[-1] + 1
    due = due_of_attentions(session.family, session.config, skeleton.blocks, session.options)
    with session.progress.phase("measure", upto) as step:
        stream = session.stream()
        mine: list[SiteCurve] = []
        waiting: list[Callable[[], SiteCurve]] = []
        together: list[int] = []
        for i, state in skeleton.block_states(range(upto)):
            block = skeleton.load_block(i, state)
            if i in known:
                stream.advance(i, block)
                step()
                continue
            seen = _calibrate(session, i, block, state, stream)
            mine += [seen.experts] if seen.experts and processes.main else []
            for site in session.sites(i):
                if site.name == ATTENTION:
                    mine += _order_attention(session, seen, site, due[i])
                elif site.unit != EXPERTS and processes.index == len(together):
                    waiting.append(_order_later(session, seen, site))
            together.append(i)
            del seen, block
            if len(together) == processes.count or i + 1 == upto:
                while waiting:
                    mine.append(waiting.pop()())
                measured = sorted(processes.gather(mine), key=lambda curve: SITES.index(curve.site))
                for done in together:
                    known[done] = [curve for curve in measured if curve.block == done]
                    session.journal.write(_name(done), {"curves": [_to_json(curve) for curve in known[done]]})
                mine, together = [], []
            step()
    return [curve for i in range(blocks) for curve in known[i]]


@dataclass(frozen=True)
class _Seen:
    """A dense block when the windows have gone through it: what its sites are ordered by.

    state: its tensors; moments: by site, and of `query` and `key`; sensitivity: G by site, empty if it is not needed;
    sample: what the block read in a few windows, where directions between query and key can go; experts: the curve of
    whole experts, where they can go.
    """

    index: int
    block: nn.Module
    state: State
    moments: dict[str, Moments]
    sensitivity: dict[str, Tensor]
    sample: Sample | None
    experts: SiteCurve | None


def _calibrate(session: Session, index: int, block: nn.Module, state: State, stream: Stream) -> _Seen:
    """Collect the moments of a block; the stream advances in the same pass."""
    attention = _attention(session, index)
    sample = None if attention is None or attention.scores == WHOLE else Sample.of_stream(stream, index)
    sensitivity, experts = read_sensitivity(session, index), None
    sites = [site for site in session.sites(index) if site.unit != EXPERTS]
    for site in session.sites(index):
        if site.experts and session.options.whole_experts:
            experts = _expert_curve(session, index, block, stream, site.by_expert, sensitivity.get(site.name))
    moments = calibrate_block(index, block, stream, tuple(sites), attention, advance=True)
    return _Seen(index, block, state, moments, sensitivity, sample, experts)


def _expert_curve(
    session: Session, index: int, block: nn.Module, stream: Stream, site: Site, g: Tensor | None
) -> SiteCurve:
    """The loss of keeping so many whole experts, on every process."""
    dense, options = session.skeleton.blocks[index], session.options
    empty = unit_curve(session.family, session.config, index, dense, site, options)
    if options.experts == "both":  # neurons are the site's units
        empty = replace(empty, site=EXPERTS)
    found = removal_of(session, index, block, stream, site, g)
    return _with_curves(empty, found.variance, found.loss, found.loss[0], options)


def _attention(session: Session, index: int) -> Attention | None:
    """Where the parts of a block's heads are, if directions inside them may go."""
    return session.family.attention(session.config, index) if session.options.directions else None


def _order_attention(session: Session, seen: _Seen, site: Site, due: float) -> list[SiteCurve]:
    """Curves of what can go of an attention, on the main process: of the cheapest kind, where there are several.

    due: parameters that it must be able to give. Raises `NumericalError` where scores overflow.
    """
    options, processes, family = session.options, session.processes, session.family
    attention, g = _attention(session, seen.index), seen.sensitivity.get(site.name)
    dense = session.skeleton.blocks[seen.index]
    weight, _ = linear_weights(seen.state, site.consumer, session.skeleton.device)
    scores, costs = None, None
    if seen.sample is not None and attention is not None:
        scores = order_scores(attention, seen.moments, options.curve_damping)
        costs = score_costs(seen.block, weight, site, attention, scores, g, seen.sample, processes)
        if not all_finite(costs):
            raise NumericalError(
                f"with fewer directions between query and key the attention of block {seen.index} overflows the type "
                "it is computed in; use --dtype float32 or bfloat16"
            )
    if not processes.main:
        return []
    choices = []
    for kind in _whole_units(session, seen.index, site):
        empty, parts = unit_curve(family, session.config, seen.index, dense, kind, options), kind.part_of(seen.state)
        choices.append([_unit_curve(empty, [_Member(kind, weight, seen.moments[site.name], parts)], options, g)])
    if attention is not None:
        whole = direction_curves(family, seen.index, dense, site, attention, options)
        values = seen.moments[site.name].covariance
        choices.append(_direction_curves(whole, weight, attention, values, options, g, scores, costs))
    return cheapest_kind(choices, options.sparsity, due)


def _order_later(session: Session, seen: _Seen, site: Site) -> Callable[[], SiteCurve]:
    """What orders the units of a wide site, when as many blocks are seen as there are processes."""
    dense = session.skeleton.blocks[seen.index]
    empty = unit_curve(session.family, session.config, seen.index, dense, site, session.options)
    members = []  # and nothing else of the block is kept
    for member in site.members:
        weight, _ = linear_weights(seen.state, member.consumer, session.skeleton.device)
        members.append(_Member(member, weight, seen.moments[member.name], member.part_of(seen.state)))
    return partial(_unit_curve, empty, members, session.options, seen.sensitivity.get(site.name))


def _whole_units(session: Session, index: int, site: Site) -> list[Site]:
    """What can go of an attention `site` as a whole: its heads, single query heads, or either."""
    if session.options.attention == "dims" and _attention(session, index) is not None:
        return []
    queries = session.family.queries(session.config, index) if session.options.attention == "both" else None
    return [site] if queries is None or site.unit == queries.unit else [site, queries]


@dataclass(frozen=True)
class _Member:
    """A site with one consumer, its weight (d, m), the moments of what it reads, and see `Site.part_of`."""

    site: Site
    weight: Tensor
    moments: Moments
    parts: Tensor


def _unit_curve(curve: SiteCurve, members: Sequence[_Member], options: PruneConfig, g: Tensor | None) -> SiteCurve:
    """The loss of keeping as many units of each member; an expert that saw no token loses nothing that is known."""
    keep = max(1, round(curve.units * (1 - options.sparsity)))
    variance, loss = torch.zeros(2, curve.units + 1, dtype=torch.float64)
    for member in members:
        if not member.moments.rows:
            continue
        seed = torch.Generator().manual_seed(options.seed)
        damping = damping_of(member.site, member.moments, options.curve_damping)
        subspace = order_units(
            member.moments, member.weight, member.site, options, damping, keep, seed, g, member.parts
        )
        variance = variance + tail_sums(subspace.variance).cpu()
        loss = loss + subspace.loss_curve.cpu()
    variance = variance / variance[0].clamp_min(torch.finfo(variance.dtype).tiny)
    return _with_curves(curve, variance, loss, loss[0], options)


def _direction_curves(
    curves: list[SiteCurve],
    weight: Tensor,
    attention: Attention,
    covariance: Tensor,
    options: PruneConfig,
    g: Tensor | None,
    scores: FreeScores | RotaryPairs | None,
    score_costs: Tensor | None,
) -> list[SiteCurve]:
    """Value path: exact, from the subspace of directions. Scores: measured, see `score_costs`."""
    damping = options.curve_damping
    _, _, subspace = order_values(covariance, weight, attention, damping, g, options.sensitive_order)
    value, total = subspace.loss_curve, subspace.loss_curve[0]
    found = []
    for curve in curves:
        if curve.unit == "pairs":
            assert scores is not None
            assert score_costs is not None
            # Power is a query's variance times a key's; its root is what the variances of other sites compare with.
            variance = tail_sums(scores.power.sqrt())
            variance /= variance[0].clamp_min(torch.finfo(variance.dtype).tiny)
            found.append(_with_curves(curve, variance, score_costs, total, options))
            continue
        loss = value if curve.unit == "values" or score_costs is None else value + score_costs
        found.append(_with_curves(curve, subspace.variance_curve, loss, total, options))
    return found


def _with_curves(curve: SiteCurve, variance: Tensor, loss: Tensor, total: Tensor, options: PruneConfig) -> SiteCurve:
    """Fill in the curves (units+1,); a relative loss is a share of the site's output energy, `total`."""
    if options.sensitivity == "relative" or not options.needs_gradient:
        loss, total = (value / total.clamp_min(torch.finfo(loss.dtype).tiny) for value in (loss, total))
    return replace(curve, variance=variance.cpu(), loss=loss.cpu(), total=total.item())


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
    only = entry["only"] and tuple(entry["only"])
    return SiteCurve(**(entry | values | {"only": only}))
