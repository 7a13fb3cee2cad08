"""The subspace (METHOD, sections 1 and 2) against the tokens it was computed from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from llm_snp.core.heads import direction_columns
from llm_snp.core.subspace import Subspace, factorise, one_of_each, truncate, unit_columns

N, M, D = 300, 12, 5
GROUPS = [1, 3]


def tokens(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated x (N, M) with a mean, a consumer weight (D, M) and a sensitivity (D, D), float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, M, generator=g, dtype=torch.float64) @ torch.randn(M, M, generator=g, dtype=torch.float64)
    x += torch.randn(M, generator=g, dtype=torch.float64)
    gradient = torch.randn(D, 2 * D, generator=g, dtype=torch.float64)
    return x, torch.randn(D, M, generator=g, dtype=torch.float64), gradient @ gradient.mT


def covariance(x: Tensor) -> Tensor:
    return x.mT.cov(correction=0)


def shuffled(group: int, seed: int = 3) -> Tensor:
    return unit_columns(torch.randperm(M // group, generator=torch.Generator().manual_seed(seed)), group)


def refit(x: Tensor, weight: Tensor, columns: Tensor, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
    """Weight and bias that reproduce x weightᵀ from x[:, columns], pulled to the dense weight: numpy, rows stacked."""
    centred, y = x - x.mean(0), (x - x.mean(0)) @ weight.mT
    inputs = np.concatenate([centred[:, columns].numpy() / N**0.5, ridge**0.5 * np.eye(len(columns))])
    outputs = np.concatenate([y.numpy() / N**0.5, ridge**0.5 * weight[:, columns].numpy().T])
    solution = torch.from_numpy(np.linalg.lstsq(inputs, outputs, rcond=None)[0].T)
    return solution, weight @ x.mean(0) - solution @ x.mean(0)[columns]


@pytest.mark.parametrize("group", GROUPS)
def test_coordinates_are_uncorrelated_and_depend_on_earlier_units_only(group: int) -> None:
    x, weight, _ = tokens()
    columns = shuffled(group)
    subspace = factorise(covariance(x), weight, columns, 0.0)
    assert subspace.damping == 0.0
    flat = columns.flatten()
    # The paper's L has unit diagonal blocks: L = lower · blockdiag(lower)⁻¹, D = blockdiag(lower) blockdiag(lower)ᵀ.
    blocks = torch.block_diag(*[subspace.lower[i : i + group, i : i + group] for i in range(0, M, group)])
    unit_lower = subspace.lower @ torch.linalg.inv(blocks)
    inverse = torch.linalg.inv(unit_lower)
    z = (x - x.mean(0))[:, flat] @ inverse.mT
    torch.testing.assert_close(z.mT.cov(correction=0), blocks @ blocks.mT)
    torch.testing.assert_close(unit_lower @ (blocks @ blocks.mT) @ unit_lower.mT, covariance(x)[flat][:, flat])
    torch.testing.assert_close(inverse, inverse.tril(), atol=1e-9, rtol=0)
    explained = z.var(0, correction=0).view(-1, group).sum(1)
    torch.testing.assert_close(subspace.variance, explained)
    tail = explained.flip(0).cumsum(0).flip(0) / explained.sum()
    torch.testing.assert_close(subspace.variance_curve, torch.cat([tail, torch.zeros(1, dtype=torch.float64)]))


@pytest.mark.parametrize("group", GROUPS)
def test_variance_of_a_unit_is_what_earlier_units_leave_unexplained(group: int) -> None:
    x, weight, _ = tokens()
    columns = shuffled(group)
    subspace = factorise(covariance(x), weight, columns, 0.0)
    centred = (x - x.mean(0)).numpy()
    for i in range(M // group):
        before, own = centred[:, columns[:i].flatten().tolist()], centred[:, columns[i].tolist()]
        residual = own - before @ np.linalg.lstsq(before, own, rcond=None)[0] if i else own
        assert subspace.variance[i].item() == pytest.approx((residual**2).sum() / N, rel=1e-9)


@pytest.mark.parametrize("sensitive", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_loss_curve_is_the_loss_measured_on_the_tokens(group: int, sensitive: bool) -> None:
    x, weight, g = tokens()
    metric = g if sensitive else None
    subspace = factorise(covariance(x), weight, shuffled(group), 0.0, metric)
    units = M // group
    assert subspace.loss_curve.shape == (units + 1,)
    assert subspace.loss_curve[units] == 0.0
    for keep in range(units + 1):
        columns, refitted = truncate(subspace, weight, keep)
        error = x @ weight.mT - x[:, columns] @ refitted.mT
        error -= error.mean(0)
        measured = torch.einsum("no,op,np->", error, g if sensitive else torch.eye(D, dtype=torch.float64), error) / N
        assert subspace.loss_curve[keep].item() == pytest.approx(measured.item(), rel=1e-9, abs=1e-12)
    assert (subspace.energy >= 0).all()


@pytest.mark.parametrize("damping", [0.0, 1e-2])
@pytest.mark.parametrize("layout", ["neurons", "heads", "directions"])
def test_truncation_is_the_least_squares_refit_for_every_k(layout: str, damping: float) -> None:
    x, weight, _ = tokens(1)
    columns = {"neurons": shuffled(1), "heads": shuffled(3), "directions": direction_columns(3, 4)}[layout]
    c = covariance(x)
    subspace = factorise(c, weight, columns, damping)
    for keep in range(1, len(columns)):
        kept, refitted = truncate(subspace, weight, keep)
        assert kept.tolist() == sorted(columns[:keep].flatten().tolist())
        expected, bias = refit(x, weight, kept, damping * c.diagonal().mean().item())
        torch.testing.assert_close(refitted, expected, atol=1e-9, rtol=1e-9)
        if damping == 0.0:  # with an explicit constant input instead of centring
            inputs = np.concatenate([x[:, kept].numpy(), np.ones((N, 1))], axis=1)
            solution = np.linalg.lstsq(inputs, (x @ weight.mT).numpy(), rcond=None)[0].T
            torch.testing.assert_close(refitted, torch.from_numpy(solution[:, :-1]), atol=1e-9, rtol=1e-9)
            torch.testing.assert_close(bias, torch.from_numpy(solution[:, -1].copy()), atol=1e-9, rtol=1e-9)


def test_damped_loss_curve_is_the_ridge_objective() -> None:
    """loss_curve counts λ‖W' - W‖² on what was kept and λ‖W‖² on what was dropped."""
    x, weight, _ = tokens(2)
    c = covariance(x)
    subspace = factorise(c, weight, shuffled(1), 0.05)
    ridge = 0.05 * c.diagonal().mean()
    for keep in range(M + 1):
        columns, refitted = truncate(subspace, weight, keep)
        change = weight.clone()
        change[:, columns] -= refitted
        error = (x - x.mean(0)) @ change.mT
        objective = error.square().sum() / N + ridge * change.square().sum()
        torch.testing.assert_close(subspace.loss_curve[keep], objective)


