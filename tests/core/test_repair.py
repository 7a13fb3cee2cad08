"""Repair against a dense least-squares solve on the tokens, for every target."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from llm_snp.core.moments import Moments
from llm_snp.core.orders import ORDERS
from llm_snp.core.repair import (
    Pruned,
    finish,
    lost_energy,
    refit_all,
    refit_bias,
    subspace_of_units,
    without_repair,
)
from llm_snp.core.subspace import Subspace, truncate

N, M, D = 260, 12, 4


def exact_moments(x: Tensor, residual: Tensor | None = None, centred: bool = True) -> Moments:
    """Moments of float64 tokens without the fp32 products of `Moments.add`, so that identities hold to rounding."""
    shifted = x - x.mean(0).float().double()
    return Moments(
        shift=x.mean(0).float(),
        first=shifted.sum(0),
        second=(shifted.mT @ shifted)[None],
        residual=None if residual is None else residual.sum(0),
        cross=None if residual is None else residual.mT @ shifted,
        power=None if residual is None else residual.square().sum(),
        tokens=x.shape[0],
        centred=centred,
    )


def problem(n: int = N, m: int = M, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (n, m), a residual (n, D) that partly depends on x, weight (D, m), bias (D,); float64."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    x = normal(n, m) @ normal(m, m) / m**0.5 + 2 * normal(m)
    residual = 0.2 * x @ normal(m, D) + 0.3 * normal(n, D) + normal(D)
    return x, residual, normal(D, m), normal(D)


def repaired(
    moments: Moments, subspace: Subspace, weight: Tensor, bias: Tensor | None, refitted: Tensor, keep: int
) -> Pruned:
    return finish(moments, weight, bias, *truncate(subspace, refitted, keep), subspace.damping)


def prune(
    moments: Moments,
    weight: Tensor,
    bias: Tensor | None,
    keep: int,
    order: str = "greedy",
    group: int = 1,
    damping: float = 0.0,
    nonnegative: bool = False,
) -> Pruned:
    refitted, _ = refit_all(moments, weight, damping)
    generator = torch.Generator().manual_seed(0)
    subspace = subspace_of_units(moments, refitted, order, group, damping, None, keep, nonnegative, generator)
    return repaired(moments, subspace, weight, bias, refitted, keep)


def output(x: Tensor, pruned: Pruned) -> Tensor:
    return x[:, pruned.columns] @ pruned.weight.mT + pruned.bias


def energy(error: Tensor) -> float:
    return error.square().sum().item() / error.shape[0]


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("target", ["self", "dense"])
def test_is_least_squares_of_the_target_with_bias(target: str, group: int) -> None:
    x, residual, weight, bias = problem()
    y = x @ weight.mT + bias
    moments = exact_moments(x, None if target == "self" else residual)
    goal = y if target == "self" else y + residual
    for keep in range(1, M // group + 1):
        pruned = prune(moments, weight, bias, keep, group=group)
        inputs = np.concatenate([x[:, pruned.columns].numpy(), np.ones((N, 1))], axis=1)
        solution = torch.from_numpy(np.linalg.lstsq(inputs, goal.numpy(), rcond=None)[0].T.copy())
        torch.testing.assert_close(pruned.weight, solution[:, :-1], atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(pruned.bias, solution[:, -1], atol=1e-8, rtol=1e-8)
        error = goal - output(x, pruned)
        torch.testing.assert_close(error.mean(0), torch.zeros(D, dtype=torch.float64), atol=1e-10, rtol=0)
        assert pruned.lost == pytest.approx(energy(error), rel=1e-8, abs=1e-10)
        assert pruned.total == pytest.approx(energy(y - y.mean(0)), rel=1e-9)
        assert pruned.damping == 0.0


def test_ridge_pulls_to_the_dense_weight() -> None:
    x, residual, weight, bias = problem(seed=1)
    moments, damping = exact_moments(x, residual), 0.03
    ridge = damping * moments.covariance.diagonal().mean().item()
    goal = (x - x.mean(0)) @ weight.mT + residual - residual.mean(0)
    for keep in (1, 5, 11, M):
        pruned = prune(moments, weight, bias, keep, damping=damping)
        kept = pruned.columns
        inputs = np.concatenate([(x - x.mean(0))[:, kept].numpy() / N**0.5, ridge**0.5 * np.eye(keep)])
        outputs = np.concatenate([goal.numpy() / N**0.5, ridge**0.5 * weight[:, kept].numpy().T])
        expected = torch.from_numpy(np.linalg.lstsq(inputs, outputs, rcond=None)[0].T.copy())
        torch.testing.assert_close(pruned.weight, expected, atol=1e-9, rtol=1e-9)
        error = x @ weight.mT + bias + residual - output(x, pruned)
        assert pruned.lost == pytest.approx(energy(error), rel=1e-9)
        assert pruned.damping == damping


def test_a_share_goes_that_far_towards_the_target() -> None:
    """The error falls with the share as its parabola says: half the way takes away three quarters of what can go."""
    x, residual, weight, _ = problem(seed=4)
    moments = exact_moments(x, residual)
    whole, _ = refit_all(moments, weight, 0.0)
    half, _ = refit_all(moments, weight, 0.0, share=0.5)
    none, _ = refit_all(moments, weight, 0.0, share=0.0)
    torch.testing.assert_close(half, (weight + whole) / 2)
    assert torch.equal(none, weight)
    everything = torch.arange(weight.shape[1])
    lost = [lost_energy(moments, weight, everything, refit) for refit in (none, half, whole)]
    assert (lost[0] - lost[1]) / (lost[0] - lost[2]) == pytest.approx(0.75)


def test_huge_damping_leaves_the_weight_alone() -> None:
    x, residual, weight, bias = problem()
    pruned = prune(exact_moments(x, residual), weight, bias, 5, damping=1e9)
    torch.testing.assert_close(pruned.weight, weight[:, pruned.columns], atol=1e-6, rtol=1e-6)


def test_without_a_bias_nothing_is_centred() -> None:
    x, residual, weight, _ = problem(seed=2)
    pruned = prune(exact_moments(x, residual, centred=False), weight, None, 6)
    goal = x @ weight.mT + residual
    expected = np.linalg.lstsq(x[:, pruned.columns].numpy(), goal.numpy(), rcond=None)[0].T
    torch.testing.assert_close(pruned.weight, torch.from_numpy(expected.copy()), atol=1e-8, rtol=1e-8)
    assert not pruned.bias.any()
    assert pruned.lost == pytest.approx(energy(goal - output(x, pruned)), rel=1e-8)
    assert pruned.total == pytest.approx(energy(x @ weight.mT), rel=1e-9)


@pytest.mark.parametrize("with_residual", [False, True])
def test_lost_energy_is_measured_energy_for_any_weight(with_residual: bool) -> None:
    x, residual, weight, bias = problem(seed=3)
    moments = exact_moments(x, residual if with_residual else None)
    columns = torch.tensor([0, 3, 4, 10])
    anything = torch.randn(D, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    goal = x @ weight.mT + bias + (residual if with_residual else 0.0)
    error = goal - x[:, columns] @ anything.mT
    assert lost_energy(moments, weight, columns, anything) == pytest.approx(energy(error - error.mean(0)), rel=1e-9)
    torch.testing.assert_close(refit_bias(moments, weight, bias, columns, anything), error.mean(0))


def test_moments_from_tokens_give_the_same_repair() -> None:
    """The whole path in the precision of a run: fp32 activations, batches, shift."""
    x, residual, weight, bias = problem(seed=4)
    x, residual = x.float() + 100.0, residual.float()
    moments = Moments.like(x[:50], residual[:50])
    for rows in (slice(0, 50), slice(50, 51), slice(51, N)):
        moments.add(x[rows], residual[rows])
    x, residual = x.double(), residual.double()
    for keep in (3, 9):
        pruned = prune(moments, weight, bias, keep)
        inputs = np.concatenate([(x - x.mean(0))[:, pruned.columns].numpy(), np.ones((N, 1))], axis=1)
        goal = x @ weight.mT + bias + residual
        solution = torch.from_numpy(np.linalg.lstsq(inputs, goal.numpy(), rcond=None)[0].T.copy())
        torch.testing.assert_close(pruned.weight, solution[:, :-1], atol=1e-4, rtol=1e-3)
        best = energy(goal - torch.from_numpy(inputs) @ solution.mT)
        assert pruned.lost == pytest.approx(best, rel=1e-4)
        assert energy(goal - output(x, pruned)) == pytest.approx(best, rel=1e-4)


def test_repair_beats_no_repair_and_no_repair_changes_nothing() -> None:
    x, _, weight, bias = problem(seed=5)
    moments = exact_moments(x)
    for keep in (3, 7, 11):
        subspace = subspace_of_units(moments, weight, "energy", 1, 0.0)
        bare = without_repair(moments, subspace, weight, bias, keep)
        result = repaired(moments, subspace, weight, bias, weight, keep)
        assert torch.equal(bare.columns, result.columns)
        assert torch.equal(bare.weight, weight[:, bare.columns])
        assert torch.equal(bare.bias, bias)
        error = x @ weight.mT + bias - output(x, bare)
        # Nothing corrects the mean here, so it counts: the second moment of the error, not its variance.
        assert bare.lost == pytest.approx(error.square().sum(1).mean().item(), rel=1e-9)
        assert bare.total == pytest.approx(result.total)
        assert result.lost < bare.lost


@pytest.mark.parametrize("damping", [0.0, 1e-4])
@pytest.mark.parametrize("order", ["greedy", "energy", "wanda", "leverage", "loo", "zca"])
def test_dead_and_constant_neurons_lose_nothing(order: str, damping: float) -> None:
    """A neuron that never fires, or always fires the same, is taken first; its constant goes into the bias."""
    x, _, weight, bias = problem(seed=6)
    dead, constant = [1, 8], [4, 5, 11]
    x[:, dead] = 0.0
    x[:, constant] = torch.tensor([3.0, -7.0, 0.5], dtype=torch.float64)
    pruned = prune(exact_moments(x), weight, bias, M - 5, order, damping=damping)
    assert pruned.columns.tolist() == [i for i in range(M) if i not in dead + constant]
    y = x @ weight.mT + bias
    torch.testing.assert_close(output(x, pruned), y, atol=1e-4 * damping + 1e-8, rtol=1e-9)
    assert pruned.lost <= 1e-12 * pruned.total


@pytest.mark.parametrize("order", sorted(ORDERS))
def test_dead_layer_stays_finite(order: str) -> None:
    _, _, weight, bias = problem()
    x = torch.zeros(50, M, dtype=torch.float64)
    pruned = prune(exact_moments(x), weight, bias, 3, order, nonnegative=True)
    assert torch.isfinite(pruned.weight).all()
    torch.testing.assert_close(output(x, pruned), bias.expand(50, D))
    assert pruned.lost == pruned.total == 0.0


def test_fewer_tokens_than_neurons() -> None:
    """n tokens span n - 1 centred directions: that many neurons reproduce the output on them exactly."""
    n, m = 15, 40
    x, _, weight, bias = problem(n, m, seed=7)
    moments = exact_moments(x)
    pruned = prune(moments, weight, bias, n - 1)
    assert pruned.damping > 0.0
    assert torch.isfinite(pruned.weight).all()
    assert pruned.lost < 1e-7 * pruned.total
    fewer = prune(moments, weight, bias, n - 5)
    assert fewer.lost > 1e-4 * fewer.total
    torch.testing.assert_close(output(x, pruned), x @ weight.mT + bias, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_copies_of_units_lose_nothing(scale: float, group: int) -> None:
    x, _, _, bias = problem(seed=8)
    x = torch.cat([x, scale * x[:, :6] + 5.0], 1)
    weight = torch.randn(D, M + 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = x @ weight.mT + bias
    for damping in (0.0, 1e-8):
        pruned = prune(exact_moments(x), weight, bias, M // group, group=group, damping=damping)
        assert pruned.lost < 1e-7 * pruned.total
        torch.testing.assert_close(output(x, pruned), y, atol=1e-3, rtol=1e-3)
        kept = {column % M if column >= M else column for column in pruned.columns.tolist()}
        assert kept == set(range(M)), "one of each pair is left"


def test_copies_are_merged_with_the_weight_of_both() -> None:
    x, _, weight, bias = problem(seed=9)
    x[:, 1] = x[:, 0]
    pruned = prune(exact_moments(x), weight, bias, M - 1)
    left = 0 if 0 in pruned.columns.tolist() else 1
    torch.testing.assert_close(pruned.weight[:, 0], weight[:, 0] + weight[:, 1], atol=1e-5, rtol=1e-5)
    assert sorted({*pruned.columns.tolist(), 1 - left}) == list(range(M))


def test_keeping_everything_with_target_self_changes_no_bit() -> None:
    x, _, weight, bias = problem()
    pruned = prune(exact_moments(x), weight, bias, M, damping=1e-3)
    assert torch.equal(pruned.weight, weight)
    assert pruned.lost == 0.0
    torch.testing.assert_close(pruned.bias, bias, atol=1e-12, rtol=1e-12)
