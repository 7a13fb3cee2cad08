"""First and second moments of activations, summed over calibration tokens.

Activations are shifted by the mean of the first batch before they are multiplied: products stay in fp32, and the
covariance is not the small difference of two large numbers when a channel sits far from zero. Sums are float64, or
float32 for wide sites (`linalg.working_dtype`). Of a square product only the lower half is multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .linalg import mirror_lower, strips, working_dtype
from .stopwatch import timed

HALF = (torch.float16, torch.bfloat16)


@dataclass
class Moments:
    """Sums over n tokens of x (m,), as `groups` independent slices of width m / groups, and of a residual r (d,).

    shift     (m,)            subtracted from every x before anything else
    first     (m,)            sum of x - shift
    second    (h, w, w)       sum of (x - shift)(x - shift)ᵀ within each of h groups of width w. The covariance takes
                              its place, in the same memory, when it is asked for, and is turned back into the sum
                              if tokens are added afterwards.
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
    _is_covariance: bool = field(default=False, init=False, repr=False, compare=False)

    @classmethod
    def like(cls, x: Tensor, residual: Tensor | None = None, groups: int = 1, centred: bool = True) -> Moments:
        """Empty sums for batches shaped like x (n, m) and residual (n, d); the shift is the mean of x.

        Where matrix units multiply 16-bit numbers (CUDA), x is taken as it is: a shifted one would have to be rounded.
        """
        m = x.shape[-1]
        w = m // groups
        wide = working_dtype(w)

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=x.device)

        return cls(
            shift=zeros(m, dtype=torch.float32) if _by_matrix_units(x) else x.float().mean(0),
            first=zeros(m),
            second=zeros(groups, w, w, dtype=wide),
            residual=None if residual is None else zeros(residual.shape[-1]),
            cross=None if residual is None else zeros(residual.shape[-1], m, dtype=wide),
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

    @timed("moments")
    def add(self, x: Tensor, residual: Tensor | None = None) -> None:
        """Add a batch: x (n, m) and, if these moments hold a cross moment, residual (n, d)."""
        self._as_sums()
        if not _by_matrix_units(x):
            x = x.float() - self.shift
        groups, w, _ = self.second.shape
        if groups == 1:
            for rows in strips(w):
                _add_product(self.second[0, rows, : rows.stop], x[:, rows], x[:, : rows.stop])
        else:
            by_group = x.float().view(-1, groups, w).transpose(0, 1)
            self.second += by_group.mT @ by_group
        self.first += x.sum(0, dtype=torch.float64)
        self.tokens += x.shape[0]
        if residual is not None:
            assert self.cross is not None
            assert self.residual is not None
            _add_product(self.cross, residual.to(x.dtype), x)
            self.residual += residual.sum(0, dtype=torch.float64)
            self.power += residual.float().square().sum(dtype=torch.float64).item()

    def reduce(self, total: Callable[[Tensor], None]) -> None:
        """Sum with the moments of other processes, which must have the same shift; `total` sums a tensor in place."""
        self._as_sums()
        counts = torch.tensor([self.power, self.tokens], dtype=torch.float64, device=self.first.device)
        for sums in (self.first, self.second, self.residual, self.cross, counts):
            if sums is not None:
                total(sums)
        self.power, self.tokens = counts[0].item(), int(counts[1].item())

    def merge(self, other: Moments) -> Moments:
        """The moments of both token sets together. Both must have the same shift (ValueError otherwise)."""
        if not torch.equal(self.shift, other.shift):
            raise ValueError("moments with different shifts cannot be summed")
        self._as_sums()
        other._as_sums()
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
        """C = E (x - E x)(x - E x)ᵀ, (m, m) for one group, (h, w, w) for several; E x xᵀ if not centred.

        It lives in these moments: do not change it in place, and do not keep it while tokens are added.
        """
        if not self._is_covariance:
            self.second /= self.tokens
            self._add_means(1.0)
            for group in self.second:
                mirror_lower(group)
            self._is_covariance = True
        return self.second[0] if self.second.shape[0] == 1 else self.second

    def _as_sums(self) -> None:
        if self._is_covariance:
            self._add_means(-1.0)
            self.second *= self.tokens
            self._is_covariance = False

    def _add_means(self, sign: float) -> None:
        """Add sign times the products of means that lie between the mean of squares and the covariance."""
        groups, w, _ = self.second.shape
        mean = (self.first / self.tokens).view(groups, w, 1).to(self.second.dtype)
        self.second.baddbmm_(mean, mean.mT, alpha=-sign)
        if not self.centred:
            about_zero = self._mean_by_group.to(self.second.dtype)
            self.second.baddbmm_(about_zero, about_zero.mT, alpha=sign)

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
        """R = E (r - E r)(x - E x)ᵀ, (d, m) in the type of the covariance; E r xᵀ if not centred."""
        if self.cross is None or self.residual is None:
            return None
        mean_residual = (self.residual / self.tokens).to(self.cross.dtype)
        subtracted = self.first / self.tokens
        if not self.centred:
            subtracted = subtracted - self.mean
        covariance = self.cross / self.tokens
        return covariance.addr_(mean_residual, subtracted.to(self.cross.dtype), alpha=-1.0)

    @property
    def residual_variance(self) -> float:
        """E |r - E r|² (E |r|² if not centred), 0.0 where there is no residual."""
        if self.residual is None:
            return 0.0
        mean_power = (self.residual / self.tokens).square().sum().item() if self.centred else 0.0
        return max(0.0, self.power / self.tokens - mean_power)


def _by_matrix_units(x: Tensor) -> bool:
    """Whether the device multiplies x (n, m) in its own 16 bits, exactly, and adds in fp32."""
    return x.is_cuda and x.dtype in HALF


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (a, b) += leftᵀ right, for left (n, a) and right (n, b) of one type."""
    if _by_matrix_units(left):
        total += torch.mm(left.mT, right, out_dtype=torch.float32)
    elif total.dtype == left.dtype:
        total.addmm_(left.mT, right)
    else:
        total += left.mT @ right
