"""Damping and matrix powers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llm_snp.core import linalg
from llm_snp.core.linalg import (
    FIRST_RUNG,
    FLOAT64_COLUMNS,
    all_finite,
    damped_cholesky,
    damped_inverse,
    decomposed,
    mean_diagonal,
    mirror_lower,
    strips,
    symmetric_powers,
    working_dtype,
)
from llm_snp.errors import NumericalError


def positive(m: int, seed: int = 0, rank: int | None = None) -> Tensor:
    x = torch.randn(m, rank or 2 * m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.mT / x.shape[1]


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_regular_matrix_gets_the_damping_that_was_asked(damping: float) -> None:
    c = positive(7)
    before = c.clone()
    factor, used = damped_cholesky(c, damping)
    assert used == damping
    expected = c + damping * c.diagonal().mean() * torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(factor @ factor.mT, expected)
    assert torch.equal(factor, factor.tril())
    assert torch.equal(c, before)


@pytest.mark.parametrize("lowest", [-3e-9, -2e-6, -5e-3])
def test_ladder_reports_the_first_rung_that_works(lowest: float) -> None:
    basis, _ = torch.linalg.qr(positive(6))
    values = torch.tensor([lowest, 0.5, 1, 1, 1.5, 2 - lowest], dtype=torch.float64)  # mean diagonal 1
    c = basis @ torch.diag(values) @ basis.mT
    factor, used = damped_cholesky(c, 0.0)
    rung = FIRST_RUNG
    while rung + lowest <= 0:
        rung *= 10
    assert used == pytest.approx(rung)
    torch.testing.assert_close(factor @ factor.mT, c + used * torch.eye(6, dtype=torch.float64))


def test_ladder_starts_from_the_damping_that_was_asked() -> None:
    c = torch.diag(torch.tensor([1.0, 1.0, -0.05], dtype=torch.float64))
    _, used = damped_cholesky(c, 3e-3)
    assert used == pytest.approx(0.3)


@pytest.mark.parametrize("c", [torch.zeros(4, 4, dtype=torch.float64), torch.ones(4, 4, dtype=torch.float64)])
def test_singular_matrices_are_damped_and_the_factor_is_usable(c: Tensor) -> None:
    factor, used = damped_cholesky(c, 0.0)
    assert used == FIRST_RUNG
    assert factor.diagonal().min() > 0
    expected = c + used * mean_diagonal(c) * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(factor @ factor.mT, expected, atol=1e-15, rtol=0)


def test_rank_deficient_factor_has_no_pivot_of_rounding_size() -> None:
    """A pivot of 1e-17 is rounding, not variance: its reciprocal would be read as an importance."""
    for seed in range(20):
        c = positive(10, seed)
        c[9], c[:, 9] = c[4], c[:, 4].clone()
        c[9, 9] = c[4, 4]
        factor, used = damped_cholesky(c, 0.0)
        assert used >= FIRST_RUNG
        assert factor.diagonal().square().min() > 1e-12


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_raises(bad: float) -> None:
    c = positive(3)
    c[1, 2] = bad
    with pytest.raises(NumericalError, match="not finite"):
        damped_cholesky(c, 1e-3)


def test_hopeless_matrix_raises() -> None:
    c = torch.diag(torch.tensor([3.0, 1.0, -2.5], dtype=torch.float64))
    with pytest.raises(NumericalError, match="not positive definite"):
        damped_cholesky(c, 0.0)


def test_mean_diagonal() -> None:
    assert mean_diagonal(torch.diag(torch.tensor([1.0, 2.0, 6.0]))) == 3.0
    assert mean_diagonal(torch.zeros(2, 2)) == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_all_finite(dtype: torch.dtype) -> None:
    whole = torch.randn(7, 300).to(dtype)
    assert all_finite(whole)
    assert all_finite(whole[:0])
    assert all_finite(whole[0, 0])
    for value in (math.nan, math.inf, -math.inf):
        damaged = whole.clone()
        damaged[5, 123] = value
        assert not all_finite(damaged)
        assert not all_finite(damaged[5, 123])


def test_small_matrices_are_decomposed_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """And large ones where they are; the parts are the same."""
    c = torch.stack([positive(5, seed) for seed in range(3)])
    asked: list[int] = []
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: asked.append(1) or cpu(self))
    small = decomposed(torch.linalg.eigh, c)
    assert asked == [1]
    monkeypatch.setattr(linalg, "HOST_COLUMNS", 4)
    large = decomposed(torch.linalg.eigh, c)
    assert asked == [1]
    assert all(torch.equal(a, b) for a, b in zip(small, large, strict=True))


def test_symmetric_power_batched() -> None:
    c = torch.stack([positive(5, seed) for seed in range(3)])
    root, inverse_root = symmetric_powers(c, 0.5, -0.5)
    torch.testing.assert_close(root @ root, c)
    torch.testing.assert_close(root @ inverse_root, torch.eye(5, dtype=torch.float64).expand(3, 5, 5))
    torch.testing.assert_close(root, root.mT)


def test_symmetric_power_floors_rounding() -> None:
    c = positive(8, rank=3)
    (inverse_root,) = symmetric_powers(c, -0.5)
    assert torch.isfinite(inverse_root).all()
    limit = (c.diagonal().sum() * torch.finfo(torch.float64).eps).rsqrt()
    assert inverse_root.diagonal().max() < 10 * limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cholesky_in_an_order_works_on_a_copy(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_snp.core.linalg.STRIP_ROWS", 7)
    c = positive(20).to(dtype)
    before, order = c.clone(), torch.randperm(20, generator=torch.Generator().manual_seed(3))
    factor, used = damped_cholesky(c, 1e-3, order)
    assert torch.equal(c, before)
    damped = c.double()[order][:, order]
    damped.diagonal().add_(used * mean_diagonal(c))
    assert factor.dtype == torch.float64
    torch.testing.assert_close(factor @ factor.mT, damped, rtol=1e-12, atol=1e-12)
    assert torch.equal(factor, factor.tril())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_damped_inverse(dtype: torch.dtype) -> None:
    c = positive(20).to(dtype)
    inverse, used = damped_inverse(c, 1e-3)
    damped = c.double()
    damped.diagonal().add_(used * mean_diagonal(c))
    assert inverse.dtype == dtype
    assert inverse.is_contiguous()
    torch.testing.assert_close(inverse.double(), torch.linalg.inv(damped), rtol=1e-5, atol=1e-6)


def test_wide_sites_are_float32() -> None:
    assert working_dtype(FLOAT64_COLUMNS) == torch.float64
    assert working_dtype(FLOAT64_COLUMNS + 1) == torch.float32


@pytest.mark.parametrize("size", [1, 5, 12, 13])
def test_mirror_and_strips(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [i for rows in strips(size, 5) for i in range(rows.start, rows.stop)] == list(range(size))
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    expected = matrix.tril() + matrix.tril(-1).mT
    monkeypatch.setattr("llm_snp.core.linalg.STRIP_ROWS", 5)
    mirror_lower(matrix)
    assert torch.equal(matrix, expected)
