"""Whole experts and neurons of the others, from loss curves that are written down."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch

from llm_snp.core.allocation import SiteCurve, allocate
from llm_snp.errors import OptionError
from llm_snp.families import EXPERTS, MLP
from llm_snp.pruning.kinds import allocate_mixed

EXPERTS_EACH, NEURONS, COST = 4, 16, 3


def block(index: int, experts: list[float], neurons: float) -> list[SiteCurve]:
    """A block whose experts lose that much, none left first, and whose neurons so much times the share squared."""
    gone = 1 - torch.arange(NEURONS + 1, dtype=torch.float64) / NEURONS
    loss = torch.tensor(experts, dtype=torch.float64)
    return [
        SiteCurve(index, EXPERTS, EXPERTS, EXPERTS_EACH, NEURONS * COST, least=2, loss=loss),
        SiteCurve(index, MLP, "neurons", NEURONS, EXPERTS_EACH * COST, loss=neurons * gone.square()),
    ]


CURVES = [*block(0, [9, 8, 0.2, 0.01, 0], 1.0), *block(1, [9, 8, 4, 2, 0], 0.5)]
WHOLE = sum(curve.units * curve.cost for curve in CURVES if curve.site == EXPERTS)


def lost(curves: list[SiteCurve], kept: list[int]) -> float:
    return sum(curve.loss[count].item() for curve, count in zip(curves, kept, strict=True) if curve.loss is not None)


def every_plan(budget: float) -> Iterator[float]:
    """What is lost with each choice of experts, and then of neurons."""
    for left in product(range(2, EXPERTS_EACH + 1), repeat=2):
        whole = [curve for curve in CURVES if curve.site == EXPERTS]
        rest = [replace(curve, cost=COST * left[curve.block]) for curve in CURVES if curve.site == MLP]
        spent = sum(curve.gone(left[curve.block]) for curve in whole)
        if 0 <= budget - spent <= sum(curve.removable for curve in rest):
            yield lost([*whole, *rest], [*left, *allocate("loss", rest, budget - spent)])


@pytest.mark.parametrize("share", [0.1, 0.25, 0.4, 0.6])
def test_both_lose_no_more_than_either(share: float) -> None:
    shown, kept = allocate_mixed(CURVES, share * WHOLE)
    left = {curve.block: count for curve, count in zip(shown, kept, strict=True) if curve.site == EXPERTS}
    assert all(2 <= count <= EXPERTS_EACH for count in left.values())
    gone = 0
    for curve, count in zip(shown, kept, strict=True):
        gone += curve.gone(count)
        assert curve.cost == (NEURONS * COST if curve.site == EXPERTS else left[curve.block] * COST)
    assert gone == pytest.approx(share * WHOLE, abs=2 * EXPERTS_EACH * COST)
    # By hand: what is left of a block are its experts times its neurons.
    neurons = {curve.block: count for curve, count in zip(shown, kept, strict=True) if curve.site == MLP}
    assert WHOLE - gone == sum(left[index] * neurons[index] * COST for index in left)
    only = [curve for curve in CURVES if curve.site == MLP]
    assert lost(shown, kept) <= lost(only, allocate("loss", only, share * WHOLE))
    assert left[0] < EXPERTS_EACH or share == 0.1
    assert left[1] == EXPERTS_EACH
    assert lost(shown, kept) == pytest.approx(min(every_plan(share * WHOLE)))


def test_as_many_in_every_block() -> None:
    shown, kept = allocate_mixed(CURVES, 0.4 * WHOLE, alike=True)
    counts = {
        curve.unit: {count for other, count in zip(shown, kept, strict=True) if other.unit == curve.unit}
        for curve in shown
    }
    assert all(len(each) == 1 for each in counts.values())
    alike = [*block(0, [9, 8, 0.02, 0.01, 0], 1.0), *block(1, [9, 8, 0.02, 0.01, 0], 0.5)]
    shown, kept = allocate_mixed(alike, 0.5 * WHOLE, alike=True)
    assert kept == [2, 16, 2, 16]


def test_more_than_can_go() -> None:
    with pytest.raises(OptionError, match="no choice of experts and neurons comes to that"):
        allocate_mixed(CURVES, 0.99 * WHOLE)
