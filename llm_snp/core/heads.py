"""Subspaces inside attention heads: any basis of a head's value space, and the best low-rank scores.

Attention mixes tokens, not the w directions of a head, so a basis B_h of the value space folds into v_proj (rows
B_h V_h) and out_proj; without rotary embeddings the same holds between query and key (METHOD, section 7).
Letters: h heads, w head_dim, r directions kept, d model width, m = h·w.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linalg import damped_cholesky, mean_diagonal, symmetric_power
from .stopwatch import timed


def damp_heads(covariance: Tensor, damping: float) -> tuple[Tensor, float]:
    """covariance (h, w, w) + λ I per head, λ = damping · the mean diagonal of that head; and the damping used.

    The damping is raised (as `damped_cholesky` does) until every head can be factorised.
    """
    for head in covariance:
        damping = damped_cholesky(head, damping)[1]
    damped = covariance.clone()
    for head in damped:
        head.diagonal().add_(damping * mean_diagonal(head))
    return damped, damping


@timed("subspace")
def value_basis(covariance: Tensor, weight: Tensor, damping: float, sensitivity: Tensor | None = None) -> Tensor:
    """Orthonormal bases (h, w, w) of the value spaces, rows by how much they matter for the block's output.

    covariance (h, w, w) of the attended values, weight (d, h·w) of out_proj, sensitivity G (d, d) or None.
    With G^½ O_h C_h^½ = U S Vᵀ the best r-dimensional features are V_rᵀ C_h^-½ a. Their row spaces are nested in r,
    so orthonormalising the rows in order (a LQ factorisation) leaves every one of them as it is.
    """
    h, w, _ = covariance.shape
    damped, _ = damp_heads(covariance, damping)
    root, inverse_root = symmetric_power(damped, 0.5), symmetric_power(damped, -0.5)
    o = weight.view(-1, h, w).transpose(0, 1)
    weighted = o if sensitivity is None else sensitivity @ o
    _, vectors = torch.linalg.eigh(root @ (o.mT @ weighted) @ root)
    features = vectors.flip(-1).mT @ inverse_root
    orthonormal, _ = torch.linalg.qr(features.mT)
    return orthonormal.mT


@timed("subspace")
def score_basis(query: Tensor, key: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Transforms (h, w, w) of query and key whose first r rows give the best rank-r scores in mean square.

    query  (h, w, w), or (w, w) for one head: uncentred second moments E q qᵀ
    key    the same, centred: covariance of k; a constant per query leaves the softmax unchanged
    With Cq^½ Ck^½ = U S Vᵀ: q' = S^½ Uᵀ Cq^-½ q and k' = S^½ Vᵀ Ck^-½ k; with all w rows q'ᵀk' = qᵀk.
    Also returns s² (h, w), falling: rank r leaves Σ_{i>r} s_i² of the scores' mean square.
    """
    w = query.shape[-1]
    query, _ = damp_heads(query.reshape(-1, w, w), damping)
    key, _ = damp_heads(key.reshape(-1, w, w), damping)
    u, s, vh = torch.linalg.svd(symmetric_power(query, 0.5) @ symmetric_power(key, 0.5))
    scale = s.clamp_min(torch.finfo(s.dtype).tiny).sqrt().unsqueeze(-1)
    return scale * (u.mT @ symmetric_power(query, -0.5)), scale * (vh @ symmetric_power(key, -0.5)), s.square()


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
