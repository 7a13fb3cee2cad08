"""Blocked elimination against removal one by one, where every candidate's refit is solved from scratch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launches import is_view
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llm_snp.core import elimination
from llm_snp.core.elimination import eliminate
from llm_snp.core.linalg import damped_inverse
from llm_snp.core.subspace import factorise, unit_columns


def problem(m: int, d: int = 7, seed: int = 0, damping: float = 1e-3) -> tuple[Tensor, Tensor, Tensor]:
    """A damped covariance (m, m) with correlated units of unequal size, W (d, m) and G (d, d), float64."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    x = normal(4 * m, m // 2 + 1) @ normal(m // 2 + 1, m) + 0.5 * normal(4 * m, m)
    x *= normal(m).exp()
    c = x.mT.cov(correction=0).view(m, m)
    c.diagonal().add_(damping * c.diagonal().mean())
    gradient = normal(d, 2 * d)
    return c, normal(d, m), gradient @ gradient.mT


def inverse(c: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(c))


def naive(c: Tensor, energy: Tensor, group: int) -> tuple[list[int], Tensor]:
    """Removal one by one. The loss of a kept set is tr(M_PP (C_PP - C_PK C_KK⁻¹ C_KP)), solved anew each time."""
    units = c.shape[0] // group

    def loss(kept: list[int]) -> float:
        k = unit_columns(torch.tensor(kept, dtype=torch.long), group).flatten()
        p = torch.tensor([i for i in range(c.shape[0]) if i not in set(k.tolist())], dtype=torch.long)
        unexplained = c[p][:, p]
        if len(k):
            unexplained = unexplained - c[p][:, k] @ torch.linalg.solve(c[k][:, k], c[k][:, p])
        return (energy[p][:, p] * unexplained).sum().item()

    alive, removed, losses = list(range(units)), [], [0.0]
    while alive:
        candidates = [(loss([u for u in alive if u != unit]), unit) for unit in alive]
        best, unit = min(candidates)
        removed.append(unit)
        losses.append(best)
        alive.remove(unit)
    return removed, torch.tensor(losses, dtype=torch.float64).diff()


@pytest.mark.parametrize("sensitive", [False, True])
@pytest.mark.parametrize("panel", [1, 3, 128])
@pytest.mark.parametrize(("m", "group"), [(26, 1), (36, 4)])
def test_same_units_and_increments_as_one_by_one(m: int, group: int, panel: int, sensitive: bool) -> None:
    c, weight, g = problem(m, seed=m)
    energy = weight.mT @ (g if sensitive else torch.eye(len(g), dtype=torch.float64)) @ weight
    removed, increments = eliminate(inverse(c), energy, group, panel)
    expected, expected_increments = naive(c, energy, group)
    assert removed.tolist() == expected
    torch.testing.assert_close(increments, expected_increments, rtol=1e-8, atol=1e-9 * expected_increments.sum().item())


