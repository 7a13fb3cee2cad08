"""The measuring pass: one sweep over the dense model gives every site's exact loss and variance curve."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..config import PruneConfig
from ..core.allocation import SiteCurve
from ..core.linalg import tail_sums
from ..core.moments import Moments
from ..core.repair import subspace_of_units
from ..core.scores import FreeScores, RotaryPairs
from ..families import ATTENTION, MLP, SCORES, WHOLE, Attention, Site
from .calibrate import block_moments
from .plan import direction_curves, unit_curve
from .prune_heads import score_directions, value_subspace
from .prune_site import linear_weights
from .score_costs import Sample, score_costs
from .sensitivity import read_sensitivity
from .session import Session

# A block's curves in this order.
SITES = (ATTENTION, SCORES, MLP)


def measured_curves(session: Session) -> list[SiteCurve]:
    """The curves of every site with their variance and loss, block by block over the dense model.

    `both` gets the cheapest of what can go of each block's attention (`_better`). With several processes the wide sites
    of as many blocks are solved at once, one by each. What the journal has of an interrupted run is not measured again.
    """
    skeleton, options, processes = session.skeleton, session.options, session.processes
    family, sites = session.family, session.sites
    attention = family.attention(session.config) if options.directions else None
    kinds = _whole_units(session)
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
            sample = None if attention is None or attention.scores == WHOLE else Sample.of_stream(stream, i)
            moments = block_moments(i, block, stream, sites, attention, advance=True)
            sensitivity = read_sensitivity(session, i)
            group.append(i)
            for site in sites:
                g = sensitivity.get(site.name)
                weight, _ = linear_weights(state, site.consumer, skeleton.device)
                if site.name != ATTENTION:
                    empty = unit_curve(family, i, skeleton.blocks[i], site, options)
                    if processes.index == len(group) - 1:
                        waiting.append(partial(_unit_curve, empty, weight, site, moments[site.name], options, g))
                    continue
                scores, costs = None, None
                if sample is not None and attention is not None:
                    scores = score_directions(attention, moments, options.curve_damping)
                    costs = score_costs(block, weight, site, attention, scores, g, sample, processes)
                if processes.main:
                    choices = []
                    for kind in kinds:
                        empty = unit_curve(family, i, skeleton.blocks[i], kind, options)
                        choices.append([_unit_curve(empty, weight, kind, moments[site.name], options, g)])
                    if attention is not None:
                        whole = direction_curves(family, i, skeleton.blocks[i], site, attention, options)
                        values = moments[site.name].covariance
                        choices.append(_direction_curves(whole, weight, attention, values, options, g, scores, costs))
                    mine += _better(choices, options.sparsity)
            del moments, block, sensitivity, sample
            if len(group) == processes.count or i + 1 == upto:
                while waiting:
                    mine.append(waiting.pop()())
                measured = sorted(processes.gather(mine), key=lambda curve: SITES.index(curve.site))
                for done in group:
                    known[done] = [curve for curve in measured if curve.block == done]
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


def _whole_units(session: Session) -> list[Site]:
    """What can go of an attention as a whole: its heads, single query heads, or either."""
    heads = [site for site in session.sites if site.name == ATTENTION and session.options.attention != "dims"]
    queries = session.family.queries(session.config) if session.options.attention == "both" else None
    return heads if queries is None else [*heads, queries]


def _better(choices: list[list[SiteCurve]], share: float) -> list[SiteCurve]:
    """Of heads, query heads and directions those that lose least where a share of the attention's parameters goes.

    Some of them may be unable; where all are, the one that gives most.
    """
    amount = share * max(sum(curve.units * curve.cost for curve in curves) for curves in choices)
    able = [curves for curves in choices if sum(curve.removable for curve in curves) >= amount]
    if not able:
        return max(choices, key=lambda curves: sum(curve.removable for curve in curves))
    return min(able, key=lambda curves: _loss_of(curves, amount)) if len(able) > 1 else able[0]


def _loss_of(curves: list[SiteCurve], amount: float) -> float:
    """The least loss of removing so many parameters from `curves`, from the last of them to a fraction of a unit."""
    *others, last = curves
    least = math.inf
    for kept in product(*(range(1, curve.units + 1) for curve in others)):
        gone = sum((curve.units - count) * curve.cost for curve, count in zip(others, kept, strict=True))
        count = last.units - (amount - gone) / last.cost
        if count < last.least - 1e-6:  # but for rounding
            continue
        loss = sum(_loss_at(curve, k) for curve, k in zip(curves, (*kept, min(count, last.units)), strict=True))
        least = min(least, loss)
    return least


def _loss_at(curve: SiteCurve, kept: float) -> float:
    """Between kept counts by linear interpolation."""
    assert curve.loss is not None
    low = int(kept)
    at = [curve.loss[k].item() for k in (low, min(low + 1, curve.units))]
    return at[0] + (kept - low) * (at[1] - at[0])


def _with_curves(curve: SiteCurve, variance: Tensor, loss: Tensor, total: Tensor, options: PruneConfig) -> SiteCurve:
    """Fill in the curves (units+1,); a relative loss is a share of the site's output energy, `total`."""
    if options.sensitivity == "relative" or not options.needs_gradient:
        loss = loss / total.clamp_min(torch.finfo(loss.dtype).tiny)
    return replace(curve, variance=variance.cpu(), loss=loss.cpu())


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
        parts=site.parts,
    )
    return _with_curves(curve, subspace.variance_curve, subspace.loss_curve, subspace.loss_curve[0], options)


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
    _, _, subspace = value_subspace(covariance, weight, attention, damping, g, options.sensitive_order)
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
