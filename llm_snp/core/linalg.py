"""Damped factorisations: a rescue is reported in the result, never silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..errors import NumericalError

# Up to so many columns moments and rankings are float64; wider ones are float32: half the memory and twice the speed,
# and sums that are good to 1e-6 of their diagonal, a thousandth of the default damping. Factors are always float64.
FLOAT64_COLUMNS = 4096
STRIP_ROWS = 1024
# Of a weight (d, m) so many rows at once are multiplied and solved for.
ROWS = 512
# Matrices of up to so many columns are decomposed on the host: the eigenvectors of 32 of 64 columns took 24 ms on an
# H200 and 10 ms there, their singular vectors 45 and 23.
HOST_COLUMNS = 128
# Each failed attempt multiplies the damping by ten, from the asked one (or the first rung) up to 1.
FIRST_RUNG = 1e-10


def working_dtype(columns: int) -> torch.dtype:
    """The type of moments and rankings of a site with that many columns."""
    return torch.float64 if columns <= FLOAT64_COLUMNS else torch.float32


def strips(rows: int, height: int | None = None) -> Iterator[slice]:
    """Slices that cover `rows` rows: what is done strip by strip needs no second matrix."""
    height = height or STRIP_ROWS
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


def tail_sums(values: Tensor) -> Tensor:
    """(u+1,): entry k is the sum of values (u,) from k on."""
    return torch.cat([values, values.new_zeros(1)]).flip(0).cumsum(0).flip(0)


def mirror_lower(matrix: Tensor) -> None:
    """Make matrix (m, m) symmetric in place by its lower triangle."""
    for rows in strips(matrix.shape[0]):
        block = matrix[rows, rows]
        block.copy_(block.tril() + block.tril(-1).mT)
        matrix[: rows.start, rows] = matrix[rows, : rows.start].mT


def all_finite(tensor: Tensor) -> Tensor:
    """Whether no entry is infinite or NaN, as a boolean () on the tensor's device.

    One pass without a temporary: on a CPU 25 to 80 times as fast as `isfinite`, which a whole checkpoint goes through.
    """
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    return torch.stack(torch.aminmax(tensor)).isfinite().all()  # a NaN is handed on as both


def mean_diagonal(matrix: Tensor) -> Tensor:
    """Mean of the diagonal of matrix (..., m, m), float64; 1.0 for a matrix of zeros, so that damping always acts."""
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1).double()
    return torch.where(mean == 0.0, 1.0, mean)


def rungs(damping: float) -> Iterator[float]:
    """The dampings to try: the asked one, then tenfold increases up to 1."""
    while True:
        yield damping
        if damping >= 1.0:
            return
        damping = min(1.0, max(damping * 10.0, FIRST_RUNG))


def factorised(matrix: Tensor, factor: Tensor, diagonal: Tensor, info: Tensor) -> bool:
    """Whether the Cholesky factors (..., m, m) are some, and no pivot is rounding; read back from the device once.

    matrix (..., m, m): before damping, as it was measured; diagonal (..., m): of what was factorised; info (...): what
    LAPACK said. Raises `NumericalError` if the matrix is not finite.
    """
    rounding = max(matrix.shape[-1] * torch.finfo(torch.float64).eps, torch.finfo(matrix.dtype).eps)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    found = torch.stack([all_finite(matrix), (info == 0).all() & (pivots > rounding * diagonal).all()])
    finite, good = found.cpu().tolist()
    if not finite:
        raise NumericalError("the moments of the activations are not finite; use --dtype float32 or bfloat16")
    return bool(good)


def corrupt(matrix: Tensor) -> NumericalError:
    """What is raised where no damping helps."""
    return NumericalError(
        f"the {tuple(matrix.shape)} moment matrix is not positive definite even with damping 1; "
        "its entries are corrupt or the activations overflowed: use --dtype float32"
    )


def damped_cholesky(covariance: Tensor, damping: float, order: Tensor | None = None) -> tuple[Tensor, float]:
    """Lower Cholesky factor of covariance + λ I with λ = damping · mean diagonal, rows and columns in `order` (m,).

    covariance (m, m), symmetric. Returns the factor (m, m) float64 and the damping that was needed: the asked one,
    or the first of a ladder of tenfold increases for which the factorisation succeeds. A pivot that is rounding
    counts as a failure: a singular matrix can pass by luck, and its inverse would then be noise.
    Raises `NumericalError` if the matrix is not finite or no damping up to 1 helps.
    """
    scale = mean_diagonal(covariance)
    info = torch.empty((), dtype=torch.int32, device=covariance.device)
    for rung in rungs(damping):
        # The transpose of a symmetric matrix that lies row by row is what LAPACK factorises where it lies.
        factor = _ordered(covariance, order).mT
        factor.diagonal().add_(rung * scale)
        diagonal = factor.diagonal().clone()
        torch.linalg.cholesky_ex(factor, out=(factor, info))
        if factorised(covariance, factor, diagonal, info):
            return factor, rung
    raise corrupt(covariance)


def _ordered(matrix: Tensor, order: Tensor | None) -> Tensor:
    """A float64 copy of matrix (m, m) with rows and columns in `order`."""
    if order is None:
        return matrix.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    copy = torch.empty_like(matrix, dtype=torch.float64, memory_format=torch.contiguous_format)
    for rows in strips(matrix.shape[0]):
        copy[rows] = matrix[order[rows].unsqueeze(1), order]
    return copy


def damped_inverse(covariance: Tensor, damping: float) -> tuple[Tensor, float]:
    """(covariance + λ I)⁻¹ in the type of covariance (m, m), contiguous, and the damping that was needed.

    The factor is float64; of a wide site the inverse made of it is float32, twice as fast, and only ranks units.
    """
    factor, used = damped_cholesky(covariance, damping)
    factor = factor.to(covariance.dtype)
    torch.cholesky_inverse(factor, out=factor)
    return factor.mT, used


def decomposed(decompose: Callable[[Tensor], Sequence[Tensor]], matrix: Tensor) -> list[Tensor]:
    """The parts of a decomposition of torch's of matrix (..., m, m), on its device.

    Those of heads are made on the host: a GPU's library takes many small matrices one after the other.
    """
    if matrix.shape[-1] > HOST_COLUMNS:
        return list(decompose(matrix))
    return [part.to(matrix.device) for part in decompose(matrix.cpu())]


def symmetric_powers(matrix: Tensor, *exponents: float) -> list[Tensor]:
    """matrix ** exponent for symmetric positive definite (..., m, m), by one eigendecomposition in its own dtype.

    Eigenvalues are floored at machine epsilon times the largest one: below that they are rounding.
    """
    values, vectors = decomposed(torch.linalg.eigh, matrix)
    values.clamp_(min=values[..., -1:].clamp_min(torch.finfo(values.dtype).tiny) * torch.finfo(values.dtype).eps)
    return [(vectors * values.pow(exponent).unsqueeze(-2)) @ vectors.mT for exponent in exponents]