@pytest.mark.parametrize("compact_at", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("strip", [4, 7, 512])
@pytest.mark.parametrize(("m", "group", "panel"), [(26, 1, 3), (36, 4, 8)])
def test_strips_and_compaction_change_nothing(
    m: int, group: int, panel: int, strip: int, compact_at: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elimination, "STRIP_ROWS", strip)
    monkeypatch.setattr(elimination, "COMPACT_AT", compact_at)
    c, weight, _ = problem(m, seed=1)
    removed, increments = eliminate(inverse(c), weight.mT @ weight, group, panel)
    expected, expected_increments = naive(c, weight.mT @ weight, group)
    assert removed.tolist() == expected
    torch.testing.assert_close(increments, expected_increments, rtol=1e-8, atol=1e-9 * expected_increments.sum().item())


@pytest.mark.parametrize(("m", "group"), [(700, 1), (720, 8)])
def test_panels_agree_at_a_size_with_many_of_them(m: int, group: int) -> None:
    c, weight, _ = problem(m, d=60)
    h, energy = inverse(c), weight.mT @ weight
    one, increments = eliminate(h, energy, group, 1)
    for panel in (17, 64, 128, 1024):
        removed, blocked = eliminate(h, energy, group, panel)
        assert torch.equal(removed, one)
        torch.testing.assert_close(blocked, increments, rtol=1e-6, atol=1e-10 * increments.sum().item())


@pytest.mark.parametrize(("m", "group"), [(90, 1), (96, 4), (64, 32), (5, 5), (1, 1)])
def test_increments_are_the_whole_energy_and_inputs_stay(m: int, group: int) -> None:
    c, weight, _ = problem(m)
    h, energy = inverse(c), weight.mT @ weight
    before = h.clone(), energy.clone()
    removed, increments = eliminate(h, energy, group, 16)
    assert torch.equal(h, before[0])
    assert torch.equal(energy, before[1])
    assert sorted(removed.tolist()) == list(range(m // group))
    assert (increments >= 0).all()
    assert increments.sum().item() == pytest.approx((energy * c).sum().item(), rel=1e-9)


@pytest.mark.parametrize("group", [1, 4])
def test_increments_are_the_loss_curve_of_the_subspace(group: int) -> None:
    c, weight, g = problem(120)
    removed, increments = eliminate(inverse(c), weight.mT @ g @ weight, group, 32)
    subspace = factorise(c, weight, unit_columns(removed.flip(0), group), 0.0, g)
    torch.testing.assert_close(increments.flip(0), subspace.energy, rtol=1e-7, atol=1e-10 * increments.sum().item())


def test_nearly_singular_matrix() -> None:
    """Copies of units at the damping of a rescue: the copies go first and cost next to nothing."""
    c, weight, _ = problem(40, damping=0.0)
    index = torch.cat([torch.arange(40), torch.arange(10)])
    c, weight = c[index][:, index], weight[:, index % 7 * 5]
    c.diagonal().add_(1e-9 * c.diagonal().mean())
    removed, increments = eliminate(inverse(c), weight.mT @ weight, 1, 16)
    assert torch.isfinite(increments).all()
    assert {unit % 40 for unit in removed[:10].tolist()} == set(range(10))
    assert increments[:10].sum() < 1e-6 * increments.sum()
    assert increments.sum().item() == pytest.approx((weight.mT @ weight * c).sum().item(), rel=1e-5)


def test_unit_without_weight_costs_nothing_and_goes_first() -> None:
    c, weight, _ = problem(20)
    weight[:, [3, 11]] = 0.0
    removed, increments = eliminate(inverse(c), weight.mT @ weight)
    assert set(removed[:2].tolist()) == {3, 11}
    assert increments[:2].abs().max() <= 1e-12 * increments.sum()
    # Nothing to lose anywhere: still a ranking of all units.
    removed, increments = eliminate(inverse(c), torch.zeros_like(c), panel=6)
    assert sorted(removed.tolist()) == list(range(20))
    assert not increments.any()


class ReadsBack(TorchDispatchMode):
    """Counts the operations that would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func).split(".")[1]
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "_linalg_check_errors", "equal", "_to_copy"):
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("m", "group"), [(256, 1), (256, 4)])
def test_no_read_back_per_unit(m: int, group: int) -> None:
    c, weight, _ = problem(m)
    h, energy = inverse(c), weight.mT @ weight
    with ReadsBack() as seen:
        eliminate(h, energy, group, 32)
    assert set(seen.counts) == {"nonzero"}, seen.counts
    assert seen.counts["nonzero"] <= 256 // 32


class Dispatched(TorchDispatchMode):
    """Counts kernels, and operations that only look at a tensor in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.views = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_view(func):
            self.views += 1
        else:
            self.kernels += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("group", "kernels", "views"), [(1, 12, 9), (8, 21, 25)])
def test_operations_per_unit(group: int, kernels: int, views: int) -> None:
    """On a GPU the launch of each takes longer than its arithmetic; around the units there are some per panel."""
    c, weight, _ = problem(64 * group)
    h, energy = inverse(c), weight.mT @ weight
    with Dispatched() as one_panel:
        eliminate(h, energy, group, 64 * group)
    with Dispatched() as two_panels:
        eliminate(h, energy, group, 32 * group)
    assert one_panel.kernels <= 64 * kernels + 25
    assert two_panels.kernels <= 64 * kernels + 75
    assert one_panel.views <= 64 * views + 30


@pytest.mark.parametrize("group", [1, 4])
def test_working_in_place_gives_the_same(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compaction moves rows within the memory that it reads from, strip by strip."""
    monkeypatch.setattr("llm_snp.core.elimination.STRIP_ROWS", 24)
    covariance, weight, g = problem(120, 7)
    hessian, energy = inverse(covariance).contiguous(), weight.mT @ g @ weight
    before = hessian.clone(), energy.clone()
    expected = eliminate(hessian, energy, group, panel=8)
    assert torch.equal(hessian, before[0])
    assert torch.equal(energy, before[1])
    removed, increments = eliminate(hessian.clone(), energy.clone(), group, panel=8, overwrite=True)
    assert torch.equal(removed, expected[0])
    assert torch.equal(increments, expected[1])


def test_a_ranking_in_float32_costs_what_the_exact_one_costs() -> None:
    """Wide sites are ranked in float32: ties may fall otherwise, the loss of the kept set does not."""
    covariance, weight, g = problem(160, 24)
    energy = weight.mT @ g @ weight
    removed, _ = eliminate(damped_inverse(covariance, 1e-3)[0], energy)
    single, _ = eliminate(damped_inverse(covariance.float(), 1e-3)[0], energy.float(), overwrite=True)
    columns = [order.flip(0).view(-1, 1) for order in (removed, single)]
    exact, rounded = (factorise(covariance, weight, c, 1e-3, g).loss_curve for c in columns)
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=1e-6 * exact[0].item())