@pytest.mark.parametrize("group", GROUPS)
def test_keeping_everything_changes_no_bit(group: int) -> None:
    x, weight, _ = tokens()
    columns, refitted = truncate(factorise(covariance(x), weight, shuffled(group), 1e-3), weight, M // group)
    assert torch.equal(columns, torch.arange(M))
    assert torch.equal(refitted, weight)


def test_kept_set_decides_not_its_order() -> None:
    x, weight, _ = tokens()
    order = shuffled(1).flatten()
    other = torch.cat([order[:7].flip(0), order[7:].flip(0)])
    first, second = (factorise(covariance(x), weight, unit_columns(o, 1), 1e-3) for o in (order, other))
    for a, b in zip(truncate(first, weight, 7), truncate(second, weight, 7), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(first.loss_curve[7], second.loss_curve[7])


def test_rescue_is_reported() -> None:
    x, weight, _ = tokens()
    x[:, 5] = x[:, 2]
    subspace = factorise(covariance(x), weight, shuffled(1), 0.0)
    assert subspace.damping > 0.0
    lost = subspace.loss_curve[M - 1] / subspace.loss_curve[0]
    assert 0.0 <= lost < 1.0


def test_inputs_are_not_modified() -> None:
    x, weight, g = tokens()
    c = covariance(x)
    before = [t.clone() for t in (c, weight, g)]
    truncate(factorise(c, weight, shuffled(1), 1e-3, g), weight, 4)
    assert all(torch.equal(a, b) for a, b in zip(before, (c, weight, g), strict=True))


def test_unit_columns() -> None:
    assert unit_columns(torch.tensor([2, 0]), 3).tolist() == [[6, 7, 8], [0, 1, 2]]
    assert unit_columns(torch.tensor([2, 0]), 1).tolist() == [[2], [0]]


def test_curves_of_a_site_without_signal() -> None:
    zeros = torch.zeros(2, dtype=torch.float64)
    subspace = Subspace(unit_columns(torch.arange(2), 1), torch.eye(2, dtype=torch.float64), zeros, zeros, 0.0)
    assert subspace.variance_curve.tolist() == [0.0, 0.0, 0.0]
    assert subspace.loss_curve.tolist() == [0.0, 0.0, 0.0]


def test_one_of_each_part_comes_first_and_the_order_stays() -> None:
    order = torch.tensor([5, 4, 1, 0, 2, 3, 7, 6])
    assert one_of_each(order, torch.arange(8) // (8 // 4)).tolist() == [5, 1, 2, 7, 4, 0, 3, 6]
    assert one_of_each(order, torch.arange(8) // (8 // 2)).tolist() == [5, 1, 4, 0, 2, 3, 7, 6]
    assert torch.equal(one_of_each(order, torch.arange(8) // (8 // 1)), order)
    assert torch.equal(one_of_each(order, torch.arange(8) // (8 // 8)), order)
