"""How much to remove from which site, so that the budget of parameters is met.

Every allocation gives each removal step of each site a priority that does not fall along the site; steps are then
taken over all sites in order of priority until the budget is spent. For `variance` that is the paper's one global
cut-off τ, bisected to the budget, without the bisection.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

import torch
from torch import Tensor

from ..errors import OptionError

# A plan for all blocks that takes heads has to promise so much less loss than one that leaves them. What taking many at
# once costs is estimated too low: at 30 % of llama-wiki-1m half of the heads were to lose 6 % less than neurons alone,
# and the perplexity was 3 % higher; at 50 % they were to lose 34 % less, and it was lower.
MARGIN = 0.1


@dataclass(frozen=True)
class SiteCurve:
    """A site as an allocation sees it.

    block, site   where; unit: what is counted there (heads, queries, dims, values, pairs, neurons)
    units         u, how many units there are; cost: parameters per unit
    multiple      kept counts are multiples of this, or u itself; least: and no fewer than this
    only          the kept counts that there are, from u down, whatever `multiple` and `least` say; None: all of those
    whole         parameters that go where nothing is kept, if that is not u times `cost`
    total         loss of keeping nothing, comparable between sites, or None; `loss` of directions has more there
    variance      (u+1,) or None: share of the input variance in the tail after k units (`Subspace.variance_curve`)
    loss          (u+1,) or None: loss of keeping k units, comparable between sites
    """

    block: int
    site: str
    unit: str
    units: int
    cost: int
    multiple: int = 1
    variance: Tensor | None = None
    loss: Tensor | None = None
    least: int = 1
    only: tuple[int, ...] | None = None
    whole: int | None = None
    total: float | None = None

    def gone(self, kept: int) -> int:
        """Parameters that go if so many units are kept."""
        return self.whole if kept == 0 and self.whole is not None else (self.units - kept) * self.cost

    @property
    def kept_counts(self) -> list[int]:
        """Allowed kept counts, from all units down to the least."""
        if self.only is not None:
            return list(self.only)
        counts = list(range(self.units // self.multiple * self.multiple, self.least - 1, -self.multiple))
        return counts if counts and counts[0] == self.units else [self.units, *counts]

    @property
    def removable(self) -> int:
        """Parameters that can go at most."""
        return self.gone(self.kept_counts[-1])


def _by_step(curve: SiteCurve, values: Tensor) -> list[float]:
    """values (u+1,) at the kept count that each removal step leaves."""
    table = values.tolist()
    return [table[k] for k in curve.kept_counts[1:]]


def _van_der_corput(index: int) -> float:
    """The index-th number of a sequence that fills (0, 1) evenly: 1/2, 1/4, 3/4, 1/8, ..."""
    value, digit = 0.0, 0.5
    index += 1
    while index:
        value, index, digit = value + digit * (index & 1), index >> 1, digit / 2
    return value


def allocate_uniform(curves: Sequence[SiteCurve]) -> list[list[float]]:
    """The same share of every site. What does not come out even is spread over the depth, not put at one end."""
    priorities = []
    for curve in curves:
        offset = _van_der_corput(curve.block)
        counts = curve.kept_counts
        steps = pairwise(counts)
        priorities.append([(curve.units - before + offset * (before - after)) / curve.units for before, after in steps])
    return priorities


def allocate_variance(curves: Sequence[SiteCurve]) -> list[list[float]]:
    """One global cumulative-variance cut-off τ (arXiv 2405.17506): a site drops the longest tail with share ≤ τ."""
    priorities = []
    for curve in curves:
        if curve.variance is None:
            raise OptionError("--allocation variance needs measured variance curves")
        priorities.append(_by_step(curve, curve.variance))
    return priorities


def allocate_loss(curves: Sequence[SiteCurve]) -> list[list[float]]:
    """Marginal loss per parameter on each site's lower convex hull (METHOD, section 5)."""
    priorities = []
    for curve in curves:
        if curve.loss is None:
            raise OptionError("--allocation loss needs measured loss curves")
        counts = curve.kept_counts
        at = [curve.loss[curve.units].item(), *_by_step(curve, curve.loss)]
        rates: list[tuple[float, int]] = []  # pooled (loss per parameter, steps), rising
        for j in range(1, len(counts)):
            rate, steps = (at[j] - at[j - 1]) / (curve.gone(counts[j]) - curve.gone(counts[j - 1])), 1
            while rates and rates[-1][0] >= rate:
                steps += rates.pop()[1]
                rate = (at[j] - at[j - steps]) / (curve.gone(counts[j]) - curve.gone(counts[j - steps]))
            rates.append((rate, steps))
        priorities.append([rate for rate, steps in rates for _ in range(steps)])
    return priorities


