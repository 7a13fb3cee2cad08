"""Orders: their formulas on small known cases, and what they are good for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llm_snp.core.linalg import symmetric_powers
from llm_snp.core.orders import ORDERS, UnitStatistics, order_ispasp
from llm_snp.core.subspace import factorise, unit_columns
from llm_snp.errors import OptionError


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(m: int = 24, group: int = 1, seed: int = 0, n: int = 200, d: int = 6) -> UnitStatistics:
    """Of ReLU activations, so that every order can be asked."""
    x = torch.relu(normal(seed, n, m // 2) @ normal(seed + 1, m // 2, m) + 0.3 * normal(seed + 2, n, m))
    return UnitStatistics(
        covariance=x.mT.cov(correction=0),
        mean=x.mean(0),
        weight=normal(seed + 3, d, m),
        group=group,
        damping=1e-4,
        keep=m // group // 2,
        nonnegative=True,
        generator=torch.Generator().manual_seed(seed),
    )


def from_covariance(rows: list[list[float]], weight: list[list[float]] | None = None, **more: float) -> UnitStatistics:
    c = torch.tensor(rows, dtype=torch.float64)
    w = torch.ones(1, len(rows), dtype=torch.float64) if weight is None else torch.tensor(weight, dtype=torch.float64)
    return UnitStatistics(c, torch.zeros(len(rows), dtype=torch.float64), w, **more)  # type: ignore[arg-type]


def by_score(score: Tensor, group: int = 1) -> list[int]:
    """Indices by falling score, ties to the lower one: without torch's sort."""
    sums = score.view(-1, group).sum(1).tolist()
    return sorted(range(len(sums)), key=lambda i: (-sums[i], i))


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("name", sorted(ORDERS))
def test_every_order_is_a_permutation_and_deterministic(name: str, group: int) -> None:
    first, second = (ORDERS[name](statistics(group=group)) for _ in range(2))
    assert first.dtype == torch.long
    assert sorted(first.tolist()) == list(range(24 // group))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", sorted(ORDERS))
def test_orders_do_not_modify_what_they_look_at(name: str) -> None:
    s = replace(statistics(), sensitivity=torch.eye(6, dtype=torch.float64) * 2)
    before = [t.clone() for t in (s.covariance, s.mean, s.weight, s.sensitivity) if t is not None]
    ORDERS[name](s)
    after = [t for t in (s.covariance, s.mean, s.weight, s.sensitivity) if t is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", [name for name in sorted(ORDERS) if name not in ("greedy", "random")])
def test_ties_go_to_the_lower_index(name: str) -> None:
    s = from_covariance(torch.eye(6, dtype=torch.float64).tolist(), nonnegative=True)
    assert ORDERS[name](s).tolist() == list(range(6))


@pytest.mark.parametrize("group", [1, 4])
def test_greedy_loses_less_than_any_other_order(group: int) -> None:
    s = statistics(group=group, m=32)

    def curve(order: Tensor) -> Tensor:
        return factorise(s.covariance, s.weight, unit_columns(order, group), s.damping).loss_curve

    greedy = curve(ORDERS["greedy"](s))
    g = torch.Generator().manual_seed(1)
    shuffles = torch.stack([curve(torch.randperm(s.units, generator=g)) for _ in range(20)])
    middle = slice(s.units // 4, s.units)
    assert (greedy[middle] < 0.9 * shuffles.mean(0)[middle]).all()
    assert (greedy.sum() < shuffles.sum(1)).all()
    for name in ORDERS:
        assert greedy.sum() <= curve(ORDERS[name](s)).sum() * (1 + 1e-9), name


def test_greedy_minds_the_sensitivity() -> None:
    weight = [[1.0, 0.0], [0.0, 0.5]]
    s = from_covariance([[1.0, 0.0], [0.0, 1.0]], weight)
    assert ORDERS["greedy"](s).tolist() == [0, 1]
    g = torch.diag(torch.tensor([0.01, 1.0], dtype=torch.float64))
    for name in ("greedy", "wanda"):
        assert ORDERS[name](replace(s, sensitivity=g)).tolist() == [1, 0]


def test_energy_and_saw_formulas() -> None:
    s = from_covariance([[1.0, 0.9, 0.0], [0.9, 3.0, 0.0], [0.0, 0.0, 2.0]], [[1.0, -2.0, 0.5], [-1.0, 0.0, 3.0]])
    assert ORDERS["energy"](s).tolist() == [1, 2, 0]
    assert ORDERS["saw"](s).tolist() == [2, 0, 1]
    grouped = statistics(group=4)
    assert ORDERS["energy"](grouped).tolist() == by_score(grouped.covariance.diagonal(), 4)
    assert ORDERS["saw"](grouped).tolist() == by_score(grouped.weight.abs().sum(0), 4)


def test_zca_and_loo_known_values() -> None:
    """Of the pair with correlation 0.9, 1 - 0.9² = 0.19 is left given the other, and 0.2646 after ZCA."""
    s = from_covariance([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 0.5]])
    assert (1 / s.inverse().diagonal()).tolist() == pytest.approx([0.19, 0.19, 0.5])
    assert symmetric_powers(s.damped(), -0.5)[0].diagonal().pow(-2).tolist() == pytest.approx(
        [0.26464, 0.26464, 0.5], 1e-4
    )
    assert ORDERS["loo"](s)[0] == 2
    assert ORDERS["zca"](s)[0] == 2
    assert ORDERS["energy"](s).tolist() == [0, 1, 2]
    # At a variance of 0.2 the two part: between 0.19 and 0.2646.
    s = from_covariance([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 0.2]])
    assert ORDERS["loo"](s)[0] == 2
    assert ORDERS["zca"](s)[2] == 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("group", [1, 4])
def test_zca_formula(group: int, seed: int) -> None:
    s = statistics(group=group, seed=10 * seed)
    c = s.covariance + s.damping * s.covariance.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(c)
    whitening = vectors @ torch.diag(values.rsqrt()) @ vectors.mT
    assert ORDERS["zca"](s).tolist() == by_score(whitening.diagonal() ** -2, group)
    # Un-normalised: with a unit diagonal the transform leaves each unit the variance it is scored by.
    transform = whitening / whitening.diagonal().unsqueeze(1)
    left = (transform @ c @ transform.mT).diagonal()
    assert ORDERS["zca"](s).tolist() == by_score(left, group)


@pytest.mark.parametrize("group", [1, 4])
def test_loo_is_the_residual_of_a_regression_on_all_other_units(group: int) -> None:
    s = replace(statistics(group=group), damping=0.0)
    left = []
    for unit in range(s.units):
        own = torch.arange(unit * group, (unit + 1) * group)
        others = torch.tensor([i for i in range(24) if i not in set(own.tolist())])
        c = s.covariance
        explained = c[own][:, others] @ torch.linalg.solve(c[others][:, others], c[others][:, own])
        left.append((c[own][:, own] - explained).trace())
    assert ORDERS["loo"](s).tolist() == by_score(torch.stack(left))


@pytest.mark.parametrize("group", [1, 4])
def test_wanda_formula(group: int) -> None:
    s = statistics(group=group)
    score = torch.stack([s.covariance[i, i] * s.weight[:, i].square().sum() for i in range(24)])
    assert ORDERS["wanda"](s).tolist() == by_score(score, group)
    factor = normal(11, 6, 9)
    g = factor @ factor.mT
    score = torch.stack([s.covariance[i, i] * (s.weight[:, i] @ g @ s.weight[:, i]) for i in range(24)])
    assert ORDERS["wanda"](replace(s, sensitivity=g)).tolist() == by_score(score, group)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("damping", "ridge"), [(0.0, 1e-2), (1e-3, 1e-2), (0.2, 0.2)])
def test_leverage_formula(group: int, damping: float, ridge: float) -> None:
    s = replace(statistics(group=group), damping=damping)
    c = s.covariance
    damped = c + ridge * c.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    score = (c @ torch.linalg.inv(damped)).diagonal()
    assert ORDERS["leverage"](s).tolist() == by_score(score, group)
    # By the units' angles in the space of the tokens: a unit of its own keeps a leverage near 1.
    assert 0 < score.min() < score.max() < 1


def test_random_follows_the_seed() -> None:
    s = statistics(m=64)

    def shuffle(seed: int) -> list[int]:
        return ORDERS["random"](replace(s, generator=torch.Generator().manual_seed(seed))).tolist()  # type: ignore[no-any-return]

    assert shuffle(3) == shuffle(3)
    assert shuffle(3) != shuffle(4)
    assert shuffle(3) != list(range(64))


def test_singular_covariance_is_ranked_all_the_same() -> None:
    s = replace(statistics(), damping=0.0)
    s.covariance[5], s.covariance[:, 5] = 0.0, 0.0
    for name in ORDERS:
        order = ORDERS[name](s)
        assert sorted(order.tolist()) == list(range(24)), name
        if name not in ("random", "saw", "i-spasp"):
            assert order[-1] == 5, name


def test_ispasp_needs_nonnegative_units() -> None:
    with pytest.raises(OptionError, match="i-spasp"):
        order_ispasp(replace(statistics(), nonnegative=False))


def reference_ispasp(hidden: Tensor, weight: Tensor, keep: int) -> set[int]:
    """arXiv 2112.04905, Algorithm 1, on the activations themselves: hidden (units, tokens) ≥ 0."""
    output = weight @ hidden
    kept: set[int] = set()
    residual = output
    for _ in range(20):
        importance = (weight.mT @ residual).sum(1).tolist()
        largest = sorted(range(len(importance)), key=lambda i: (-importance[i], i))[: 2 * keep]
        mass = hidden.sum(1).tolist()
        merged = sorted(kept | set(largest), key=lambda i: (-mass[i], i))
        new = set(merged[:keep])
        chosen = sorted(new)
        residual = output - weight[:, chosen] @ hidden[chosen]
        if new == kept:
            break
        kept = new
    return kept


@pytest.mark.parametrize("seed", range(4))
def test_ispasp_is_algorithm_1_without_storing_tokens(seed: int) -> None:
    hidden = torch.relu(normal(seed, 30, 8) @ normal(seed + 50, 8, 150) + normal(seed + 99, 30, 1))
    weight = normal(seed + 7, 5, 30) + 0.3
    s = UnitStatistics(hidden.cov(correction=0), hidden.mean(1), weight, damping=1e-3, keep=10, nonnegative=True)
    assert set(order_ispasp(s)[:10].tolist()) == reference_ispasp(hidden, weight, 10)


def test_ispasp_recovers_planted_units() -> None:
    """Eight units carry the output; the others hardly fire or hardly count."""
    planted = [2, 5, 7, 11, 13, 17, 19, 23]
    tokens, units = 400, 40
    hidden = torch.relu(normal(0, units, tokens))
    weight = 0.02 * normal(1, 10, units)
    weight[:, planted] += 1.0 + 0.1 * normal(2, 10, 8)
    hidden[planted] += 0.5
    s = UnitStatistics(hidden.cov(correction=0), hidden.mean(1), weight, keep=8, nonnegative=True)
    assert sorted(order_ispasp(s)[:8].tolist()) == planted
