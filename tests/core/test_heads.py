"""Subspaces inside heads (METHOD, section 7): bases fold away, and their first rows are the best ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm_snp.core.heads import (
    damp_heads,
    direction_columns,
    to_basis,
    transform_rows,
    value_basis,
)

H, W, D, N = 3, 4, 10, 150


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(seed: int) -> Tensor:
    """(N, H, W) with a mean and correlated directions of unequal size."""
    mix = normal(seed, H, W, W) * torch.tensor([3.0, 1.0, 0.5, 0.2], dtype=torch.float64)
    return torch.einsum("nhw,hvw->nhv", normal(seed + 1, N, H, W), mix) + 2 * normal(seed + 2, H, W)


def centred(x: Tensor) -> Tensor:
    """(H, W, W) covariances."""
    x = x - x.mean(0)
    return torch.einsum("nhv,nhw->hvw", x, x) / x.shape[0]


def spd(seed: int, m: int) -> Tensor:
    x = normal(seed, m, 2 * m)
    return x @ x.mT


def root(matrix: Tensor) -> Tensor:
    """Any factor F with FᵀF = matrix has the same singular values behind it as the symmetric root."""
    return torch.linalg.cholesky(matrix).mT


def refit_loss(covariance: Tensor, o: Tensor, features: Tensor, g: Tensor) -> float:
    """Least output energy left for a head's o (D, W) when only features (r, W) of the value are seen, dense solve."""
    seen = features @ covariance
    best = torch.linalg.solve(seen @ features.mT, seen @ o.mT).mT
    error = o - best @ features
    return torch.trace(g @ error @ covariance @ error.mT).item()


@pytest.mark.parametrize("sensitive", [False, True])
def test_value_basis_is_orthonormal_and_optimal_for_every_rank(sensitive: bool) -> None:
    a, weight = tokens(0), normal(5, D, H * W)
    covariance = centred(a)
    g = spd(6, D) if sensitive else torch.eye(D, dtype=torch.float64)
    basis = value_basis(covariance, weight, 0.0, g if sensitive else None)
    assert basis.shape == (H, W, W)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(W, dtype=torch.float64).expand(H, W, W))
    for head in range(H):
        o = weight[:, head * W : (head + 1) * W]
        s = torch.linalg.svdvals(root(g) @ o @ root(covariance[head]).mT)
        for rank in range(1, W + 1):
            lost = refit_loss(covariance[head], o, basis[head, :rank], g)
            tail = s[rank:].square().sum().item()
            assert lost == pytest.approx(tail, rel=1e-8, abs=1e-8 * s[0].item() ** 2)
            for seed in range(5):
                other = refit_loss(covariance[head], o, normal(100 + seed, rank, W), g)
                assert lost <= other * (1 + 1e-9) + 1e-9


def test_value_basis_with_a_damping_minimises_the_damped_loss() -> None:
    covariance, weight = centred(tokens(0)), normal(5, D, H * W)
    damped, used = damp_heads(covariance, 0.05)
    assert used == 0.05
    ridged = covariance + 0.05 * covariance.diagonal(dim1=1, dim2=2).mean(1).view(H, 1, 1) * torch.eye(W)
    torch.testing.assert_close(damped, ridged)
    first, second = (b[:, :2] for b in (value_basis(covariance, weight, 0.05), value_basis(ridged, weight, 0.0)))
    torch.testing.assert_close(first.mT @ first, second.mT @ second)


def test_value_basis_measured_on_tokens() -> None:
    """The first r rows, with out_proj refitted on them, lose Σ_{i>r} s_i² of the head's output energy."""
    a, weight = tokens(7), normal(8, D, H * W)
    basis = value_basis(centred(a), weight, 0.0)
    head, rank = 1, 2
    o = weight[:, head * W : (head + 1) * W]
    values = a[:, head] - a[:, head].mean(0)
    features = values @ basis[head, :rank].mT
    target = values @ o.mT
    error = target - features @ torch.linalg.lstsq(features, target).solution
    s = torch.linalg.svdvals(o @ root(centred(a)[head]).mT)
    assert error.square().sum().item() / N == pytest.approx(s[rank:].square().sum().item(), rel=1e-9)


def test_dead_head_gets_a_finite_basis() -> None:
    covariance, weight = centred(tokens(0)), normal(5, D, H * W)
    covariance[2] = 0.0
    for damping in (0.0, 1e-3):
        basis = value_basis(covariance, weight, damping)
        assert torch.isfinite(basis).all()
        torch.testing.assert_close(basis @ basis.mT, torch.eye(W, dtype=torch.float64).expand(H, W, W))
    assert damp_heads(covariance, 0.0)[1] > 0.0


def test_inputs_are_not_modified() -> None:
    covariance, weight = centred(tokens(0)), normal(5, D, H * W)
    before = covariance.clone(), weight.clone()
    value_basis(covariance, weight, 1e-2)
    assert torch.equal(covariance, before[0])
    assert torch.equal(weight, before[1])


def test_transforms_fold_into_the_projections() -> None:
    """q, k and v computed by transformed weights and biases are the transformed q, k and v."""
    hidden, weight, bias = normal(40, 20, D), normal(41, H * W, D), normal(42, H * W)
    basis = normal(43, H, 2, W)
    rows, row_bias = transform_rows(weight, bias, basis)
    assert rows.shape == (H * 2, D)
    assert row_bias is not None
    expected = torch.einsum("hrw,nhw->nhr", basis, (hidden @ weight.mT + bias).view(-1, H, W))
    torch.testing.assert_close((hidden @ rows.mT + row_bias).view(-1, H, 2), expected)
    assert transform_rows(weight, None, basis)[1] is None


def test_basis_of_the_values_folds_away() -> None:
    """Attention mixes tokens, not directions: out_proj · mix · v_proj is the same in any orthonormal basis."""
    hidden, v, v_bias, o = normal(50, 20, D), normal(51, H * W, D), normal(52, H * W), normal(53, D, H * W)
    basis = value_basis(centred(tokens(0)), o, 1e-3)
    attention = normal(54, H, 20, 20).softmax(-1)

    def block(v: Tensor, v_bias: Tensor, o: Tensor) -> Tensor:
        values = (hidden @ v.mT + v_bias).view(20, H, -1)
        return torch.einsum("hnm,mhr->nhr", attention, values).flatten(1) @ o.mT

    rows, row_bias = transform_rows(v, v_bias, basis)
    assert row_bias is not None
    torch.testing.assert_close(block(rows, row_bias, to_basis(o, basis)), block(v, v_bias, o))


def test_to_basis_is_a_product_with_the_block_diagonal() -> None:
    matrix, basis = normal(60, 7, H * W), normal(61, H, 2, W)
    torch.testing.assert_close(to_basis(matrix, basis), matrix @ torch.block_diag(*basis).mT)
    orthonormal = torch.linalg.qr(normal(62, H, W, W))[0]
    back = to_basis(to_basis(matrix, orthonormal), orthonormal.mT)
    torch.testing.assert_close(back, matrix)


def test_direction_columns_are_one_direction_of_every_head() -> None:
    columns = direction_columns(H, W)
    assert columns.tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    matrix, basis = normal(70, 5, H * W), normal(71, H, W, W)
    kept = columns[:2].flatten().sort().values
    torch.testing.assert_close(to_basis(matrix, basis)[:, kept], to_basis(matrix, basis[:, :2]))
    rows, _ = transform_rows(matrix.mT.contiguous(), None, basis)
    torch.testing.assert_close(rows[kept], transform_rows(matrix.mT.contiguous(), None, basis[:, :2])[0])
