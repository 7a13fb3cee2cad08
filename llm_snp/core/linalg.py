"""Damped factorisations: a rescue is reported in the result, never silent."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NumericalError

# Each failed attempt multiplies the damping by ten, from the asked one (or the first rung) up to 1.
FIRST_RUNG = 1e-10


def mean_diagonal(matrix: Tensor) -> float:
    """Mean of the diagonal of matrix (m, m); 1.0 for a matrix of zeros, so that damping always acts."""
    return matrix.diagonal().mean().item() or 1.0


def damped_cholesky(covariance: Tensor, damping: float) -> tuple[Tensor, float]:
    """Lower Cholesky factor of covariance + λ I with λ = damping · mean diagonal.

    covariance (m, m) float64, symmetric. Returns the factor (m, m) and the damping that was needed: the asked one,
    or the first of a ladder of tenfold increases for which the factorisation succeeds. A pivot that is rounding
    counts as a failure: a singular matrix can pass by luck, and its inverse would then be noise.
    Raises `NumericalError` if the matrix is not finite or no damping up to 1 helps.
    """
    if not torch.isfinite(covariance).all():
        raise NumericalError("the moments of the activations are not finite; use --dtype float32 or bfloat16")
    scale = mean_diagonal(covariance)
    rounding = covariance.shape[0] * torch.finfo(covariance.dtype).eps
    rung = damping
    while True:
        damped = covariance.clone()
        damped.diagonal().add_(rung * scale)
        factor, info = torch.linalg.cholesky_ex(damped)
        if info.item() == 0 and (factor.diagonal().square() > rounding * damped.diagonal()).all():
            return factor, rung
        if rung >= 1.0:
            raise NumericalError(
                f"the {tuple(covariance.shape)} moment matrix is not positive definite even with damping {rung:g}; "
                "its entries are corrupt or the activations overflowed: use --dtype float32"
            )
        rung = min(1.0, max(rung * 10.0, FIRST_RUNG))


def symmetric_power(matrix: Tensor, exponent: float) -> Tensor:
    """matrix ** exponent for symmetric positive definite (..., m, m), by eigendecomposition in its own dtype.

    Eigenvalues are floored at machine epsilon times the largest one: below that they are rounding.
    """
    values, vectors = torch.linalg.eigh(matrix)
    floor = values[..., -1:].clamp_min(torch.finfo(values.dtype).tiny) * torch.finfo(values.dtype).eps
    return (vectors * values.clamp_min(floor).pow(exponent).unsqueeze(-2)) @ vectors.mT