ALLOCATIONS: dict[str, Callable[[Sequence[SiteCurve]], list[list[float]]]] = {
    "uniform": allocate_uniform,
    "variance": allocate_variance,
    "loss": allocate_loss,
}


def allocate(name: str, curves: Sequence[SiteCurve], budget: float) -> list[int]:
    """Kept counts per site, such that about `budget` parameters go: to half a step of the cheapest site left.

    Steps are taken by priority while they fit. A site whose next step no longer fits is closed, the others go on;
    the rest of the budget is spent on one more of the cheapest steps if that comes nearer to it. So no more than
    half a step above the budget is ever removed. Raises `OptionError` if the budget exceeds what can be removed.
    """
    most = sum(curve.removable for curve in curves)
    if budget > most:
        raise OptionError(f"{budget:.0f} parameters should go, but only {most} can: a block would be empty")
    priorities = ALLOCATIONS[name](curves)
    steps = sorted((p, curve.block, i, j) for i, curve in enumerate(curves) for j, p in enumerate(priorities[i]))
    counts = [curve.kept_counts for curve in curves]
    taken = [0] * len(curves)
    left = budget
    for _, _, i, j in steps:
        cost = curves[i].gone(counts[i][j + 1]) - curves[i].gone(counts[i][j])
        if cost <= left:  # later steps of a site are no cheaper, so none is taken behind one that was not
            taken[i], left = j + 1, left - cost
    kept = [counts[i][j] for i, j in enumerate(taken)]
    candidates = []
    for i, j in enumerate(taken):
        if j < len(priorities[i]):
            after = counts[i][j + 1]
            cost = curves[i].gone(after) - curves[i].gone(kept[i])
            candidates.append((cost - left, priorities[i][j], i, after))
    over, _, i, after = min(candidates, default=(left, 0.0, 0, 0))
    if over < left:
        kept[i] = after
    return kept


def alike(curves: Sequence[SiteCurve]) -> list[SiteCurve]:
    """The first site of each kind, each for those of all blocks: all are to keep the same count.

    Those of one name that have other numbers of units are of another kind: MLPs, and experts in their place. A merged
    curve has the cost and the loss of all blocks together, and the mean of their variance.
    """
    merged = []
    kinds: dict[tuple[str, int], list[SiteCurve]] = {}
    for curve in curves:
        kinds.setdefault((curve.site, curve.units), []).append(curve)
    for same in kinds.values():
        first = same[0]
        losses = [curve.loss for curve in same if curve.loss is not None]
        variances = [curve.variance for curve in same if curve.variance is not None]
        merged.append(
            replace(
                first,
                cost=sum(curve.cost for curve in same),
                loss=torch.stack(losses).sum(0) if losses else None,
                variance=torch.stack(variances).mean(0) if variances else None,
            )
        )
    return merged


def allocate_alike(name: str, curves: Sequence[SiteCurve], budget: float) -> list[int]:
    """As `allocate`, with the same counts in every block.

    There are few such plans: for `loss` each is looked at, with the last site giving what the others leave, to half a
    step of it, and the least loss is taken (see `MARGIN`). Where no plan comes as near, and for other allocations,
    `allocate` decides.
    """
    merged = alike(curves)
    counts = dict(zip(((one.site, one.units) for one in merged), _alike_counts(name, merged, budget), strict=True))
    return [counts[curve.site, curve.units] for curve in curves]


def _alike_counts(name: str, merged: Sequence[SiteCurve], budget: float) -> list[int]:
    """What each of `merged` keeps."""
    *others, last = merged
    if name != "loss":
        return allocate(name, merged, budget)
    plans, possible = [], sorted(last.kept_counts)
    for kept in product(*(curve.kept_counts for curve in others)):
        gone = sum((curve.units - count) * curve.cost for curve, count in zip(others, kept, strict=True))
        wanted = last.units - (budget - gone) / last.cost
        at = bisect_left(possible, wanted)
        count = min(reversed(possible[max(0, at - 1) : at + 1]), key=lambda k: abs(k - wanted))
        if abs(count - wanted) <= last.multiple / 2:
            counts = [*kept, count]
            losses = (curve.loss[k].item() for curve, k in zip(merged, counts, strict=True) if curve.loss is not None)
            whole = all(k == curve.units for curve, k in zip(others, kept, strict=True) if curve.unit == "heads")
            plans.append((sum(losses) * (1 - MARGIN if whole else 1), counts))
    return min(plans)[1] if plans else allocate(name, merged, budget)
