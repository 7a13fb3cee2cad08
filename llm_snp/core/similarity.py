"""How alike two representations of the same tokens are."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cka(both: Tensor) -> float:
    """Linear centred kernel alignment of features X (n, d) and Y (n, d), from 0 to 1 (arXiv 1905.00414).

    ‖XᵀY‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F) of column-centred features. both: covariance (2d, 2d) of X beside Y, so that no more
    than sums over tokens is ever needed. 0 where features do not vary.
    """
    d = both.shape[0] // 2
    own, other, cross = (torch.linalg.matrix_norm(part.double()) for part in (both[:d, :d], both[d:, d:], both[:d, d:]))
    aligned = cross.square() / (own * other).clamp_min(torch.finfo(torch.float64).tiny)
    return min(1.0, aligned.item())  # but for rounding it is no more
