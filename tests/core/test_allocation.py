"""Allocations: the budget is met, and spent where each of them says."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time

import pytest
import torch
from torch import Tensor

from llm_snp.core.allocation import ALLOCATIONS, MARGIN, SiteCurve, allocate, allocate_alike
from llm_snp.errors import OptionError


def falling(rng: random.Random, units: int, convex: bool = False, total: float = 1.0) -> Tensor:
    """(units+1,): total at 0 units kept, falling to 0 at all of them."""
    steps = [rng.expovariate(1.0) ** 2 + 1e-6 for _ in range(units)]
    if convex:
        steps.sort()
    curve = torch.tensor([0.0, *itertools.accumulate(steps)], dtype=torch.float64).flip(0)
    return curve * (total / curve[0])


def curve(
    block: int,
    units: int,
    cost: int,
    multiple: int = 1,
    site: str = "mlp",
    variance: Tensor | None = None,
    loss: Tensor | None = None,
) -> SiteCurve:
    return SiteCurve(block, site, "neurons", units, cost, multiple, variance, loss)


def random_curves(rng: random.Random, convex: bool = False) -> list[SiteCurve]:
    """A random model: blocks with an attention and an mlp site of different unit costs."""
    curves = []
    heads, neurons = rng.randint(2, 12), rng.randint(5, 60)
    costs = rng.randint(20, 400), rng.randint(1, 30)
    multiple = rng.choice([1, 1, 2, 4, 8, neurons])
    for block in range(rng.randint(1, 8)):
        for site, units, cost, m in (("attn", heads, costs[0], 1), ("mlp", neurons, costs[1], min(multiple, neurons))):
            variance, loss = falling(rng, units), falling(rng, units, convex, rng.uniform(0.1, 3.0))
            curves.append(curve(block, units, cost, m, site, variance, loss))
    return curves


def removed(curves: list[SiteCurve], kept: list[int]) -> int:
    return sum((c.units - k) * c.cost for c, k in zip(curves, kept, strict=True))


def next_steps(curves: list[SiteCurve], kept: list[int]) -> list[int]:
    """What one more step would cost at every site that has one left."""
    steps = []
    for c, k in zip(curves, kept, strict=True):
        position = c.kept_counts.index(k)
        if position + 1 < len(c.kept_counts):
            steps.append((k - c.kept_counts[position + 1]) * c.cost)
    return steps


def total_loss(curves: list[SiteCurve], kept: list[int]) -> float:
    return sum(c.loss[k].item() for c, k in zip(curves, kept, strict=True) if c.loss is not None)


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
def test_budget_is_met_on_random_curves(name: str) -> None:
    rng = random.Random(name)
    for _ in range(150):
        curves = random_curves(rng)
        most = sum(c.removable for c in curves)
        budget = most * rng.choice([0.0, rng.random(), rng.random(), 1.0])
        kept = allocate(name, curves, budget)
        for c, k in zip(curves, kept, strict=True):
            assert k in c.kept_counts
            assert k == c.units or k % c.multiple == 0
            assert k >= 1
        off = removed(curves, kept) - budget
        steps = next_steps(curves, kept)
        if steps and off <= 0:
            assert -off <= min(steps) / 2 + 1e-6
        # Above the budget by half of the step that was taken last, at most: the steps left may be dearer.
        taken = [(b - a) * c.cost for c in curves for b, a in itertools.pairwise(c.kept_counts)]
        assert off <= max(taken, default=0) / 2 + 1e-6
        assert kept == allocate(name, curves, budget), "deterministic"


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
def test_budget_is_met_to_half_of_the_cheapest_step(name: str) -> None:
    """Where every site still has its cheapest unit to give, the result is nearer to the budget than half of it."""
    rng = random.Random(1)
    for _ in range(60):
        curves = [c for c in random_curves(rng) if c.site == "mlp" or c.units > 1]
        curves = [curve(c.block, c.units, c.cost, 1, c.site, c.variance, c.loss) for c in curves]
        budget = 0.5 * sum(c.removable for c in curves)
        kept = allocate(name, curves, budget)
        if any(k > 1 for c, k in zip(curves, kept, strict=True) if c.site == "mlp"):
            cheapest = min(c.cost for c in curves)
            assert abs(removed(curves, kept) - budget) <= cheapest / 2 + 1e-6


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
def test_nothing_and_everything(name: str) -> None:
    curves = random_curves(random.Random(5))
    assert allocate(name, curves, 0.0) == [c.units for c in curves]
    most = sum(c.removable for c in curves)
    assert allocate(name, curves, most) == [c.kept_counts[-1] for c in curves]
    assert all(c.kept_counts[-1] >= 1 for c in curves)


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
def test_impossible_budget_raises(name: str) -> None:
    curves = random_curves(random.Random(6))
    with pytest.raises(OptionError, match="can"):
        allocate(name, curves, sum(c.removable for c in curves) + 1)


@pytest.mark.parametrize("name", ["variance", "loss"])
def test_missing_curves_raise(name: str) -> None:
    with pytest.raises(OptionError, match=name):
        allocate(name, [curve(0, 4, 1)], 2)


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
def test_more_sparsity_never_gives_units_back(name: str) -> None:
    """Up to what the last parameters of a budget are filled up with, where the next steps no longer fit."""
    rng = random.Random(8)
    for _ in range(20):
        curves = random_curves(rng)
        most = sum(c.removable for c in curves)
        before = [c.units for c in curves]
        for share in (0.1, 0.3, 0.6, 0.9):
            kept = allocate(name, curves, share * most)
            given_back = sum(max(0, k - b) * c.cost for c, k, b in zip(curves, kept, before, strict=True))
            assert given_back <= 2 * max(c.cost * c.multiple for c in curves)
            before = kept


def test_kept_counts() -> None:
    assert curve(0, 5, 1).kept_counts == [5, 4, 3, 2, 1]
    assert curve(0, 10, 1, multiple=4).kept_counts == [10, 8, 4]
    assert curve(0, 8, 1, multiple=4).kept_counts == [8, 4]
    assert curve(0, 4, 1, multiple=4).kept_counts == [4]
    assert curve(0, 1, 7).kept_counts == [1]
    assert curve(0, 10, 3, multiple=4).removable == 18
    assert curve(0, 1, 7).removable == 0
    at_least_two = dataclasses.replace(curve(0, 5, 3), least=2)
    assert at_least_two.kept_counts == [5, 4, 3, 2]
    assert at_least_two.removable == 9


def test_uniform_takes_the_same_share_everywhere() -> None:
    curves = [curve(b, u, cost, site=s) for b in range(12) for s, u, cost in (("attn", 12, 256), ("mlp", 3072, 1))]
    budget = 0.3 * sum(c.units * c.cost for c in curves)
    kept = allocate("uniform", curves, budget)
    for c, k in zip(curves, kept, strict=True):
        # Whole heads cannot meet the share; neurons make up for it, a few in each block.
        assert abs((c.units - k) - 0.3 * c.units) < (1.0 if c.site == "attn" else 0.01 * c.units)


def test_uniform_spreads_the_remainder_over_the_depth() -> None:
    """0.3 of 12 heads are 3.6: in each third of the blocks some lose 3 and some 4."""
    curves = [curve(b, 12, 1, site="attn") for b in range(12)]
    kept = allocate("uniform", curves, 0.3 * 12 * 12)
    gone = [12 - k for k in kept]
    assert set(gone) == {3, 4}
    assert sum(gone) == 43
    for start in range(0, 12, 4):
        assert {3, 4} == set(gone[start : start + 4])
    # Fewer units than blocks: one here and one there, not the first blocks.
    kept = allocate("uniform", curves, 3)
    blocks = [b for b, k in enumerate(kept) if k < 12]
    assert sum(12 - k for k in kept) == 3
    assert max(b - a for a, b in itertools.pairwise([-1, *blocks, 12])) < 9


def test_variance_is_one_threshold_bisected_to_the_budget() -> None:
    """The paper's rule: every site drops its longest tail with at most τ of its variance."""
    rng = random.Random(3)
    for _ in range(30):
        curves = [
            curve(b, units, 1, variance=falling(rng, units)) for b, units in enumerate(rng.choices(range(3, 30), k=6))
        ]
        budget = round(rng.uniform(0.1, 0.9) * sum(c.removable for c in curves))

        def tails(tau: float, curves: list[SiteCurve] = curves) -> list[int]:
            counts = []
            for c in curves:
                assert c.variance is not None
                counts.append(next(k for k in range(1, c.units + 1) if c.variance[k].item() <= tau))
            return counts

        low, high = 0.0, 1.0
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if removed(curves, tails(middle)) < budget else (low, middle)
        assert removed(curves, tails(high)) == budget, "unequal steps of cost 1 can meet any budget"
        assert allocate("variance", curves, budget) == tails(high)


