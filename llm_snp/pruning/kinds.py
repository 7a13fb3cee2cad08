"""What goes of a block's attention: whole heads, single query heads, or directions inside all heads; and of its
experts: some of them, and neurons of the others.

`--attention both` compares the former by their loss curves, each where the same number of parameters is gone.
`--experts both` takes the latter together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from ..config import PruneConfig
from ..core.allocation import SiteCurve, allocate, allocate_alike, allocate_loss
from ..errors import OptionError
from ..families import EXPERTS, MLP, Family, Site

# Of the plans that take one expert more than the one before so many are looked at, evenly spread.
PLANS = 256


def sites_of(family: Family, config: Any, options: PruneConfig, index: int) -> tuple[Site, ...]:
    """What is pruned of a block, in this order; `options`: resolved."""
    return family.prunable(config, options.attention, index, options.experts)


def cheapest_kind(choices: list[list[SiteCurve]], share: float, due: float = 0.0) -> list[SiteCurve]:
    """Of heads, query heads and directions those that lose least where a share of the attention's parameters goes, or
    as many as are `due` (`plan.due_of_attentions`) where that is more.

    Some of them may be unable; where all are, the one that gives most.
    """
    amount = max(due, share * max(sum(curve.units * curve.cost for curve in curves) for curves in choices))
    able = [curves for curves in choices if sum(curve.removable for curve in curves) >= amount]
    if not able:
        return max(choices, key=lambda curves: sum(curve.removable for curve in curves))
    return min(able, key=lambda curves: least_loss(curves, amount)) if len(able) > 1 else able[0]


def least_loss(curves: list[SiteCurve], amount: float) -> float:
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


def allocate_mixed(
    curves: Sequence[SiteCurve], budget: float, alike: bool = False
) -> tuple[list[SiteCurve], list[int]]:
    """Whole experts, and units of what is left: the curves, in which a neuron is one of fewer experts, and the kept
    counts; of all plans that were looked at the one that loses least.

    A plan takes some of the experts, those that lose least per parameter, and then units down to `budget`; `alike`: as
    many in every block. What the neurons of a block lose together stays what it was: the tokens of an expert that goes
    are routed to the others. Raises `OptionError` if no plan meets the budget.
    """
    whole = {curve.block: curve for curve in curves if curve.site == EXPERTS}
    others = [curve for curve in curves if curve.site != EXPERTS]
    best: tuple[float, list[SiteCurve], list[int]] | None = None
    for left in _alike(whole.values()) if alike else _one_by_one(list(whole.values())):
        spent = sum(curve.gone(left[curve.block]) for curve in whole.values())
        rest = [_of_fewer(curve, whole, left) for curve in others]
        if not 0 <= budget - spent <= sum(curve.removable for curve in rest):
            continue
        shown = [*whole.values(), *rest]
        kept = [*left.values(), *(allocate_alike if alike else allocate)("loss", rest, budget - spent)]
        loss = sum(curve.loss[k].item() for curve, k in zip(shown, kept, strict=True) if curve.loss is not None)
        if best is None or loss < best[0]:
            best = loss, shown, kept
    if best is None:
        raise OptionError(f"{budget:.0f} parameters should go, and no choice of experts and neurons comes to that")
    order = sorted(range(len(best[1])), key=lambda i: best[1][i].block)
    return [best[1][i] for i in order], [best[2][i] for i in order]


def _one_by_one(whole: Sequence[SiteCurve]) -> Iterator[dict[int, int]]:
    """How many experts are left of each block when ever more go, those first that lose least per parameter."""
    steps = sorted((p, curve.block) for curve, each in zip(whole, allocate_loss(whole), strict=True) for p in each)
    for count in range(0, len(steps) + 1, max(1, len(steps) // PLANS)):
        taken = Counter(block for _, block in steps[:count])
        yield {curve.block: curve.units - taken[curve.block] for curve in whole}


def _alike(whole: Iterable[SiteCurve]) -> Iterator[dict[int, int]]:
    """The same where every block has as many left."""
    first = next(iter(whole))
    for count in first.kept_counts:
        yield {curve.block: count for curve in whole}


def _of_fewer(curve: SiteCurve, whole: Mapping[int, SiteCurve], left: Mapping[int, int]) -> SiteCurve:
    """A curve of neurons of all experts of a block, if it is one, as that of those that are left."""
    if curve.site != MLP or curve.block not in whole:
        return curve
    return replace(curve, cost=curve.cost // whole[curve.block].units * left[curve.block])
