"""What goes of a block's attention: whole heads, single query heads, or directions inside all heads.

`--attention both` compares them by their loss curves, each where the same number of parameters is gone.
"""

from __future__ import annotations

import math
from itertools import product

from ..core.allocation import SiteCurve


def cheapest_kind(choices: list[list[SiteCurve]], share: float) -> list[SiteCurve]:
    """Of heads, query heads and directions those that lose least where a share of the attention's parameters goes.

    Some of them may be unable; where all are, the one that gives most.
    """
    amount = share * max(sum(curve.units * curve.cost for curve in curves) for curves in choices)
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