@pytest.mark.parametrize("cost", [1, 3])
def test_loss_is_optimal_on_convex_curves(cost: int) -> None:
    """With equal costs, every budget of whole units is spent as well as trying all combinations can."""
    rng = random.Random(4)
    for _ in range(25):
        curves = [
            curve(b, units, cost, loss=falling(rng, units, convex=True, total=rng.uniform(0.1, 5)))
            for b, units in enumerate(rng.choices(range(2, 7), k=4))
        ]
        units = rng.randint(1, sum(c.removable for c in curves) // cost)
        kept = allocate("loss", curves, units * cost)
        assert removed(curves, kept) == units * cost
        best = min(
            total_loss(curves, list(counts))
            for counts in itertools.product(*(c.kept_counts for c in curves))
            if removed(curves, list(counts)) == units * cost
        )
        assert total_loss(curves, kept) == pytest.approx(best, rel=1e-12)


def test_loss_with_unequal_costs_is_best_for_what_it_removes() -> None:
    """Greedy per parameter meets the lower convex hull: nothing that removes as much loses less, at its vertices."""
    rng = random.Random(11)
    for _ in range(25):
        curves = [
            curve(b, units, cost, loss=falling(rng, units, convex=True))
            for b, (units, cost) in enumerate(((4, 6), (6, 2), (5, 3), (3, 10)))
        ]
        rates = sorted(
            ((c.loss[k - 1] - c.loss[k]).item() / c.cost, c.cost)  # type: ignore[index]
            for c in curves
            for k in range(c.units, 1, -1)
        )
        budget = sum(cost for _, cost in rates[: rng.randint(1, len(rates))])
        kept = allocate("loss", curves, budget)
        assert removed(curves, kept) == budget
        best = min(
            total_loss(curves, list(counts))
            for counts in itertools.product(*(c.kept_counts for c in curves))
            if removed(curves, list(counts)) >= budget
        )
        assert total_loss(curves, kept) == pytest.approx(best, rel=1e-12)


def test_loss_sees_past_a_dear_first_step() -> None:
    """A curve that is not convex is judged by its lower hull: two steps at 1 + 0 beat two at 0.6 + 0.6."""
    bumpy = torch.tensor([9.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    smooth = torch.tensor([9.0, 1.2, 0.6, 0.0], dtype=torch.float64)
    kept = allocate("loss", [curve(0, 3, 1, loss=smooth), curve(1, 3, 1, loss=bumpy)], 2)
    assert kept == [3, 1]


def test_loss_priorities_are_slopes_of_the_convex_envelope_per_parameter() -> None:
    """The slope of the greatest convex minorant between j - 1 and j is max over a < j of min over b >= j."""
    rng = random.Random(12)
    for _ in range(20):
        c = curve(0, rng.randint(2, 20), rng.randint(1, 9), rng.choice([1, 1, 3]), loss=falling(rng, 20))
        assert c.loss is not None
        c = dataclasses.replace(c, loss=c.loss[20 - c.units :] - c.loss[20])
        assert c.loss is not None
        gone = [(c.units - k) * c.cost for k in c.kept_counts]
        at = [c.loss[k].item() for k in c.kept_counts]
        steps = range(1, len(gone))
        expected = [
            max(min((at[b] - at[a]) / (gone[b] - gone[a]) for b in range(j, len(gone))) for a in range(j))
            for j in steps
        ]
        assert ALLOCATIONS["loss"]([c]) == [pytest.approx(expected)]


def test_multiples_are_respected_and_still_near_the_budget() -> None:
    rng = random.Random(2)
    curves = [curve(b, 100, 7, 16, loss=falling(rng, 100), variance=falling(rng, 100)) for b in range(6)]
    budget = 0.35 * 6 * 100 * 7
    for name in ALLOCATIONS:
        kept = allocate(name, curves, budget)
        assert all(k == 100 or (k % 16 == 0 and k >= 16) for k in kept)
        assert abs(removed(curves, kept) - budget) <= 16 * 7 / 2


def test_as_many_units_as_a_large_model_has() -> None:
    """Linear in the steps (but for the sort): all neurons of opt-1.3b. A quadratic scan took half a minute."""
    curves = [curve(b, 8192, 4097, loss=torch.linspace(1, 0, 8193, dtype=torch.float64)) for b in range(24)]
    start = time.process_time()
    kept = allocate("loss", curves, 0.3 * 24 * 8192 * 4097)
    assert time.process_time() - start < 10
    assert abs(24 * 8192 - sum(kept) - 0.3 * 24 * 8192) <= 0.5


def test_equal_sites_are_treated_alike() -> None:
    loss = falling(random.Random(0), 10, convex=True)
    kept = allocate("loss", [curve(b, 10, 2, loss=loss, variance=loss) for b in range(4)], 4 * 2 * 3)
    assert kept == [7, 7, 7, 7]


@pytest.mark.parametrize("seed", range(20))
def test_alike_in_every_block_is_the_best_such_plan(seed: int) -> None:
    """Against all plans of one number of heads and one of neurons; curves need not be convex."""
    rng = random.Random(seed)
    blocks, heads, neurons = rng.randint(1, 4), rng.randint(2, 8), rng.randint(20, 60)
    costs = rng.randint(50, 200), rng.randint(20, 40)
    curves = []
    for block in range(blocks):
        loss = falling(rng, heads, total=rng.random())
        curves.append(SiteCurve(block, "attention", "heads", heads, costs[0], loss=loss))
        curves.append(SiteCurve(block, "mlp", "neurons", neurons, costs[1], loss=falling(rng, neurons)))
    budget = rng.uniform(0.1, 0.6) * sum(curve.removable for curve in curves)
    found = allocate_alike("loss", curves, budget)
    step = blocks * costs[1]
    possible = {
        kept: total_loss(curves, [*kept] * blocks) * (1 - MARGIN if kept[0] == heads else 1)
        for kept in itertools.product(range(1, heads + 1), range(1, neurons + 1))
        if abs(removed(curves, [*kept] * blocks) - budget) <= step / 2
    }
    assert possible[found[0], found[1]] == pytest.approx(min(possible.values()))


def test_alike_keeps_only_what_the_stock_class_can_count() -> None:
    loss = torch.tensor([9.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)  # three of four heads go for nothing
    curves = [
        SiteCurve(0, "attention", "heads", 4, 100, loss=loss, only=(4, 2)),
        curve(0, 100, 10, loss=torch.arange(101, dtype=torch.float64).flip(0)),
    ]
    assert curves[0].kept_counts == [4, 2]
    assert curves[0].removable == 200
    assert allocate_alike("loss", curves, 300) == [2, 90]


def test_alike_where_no_last_site_can_give_the_rest() -> None:
    """The heads alone come nearest."""
    loss = torch.tensor([9.0, 1.0, 0.0], dtype=torch.float64)
    curves = [
        SiteCurve(0, "attention", "heads", 2, 100, loss=loss),
        curve(0, 2, 1, loss=torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)),
    ]
    assert allocate_alike("loss", curves, 90)[0] == 1


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_alike_with_every_allocation(name: str) -> None:
    curves = random_curves(random.Random(1))
    merged = [c for c in curves if c.block == 0]
    same = [dataclasses.replace(c, block=block) for block in range(3) for c in merged]
    budget = 0.4 * sum(c.removable for c in same)
    kept = allocate_alike(name, same, budget)
    assert kept == kept[: len(merged)] * 3
    assert removed(same, kept) == pytest.approx(budget, abs=3 * max(c.cost * c.multiple for c in merged))
