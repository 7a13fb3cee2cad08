"""The subspace of Subspace Node Pruning: a block-triangular transform that makes ordered units uncorrelated.

Offergeld, van Gerven, Ahmad, arXiv 2405.17506. With P the order of the units and P (C + λI) Pᵀ = L Lᵀ, the
coordinates z = L⁻¹ P (x - Ex) are white, coordinates of unit i depend on units 1..i only, and dropping the tail of z
is dropping the tail of x. One factorisation gives the loss of keeping k units for every k, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .linalg import ROWS, damped_cholesky, strips, tail_sums
from .stopwatch import timed


@dataclass(frozen=True)
class Subspace:
    """Units in an order, with what each adds.

    columns   (u, g) long: the consumer's columns of each unit, most important unit first
    lower     (m, m) float64: Cholesky factor L of the permuted, damped covariance; its diagonal blocks times their
              transposes are the paper's D
    variance  (u,): tr D_i, the input variance of unit i that the units before it do not explain
    energy    (u,): ε_i = tr(W̃_i G W̃_iᵀ D_i), the output energy lost with unit i; None if it was not asked for
    damping   λ / mean diagonal that was used
    """

    columns: Tensor
    lower: Tensor
    variance: Tensor
    energy: Tensor | None
    damping: float

    @property
    def loss_curve(self) -> Tensor:
        """(u+1,): entry k is the (damped) output energy lost when the first k units are kept and refitted."""
        assert self.energy is not None
        return tail_sums(self.energy)

    @property
    def variance_curve(self) -> Tensor:
        """(u+1,): entry k is Σ_{i>k} tr D_i as a share of Σ tr D_i, the quantity that τ cuts."""
        tail = tail_sums(self.variance)
        return tail / tail[0].clamp_min(torch.finfo(tail.dtype).tiny)


def unit_columns(order: Tensor, group: int) -> Tensor:
    """(u, g) columns of units that lie side by side, in the given order (u,)."""
    return order.view(-1, 1) * group + torch.arange(group, device=order.device)


def one_of_each(order: Tensor, parts: Tensor) -> Tensor:
    """An order (u,) of units in which the first of every part come first: one of each stays.

    parts (u,) long: the part that each unit belongs to.
    """
    part = parts.to(order.device)[order]
    first = torch.zeros_like(order, dtype=torch.bool)
    names: Tensor = torch.unique(part)  # type: ignore[no-untyped-call]
    first[(part == names.unsqueeze(1)).int().argmax(1)] = True
    return torch.cat([order[first], order[~first]])


@timed("subspace")
def factorise(
    covariance: Tensor, weight: Tensor | None, columns: Tensor, damping: float, sensitivity: Tensor | None = None
) -> Subspace:
    """Factorise covariance (m, m) in the order of columns (u, g), for a consumer weight (d, m).

    Without a weight no energies are computed; they cost as much as the factorisation, and only curves need them.
    The factor is float64 whatever the covariance is. Raises `NumericalError` if no damping makes it possible.
    """
    flat = columns.flatten()
    lower, used = damped_cholesky(covariance, damping, flat)
    u, g = columns.shape
    energy = None
    if weight is not None:
        z = weight[:, flat] @ lower
        weighted = z if sensitivity is None else sensitivity @ z
        energy = (z * weighted).sum(0).view(u, g).sum(1).clamp_min(0.0)
    blocks = lower.view(u, g, u, g).diagonal(dim1=0, dim2=2)
    return Subspace(columns, lower, blocks.square().sum((0, 1)), energy, used)


@timed("repair")
def truncate(subspace: Subspace, weight: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Keep the first `keep` units and fold the rest into them by least squares.

    W' = W_K + W_P L_PK L_KK⁻¹ (METHOD, section 2): a triangular solve with d right-hand sides, no inverse. The rows of
    a weight do not know of each other: taken some at a time, they need no copy of the whole.
    weight (d, m). Returns the kept columns (k·g,) ascending and the refitted weight (d, k·g) in that order.
    """
    flat, k = subspace.columns.flatten(), keep * subspace.columns.shape[1]
    kept, pruned = flat[:k], flat[k:]
    ascending = torch.argsort(kept)
    refit = weight.new_empty(weight.shape[0], k)
    for rows in strips(weight.shape[0], ROWS):
        part = weight[rows]
        folded = part[:, pruned] @ subspace.lower[k:, :k]
        folded = torch.linalg.solve_triangular(subspace.lower[:k, :k], folded, upper=False, left=False)
        refit[rows] = part[:, kept].add_(folded)[:, ascending]
    return kept[ascending], refit
