"""Subspaces of the value path of attention heads.

Attention mixes tokens, not the w directions of a head, so a basis B_h of the value space folds into v_proj (rows
B_h V_h) and out_proj (METHOD, section 7). Query heads that read one key/value head share its basis.
Letters: h heads, q query heads for each key/value head, w head_dim, r directions kept, d model width, m = h·w.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linalg import corrupt, decomposed, factorised, mean_diagonal, rungs, symmetric_powers
from .stopwatch import timed


def damp_heads(covariance: Tensor, damping: float) -> tuple[Tensor, float]:
    """covariance (h, w, w) + λ I per head, λ = damping · the mean diagonal of that head; and the damping used.

    The damping is raised (as `damped_cholesky` does) until every head can be factorised.
    """
    scale = mean_diagonal(covariance).unsqueeze(-1)
    for rung in rungs(damping):
        damped = covariance.clone()
        diagonal = damped.diagonal(dim1=-2, dim2=-1).add_(rung * scale)
        factor, info = torch.linalg.cholesky_ex(damped.double())
        if factorised(covariance, factor, diagonal, info):
            return damped, rung
    raise corrupt(covariance[0])


@timed("subspace")
def value_basis(
    covariance: Tensor, weight: Tensor, damping: float, sensitivity: Tensor | None = None, queries: int = 1
) -> Tensor:
    """Orthonormal bases (h/q, w, w) of the value spaces, rows by how much they matter for the block's output.

    covariance (h, w, w) of the attended values, weight (d, h·w) of out_proj, sensitivity G (d, d) or None.
    With G^½ O_h C_h^½ = U S Vᵀ the best r-dimensional features are V_rᵀ C_h^-½ a. Their row spaces are nested in r,
    so orthonormalising the rows in order (a LQ factorisation) leaves every one of them as it is. For several query
    heads of one key/value head C_h and O_hᵀ G O_h are their sums: the best basis if all of them attend alike.
    """
    h, w, _ = covariance.shape
    o = weight.view(-1, h, w).transpose(0, 1)
    weighted = o if sensitivity is None else sensitivity @ o
    covariance, output = (m.reshape(-1, queries, w, w).sum(1) for m in (covariance, o.mT @ weighted))
    damped, _ = damp_heads(covariance, damping)
    root, inverse_root = symmetric_powers(damped, 0.5, -0.5)
    _, vectors = decomposed(torch.linalg.eigh, root @ output @ root)
    features = vectors.flip(-1).mT @ inverse_root
    orthonormal, _ = decomposed(torch.linalg.qr, features.mT)
    return orthonormal.mT


def transform_rows(weight: Tensor, bias: Tensor | None, basis: Tensor) -> tuple[Tensor, Tensor | None]:
    """basis_h applied to the rows of each head: weight (h·w, n) -> (h·r, n), bias (h·w,) -> (h·r,); basis (h, r, w)."""
    h, r, w = basis.shape
    rows = (basis @ weight.view(h, w, -1)).reshape(h * r, -1)
    return rows, None if bias is None else (basis @ bias.view(h, w, 1)).reshape(h * r)


def to_basis(matrix: Tensor, basis: Tensor) -> Tensor:
    """matrix (n, h·w) times blockdiag(basis)ᵀ: its columns expressed in the features, (n, h·r); basis (h, r, w)."""
    h, r, w = basis.shape
    return (matrix.view(-1, h, w).transpose(0, 1) @ basis.mT).transpose(0, 1).reshape(-1, h * r)


def direction_columns(heads: int, width: int, device: torch.device | None = None) -> Tensor:
    """(w, h): unit i of a block in `dims` mode is direction i of every head, columns i, w + i, 2w + i, ..."""
    return (torch.arange(heads, device=device) * width) + torch.arange(width, device=device).view(-1, 1)
