"""Least-squares repair of a consumer whose inputs were pruned, and what the repair leaves lost.

With r = target - (W x + b) the target only enters through R = E r (x - Ex)ᵀ: the consumer refitted with all inputs
present is W* = W + R (C + λI)⁻¹, and pruning from W* by `subspace.truncate` gives exactly the ridge solution for the
target, with the ridge pulling towards the dense W (not towards zero). The target `self` has r = 0 and W* = W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .linalg import ROWS, damped_cholesky, strips
from .moments import Moments
from .orders import ORDERS, UnitStatistics
from .stopwatch import timed
from .subspace import Subspace, factorise, one_of_each, unit_columns


@dataclass(frozen=True)
class Pruned:
    """A consumer after pruning.

    columns  (k·g,) long, ascending: the inputs that are left
    weight   (d, k·g) float64, bias (d,) float64
    lost     output energy E‖target - output‖², centred, on the calibration tokens
    total    centred output energy of the unpruned layer on the same tokens
    damping  λ / mean diagonal that was used
    """

    columns: Tensor
    weight: Tensor
    bias: Tensor
    lost: float
    total: float
    damping: float


@timed("repair")
def refit_all(moments: Moments, weight: Tensor, damping: float, share: float = 1.0) -> tuple[Tensor, float]:
    """W* (d, m), the consumer refitted to its target with all inputs present, and the damping that was needed.

    share: of the way from W to the least-squares solution, W* = W + share · R (C + λI)⁻¹.
    """
    residual = moments.residual_covariance
    if residual is None:
        return weight, damping
    lower, used = damped_cholesky(moments.covariance, damping)
    # R (L Lᵀ)⁻¹ by two triangular solves: `cholesky_solve` would copy the factor.
    refitted = weight.clone()
    for rows in strips(weight.shape[0], ROWS):
        half = torch.linalg.solve_triangular(lower.mT, residual[rows].double(), upper=True, left=False)
        refitted[rows] += share * torch.linalg.solve_triangular(lower, half, upper=False, left=False)
    return refitted, used


def output_energy(moments: Moments, weight: Tensor) -> float:
    """E‖W (x - E x)‖² = tr(W C Wᵀ) of weight (d, m)."""
    covariance = moments.covariance
    energy = weight.new_zeros(())
    for rows in strips(weight.shape[0], ROWS):
        part = weight[rows].to(covariance.dtype)
        energy += ((part @ covariance) * part).sum(dtype=torch.float64)
    return energy.item()


def lost_energy(moments: Moments, weight: Tensor, columns: Tensor, refit: Tensor) -> float:
    """E‖r + W x - W' x_K‖², centred: exact on the tokens of `moments`, whatever W' (d, k) is."""
    error = weight.clone()
    error[:, columns] -= refit
    lost = output_energy(moments, error) + moments.residual_variance
    residual = moments.residual_covariance
    if residual is not None:
        lost += 2.0 * (error * residual).sum().item()
    return max(0.0, lost)


def refit_bias(moments: Moments, weight: Tensor, bias: Tensor, columns: Tensor, refit: Tensor) -> Tensor:
    """b' = b + E r + W μ - W' μ_K, (d,): the mean output is that of the target."""
    mean = moments.mean
    repaired = bias + weight @ mean - refit @ mean[columns]
    return repaired if moments.mean_residual is None else repaired + moments.mean_residual


@timed("repair")
def finish(
    moments: Moments, weight: Tensor, bias: Tensor | None, columns: Tensor, refit: Tensor, damping: float
) -> Pruned:
    """Bias and energies for a refitted weight (d, k·g) over `columns`; without a bias to refit it stays zero."""
    total = output_energy(moments, weight)
    lost = lost_energy(moments, weight, columns, refit)
    unrepaired = weight.new_zeros(weight.shape[0])
    new_bias = unrepaired if bias is None else refit_bias(moments, weight, bias, columns, refit)
    return Pruned(columns, refit, new_bias, lost, total, damping)


def subspace_of_units(
    moments: Moments,
    weight: Tensor,
    order: str,
    group: int,
    damping: float,
    sensitivity: Tensor | None = None,
    keep: int | None = None,
    nonnegative: bool = False,
    generator: torch.Generator | None = None,
    sensitive_order: bool = False,
    energies: bool = True,
    parts: Tensor | None = None,
) -> Subspace:
    """Order the units of a site by a criterion of `ORDERS` and factorise. weight (d, m): refitted, see `refit_all`.

    The sensitivity weighs the energies, and with `sensitive_order` what the criterion sees, too. `energies` False
    leaves them out: pruning to a known count does not need them. parts (u,): of which each keeps a unit, see
    `one_of_each`; None for one.
    """
    covariance = moments.covariance
    seen = sensitivity if sensitive_order else None
    statistics = UnitStatistics(covariance, moments.mean, weight, group, damping, seen, keep, nonnegative, generator)
    with timed("order"):
        units = ORDERS[order](statistics)
        columns = unit_columns(units if parts is None else one_of_each(units, parts), group)
    return factorise(covariance, weight if energies else None, columns, damping, sensitivity)


def without_repair(moments: Moments, subspace: Subspace, weight: Tensor, bias: Tensor | None, keep: int) -> Pruned:
    """Drop the units and leave everything else as it was: the floor that the repair is measured against.

    What is lost includes the shift of the mean output, which nothing corrects.
    """
    columns = subspace.columns[:keep].flatten().sort().values
    refit = weight[:, columns]
    total = output_energy(moments, weight)
    lost = lost_energy(moments, weight, columns, refit)
    if bias is None:
        return Pruned(columns, refit, weight.new_zeros(weight.shape[0]), lost, total, 0.0)
    lost += (refit_bias(moments, weight, bias, columns, refit) - bias).square().sum().item()
    return Pruned(columns, refit, bias, lost, total, 0.0)
