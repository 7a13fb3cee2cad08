"""Attention and MLP layers, and blocks, that go as a whole: what they are in a plan, and which of them go.

Which go is decided by loss per parameter, as it is for units. Where only layers go that loss is measured (`left_out`);
beside units it is the point at zero of a loss curve: the energy of the output, but for the mean that its bias keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..config import PruneConfig
from ..core.allocation import SiteCurve, allocate
from ..errors import OptionError
from ..families import ATTENTION, SCORES, Family, first_attentions
from .kinds import sites_of

# So many plans with ever more layers gone may be no better in a row, then no more are looked at.
PATIENCE = 5


def layer_curves(
    family: Family,
    config: Any,
    blocks: Sequence[nn.Module],
    options: PruneConfig,
    totals: Mapping[tuple[int, str], float | None],
) -> list[SiteCurve]:
    """Every site as one that stays as it is or goes; the first attention, of each kind, stays.

    totals: what is lost without each, by block and site, if that is measured.
    """
    first, found = first_attentions(config), []
    for i, block in enumerate(blocks):
        for site in sites_of(family, config, options, i):
            stays = site.name == ATTENTION and i in first
            total = totals.get((i, site.name), 0.0 if totals else None)  # of what stays nothing is measured
            loss = None if total is None else torch.linspace(total, 0.0, site.units + 1, dtype=torch.float64)
            whole = family.site_cost(block, site, options.whole_blocks)
            only = (site.units,) if stays else (site.units, 0)
            found.append(
                SiteCurve(i, site.name, site.unit, site.units, 0, loss=loss, only=only, whole=whole, total=total)
            )
    return found


def allocate_layers(by: str, layers: Sequence[SiteCurve], budget: float, two_by_two: bool) -> list[int]:
    """Kept counts of `layer_curves`, all or none, so that about `budget` parameters go: see `core.allocation.allocate`.

    two_by_two: attention and MLP of a block only together.
    """
    if not two_by_two:
        return allocate(by, layers, budget)
    numbers = sorted({curve.block for curve in layers})
    groups = [[curve for curve in layers if curve.block == number] for number in numbers]
    kept = dict(zip(numbers, allocate(by, [_together(group) for group in groups], budget), strict=True))
    return [curve.units * kept[curve.block] for curve in layers]


def _together(group: Sequence[SiteCurve]) -> SiteCurve:
    """The sites of a block as one of one unit."""
    totals = [curve.total for curve in group]
    total = None if None in totals else sum(total for total in totals if total is not None)
    loss = None if total is None else torch.tensor([total, 0.0], dtype=torch.float64)
    able = all(curve.only is not None and 0 in curve.only for curve in group)
    whole = sum(curve.gone(0) for curve in group)
    return replace(group[0], units=1, loss=loss, only=(1, 0) if able else (1,), whole=whole, total=total)


def removable(layers: Sequence[SiteCurve], two_by_two: bool) -> int:
    """Parameters that can go at most."""
    if not two_by_two:
        return sum(curve.removable for curve in layers)
    numbers = {curve.block for curve in layers}
    return sum(_together([curve for curve in layers if curve.block == number]).removable for number in numbers)


def allocate_both(
    curves: Sequence[SiteCurve], layers: Sequence[SiteCurve], budget: float
) -> tuple[list[SiteCurve], list[int]]:
    """Layers and units: the curves in which what is left is counted, and the kept counts; of all plans that were looked
    at the one that loses least.

    A plan takes some of the layers, those that lose least per parameter, and then units of the others down to `budget`.
    Raises `OptionError` if no such plan meets it.
    """
    able = [curve for curve in layers if curve.only is not None and 0 in curve.only and curve.total is not None]
    ranked = sorted(able, key=lambda curve: (curve.total or 0.0) / curve.gone(0))
    best: tuple[float, list[SiteCurve], list[int]] | None = None
    since = 0
    for count in range(len(ranked) + 1):
        gone = {(curve.block, curve.site): curve for curve in ranked[:count]}
        spent = sum(curve.gone(0) for curve in gone.values())
        rest = [curve for curve in curves if (curve.block, _site(curve)) not in gone]
        if spent > budget:
            break
        if sum(curve.removable for curve in rest) < budget - spent:
            continue
        kept = allocate("loss", rest, budget - spent)
        loss = sum(curve.total or 0.0 for curve in gone.values())
        loss += sum(curve.loss[k].item() for curve, k in zip(rest, kept, strict=True) if curve.loss is not None)
        if best is None or loss < best[0]:
            best, since = (loss, [*rest, *gone.values()], [*kept, *[0] * count]), 0
        else:
            since += 1
        if since == PATIENCE:
            break
    if best is None:
        raise OptionError(f"{budget:.0f} parameters should go, and no choice of layers and units comes to that")
    order = sorted(range(len(best[1])), key=lambda i: best[1][i].block)
    return [best[1][i] for i in order], [best[2][i] for i in order]


def _site(curve: SiteCurve) -> str:
    """What query and key lose is the attention's."""
    return ATTENTION if curve.site == SCORES else curve.site
