"""First and second moments of activations, summed over calibration tokens.

Activations are shifted by the mean of the first batch before they are multiplied: products stay in fp32, and the
covariance is not the small difference of two large numbers when a channel sits far from zero. Sums are float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Moments:
    """Sums over n tokens of x (m,), as `groups` independent slices of width m / groups, and of a residual r (d,).

    shift     (m,)            subtracted from every x before anything else
    first     (m,)            sum of x - shift
    second    (h, w, w)       sum of (x - shift)(x - shift)ᵀ within each of h groups of width w
    residual  (d,) or None    sum of r, the target of the repair minus the layer's present output
    cross     (d, m) or None  sum of r (x - shift)ᵀ
    power     float           sum of |r|²
    centred   False for a consumer without a bias: it cannot absorb a mean, so every moment below is about zero
    """

    shift: Tensor
    first: Tensor
    second: Tensor
    residual: Tensor | None = None
    cross: Tensor | None = None
    power: float = 0.0
    tokens: int = 0
    centred: bool = True
    _covariance: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def like(cls, x: Tensor, residual: Tensor | None = None, groups: int = 1, centred: bool = True) -> Moments:
        """Empty sums for batches shaped like x (n, m) and residual (n, d); the shift is the mean of x."""
        m = x.shape[-1]
        w = m // groups

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=x.device)

        return cls(
            shift=x.float().mean(0),
            first=zeros(m),
            second=zeros(groups, w, w),
            residual=None if residual is None else zeros(residual.shape[-1]),
            cross=None if residual is None else zeros(residual.shape[-1], m),
            centred=centred,
        )

    def empty(self) -> Moments:
        """Sums over no tokens, with the shift of these: what can be merged with them."""
        return Moments(
            self.shift,
            torch.zeros_like(self.first),
            torch.zeros_like(self.second),
            None if self.residual is None else torch.zeros_like(self.residual),
            None if self.cross is None else torch.zeros_like(self.cross),
            centred=self.centred,
        )

    def add(self, x: Tensor, residual: Tensor | None = None) -> None:
        """Add a batch: x (n, m) and, if these moments hold a cross moment, residual (n, d)."""
        self._covariance = None
        x = x.float() - self.shift
        groups, w, _ = self.second.shape
        by_group = x.view(-1, groups, w).transpose(0, 1)
        self.second += by_group.mT @ by_group
        self.first += x.sum(0, dtype=torch.float64)
        self.tokens += x.shape[0]
        if residual is not None:
            assert self.cross is not None
            assert self.residual is not None
            residual = residual.float()
            self.cross += residual.mT @ x
            self.residual += residual.sum(0, dtype=torch.float64)
            self.power += residual.square().sum(dtype=torch.float64).item()

    def merge(self, other: Moments) -> Moments:
        """The moments of both token sets together. Both must have the same shift (ValueError otherwise)."""
        if not torch.equal(self.shift, other.shift):
            raise ValueError("moments with different shifts cannot be summed")
        both = self.cross is not None and other.cross is not None
        return Moments(
            shift=self.shift,
            first=self.first + other.first,
            second=self.second + other.second,
            residual=self.residual + other.residual if both else None,  # type: ignore[operator]
            cross=self.cross + other.cross if both else None,  # type: ignore[operator]
            power=self.power + other.power,
            tokens=self.tokens + other.tokens,
            centred=self.centred,
        )

    @property
    def finite(self) -> bool:
        """False as soon as one activation or residual, or one product of two, was infinite or NaN."""
        sums = [self.first, self.second, *(s for s in (self.residual, self.cross) if s is not None)]
        return math.isfinite(self.power) and all(bool(torch.isfinite(s).all()) for s in sums)

    @property
    def mean(self) -> Tensor:
        """E x, (m,) float64."""
        return self.shift.double() + self.first / self.tokens

    @property
    def covariance(self) -> Tensor:
        """C = E (x - E x)(x - E x)ᵀ, (m, m) float64 for one group, (h, w, w) for several; E x xᵀ if not centred.

        Computed once per set of tokens: do not change it in place.
        """
        if self._covariance is not None:
            return self._covariance
        groups, w, _ = self.second.shape
        mean = (self.first / self.tokens).view(groups, w, 1)
        covariance = self.second / self.tokens - mean @ mean.mT
        if not self.centred:
            covariance += self._mean_by_group @ self._mean_by_group.mT
        covariance = (covariance + covariance.mT) / 2
        self._covariance = covariance[0] if groups == 1 else covariance
        return self._covariance

    @property
    def uncentred(self) -> Tensor:
        """E x xᵀ, shaped like the covariance."""
        covariance = self.covariance
        if not self.centred:
            return covariance
        outer = self._mean_by_group @ self._mean_by_group.mT
        return covariance + (outer[0] if covariance.dim() == 2 else outer)

    @property
    def _mean_by_group(self) -> Tensor:
        groups, w, _ = self.second.shape
        return self.mean.view(groups, w, 1)

    @property
    def mean_residual(self) -> Tensor | None:
        """E r, (d,) float64."""
        return None if self.residual is None else self.residual / self.tokens

    @property
    def residual_covariance(self) -> Tensor | None:
        """R = E (r - E r)(x - E x)ᵀ, (d, m) float64; E r xᵀ if not centred."""
        if self.cross is None or self.residual is None:
            return None
        mean_residual = self.residual / self.tokens
        covariance = self.cross / self.tokens - torch.outer(mean_residual, self.first / self.tokens)
        return covariance if self.centred else covariance + torch.outer(mean_residual, self.mean)

    @property
    def residual_variance(self) -> float:
        """E |r - E r|² (E |r|² if not centred), 0.0 where there is no residual."""
        if self.residual is None:
            return 0.0
        mean_power = (self.residual / self.tokens).square().sum().item() if self.centred else 0.0
        return max(0.0, self.power / self.tokens - mean_power)
