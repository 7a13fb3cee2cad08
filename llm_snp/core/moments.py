"""First and second moments of activations, summed over calibration tokens.

Activations are shifted by the mean of the first batch before they are multiplied: products stay in fp32, and the
covariance is not the small difference of two large numbers when a channel sits far from zero. Sums are float64, or
float32 for wide sites (`linalg.working_dtype`). Of a square product only the lower half is multiplied.

Where matrix units multiply 16-bit numbers (CUDA), the shifted activations are rounded to 16 bits again. That is exact
for almost every token of a channel that sits far from zero, if the shift is a number of that type, too; elsewhere it
errs by a 16-bit rounding of the distance from the shift, which is like noise of 1e-6 of the variance in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from .linalg import all_finite, mirror_lower, strips, working_dtype
from .stopwatch import timed

# The types that matrix units multiply, and what shifted activations are multiplied by before they are rounded to one:
# the difference of two float16 numbers may be twice as large as float16 can hold.
HALF = {torch.float16: 0.5, torch.bfloat16: 1.0}
# Matrix units do not round their fp32 sums but cut them off. The error is the same share of every sum, and grows with
# the number of tokens in it: 6e-6 for so many, 2.4e-5 for 16384 (emulated).
PIECE_TOKENS = 4096
# The shift for matrix units is a multiple of a power of two of at most this share of the spread. With more digits the
# rounding of x - shift would go the same way for many tokens: up to 2e-3 of the variance instead of 1e-6.
SHIFT_GRID = 0.25
# A channel with a smaller spread is a constant.
CONSTANT = 1e-12


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
    power     () or None      sum of |r|²
    tokens    n
    rows      of how many of these x was given: the others, which are routed past a layer, count as zeros
    centred   False for a consumer without a bias: it cannot absorb a mean, so every moment below is about zero
    """

    shift: Tensor
    first: Tensor
    second: Tensor
    residual: Tensor | None = None
    cross: Tensor | None = None
    power: Tensor | None = None
    tokens: int = 0
    centred: bool = True
    rows: int = 0
    _is_covariance: bool = field(default=False, init=False, repr=False, compare=False)

    @classmethod
    def like(
        cls,
        x: Tensor,
        residual: Tensor | None = None,
        groups: int = 1,
        centred: bool = True,
        routed: bool = False,
    ) -> Moments:
        """Empty sums for batches shaped like x (n, m) and residual (n, d); the shift is the mean of x.

        For matrix units that is rounded to the type of x, and to a part of the spread (`SHIFT_GRID`). `routed`: where
        only some tokens are given and the others are zeros, it is zero.
        """
        m = x.shape[-1]
        w = m // groups
        wide = working_dtype(w)

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=x.device)

        if routed:
            shift = x.new_zeros(m, dtype=torch.float32)
        else:
            shift = _short_mean(x) if groups == 1 and _by_matrix_units(x) else x.float().mean(0)
        return cls(
            shift=shift,
            first=zeros(m),
            second=zeros(groups, w, w, dtype=wide),
            residual=None if residual is None else zeros(residual.shape[-1]),
            cross=None if residual is None else zeros(residual.shape[-1], m, dtype=wide),
            power=None if residual is None else zeros(),
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
            None if self.power is None else torch.zeros_like(self.power),
            centred=self.centred,
        )

    @timed("moments")
    def add(self, x: Tensor, residual: Tensor | None = None, tokens: int | None = None) -> None:
        """Add a batch: x (n, m) and, if these moments hold a cross moment, residual (n, d).

        tokens: of the batch; None: n. Those of which nothing is given count as zeros, which needs a shift of zero.
        """
        self._as_sums()
        self.tokens += x.shape[0] if tokens is None else tokens
        self.rows += x.shape[0]
        if not x.shape[0]:
            return
        groups, w, _ = self.second.shape
        short = groups == 1 and _by_matrix_units(x)
        scale = HALF[x.dtype] if short else 1.0
        shifted = (x - self.shift).float()
        if short:
            # First moments, too, are of what is multiplied, or the covariance might not be positive.
            shifted = shifted.mul_(scale).to(x.dtype)
        first = shifted.sum(0, dtype=torch.float64).div_(scale)
        if groups == 1:
            for rows in strips(w):
                _add_product(self.second[0, rows, : rows.stop], shifted[:, rows], shifted[:, : rows.stop], scale**-2)
        else:
            by_group = shifted.view(-1, groups, w).transpose(0, 1)
            self.second += by_group.mT @ by_group
        self.first += first
        if residual is None:
            return
        assert self.cross is not None
        assert self.residual is not None
        assert self.power is not None
        residual = residual.float()
        total = residual.sum(0, dtype=torch.float64)
        if short:
            mean = total / x.shape[0]
            self._add_short(residual - mean.float(), shifted, scale)
            self.cross.addr_(mean.float().to(self.cross.dtype), first.to(self.cross.dtype))
        else:
            _add_product(self.cross, residual, shifted, 1.0)
        self.residual += total
        self.power += torch.linalg.vector_norm(residual, dtype=torch.float64).square()

    def _add_short(self, residual: Tensor, shifted: Tensor, scale: float) -> None:
        """Add residualᵀ shifted / scale to the cross moment, for a centred residual (n, d) that is rounded to 16 bits.

        Its channels are brought to the size of one by powers of two, because float16 has too few small numbers.
        """
        assert self.cross is not None
        _, exponent = torch.frexp(residual.abs().amax(0))
        size = _power_of_two(exponent.clamp_(-100, 100))
        residual = (residual / size).to(shifted.dtype)
        for rows in strips(self.cross.shape[0]):
            part = torch.zeros_like(self.cross[rows])
            _add_product(part, residual[:, rows], shifted, 1.0 / scale)
            self.cross[rows] += part.mul_(size[rows].unsqueeze(1))

    def reduce(self, total: Callable[[Tensor], None]) -> None:
        """Sum with the moments of other processes, which must have the same shift; `total` sums a tensor in place."""
        self._as_sums()
        counts = torch.tensor([self.tokens, self.rows], dtype=torch.float64, device=self.first.device)
        for sums in (self.first, self.second, self.residual, self.cross, self.power, counts):
            if sums is not None:
                total(sums)
        self.tokens, self.rows = (int(count) for count in counts.cpu().tolist())

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
            power=self.power + other.power if both else None,  # type: ignore[operator]
            tokens=self.tokens + other.tokens,
            centred=self.centred,
            rows=self.rows + other.rows,
        )

    @property
    def finite(self) -> bool:
        """False as soon as one activation or residual, or one product of two, was infinite or NaN."""
        sums = (self.first, self.second, self.residual, self.cross, self.power)
        return bool(torch.stack([all_finite(s) for s in sums if s is not None]).all())

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
        if self.residual is None or self.power is None:
            return 0.0
        variance = self.power / self.tokens
        if self.centred:
            variance = variance - (self.residual / self.tokens).square().sum()
        return max(0.0, variance.item())


def _by_matrix_units(x: Tensor) -> bool:
    """Whether the device multiplies numbers like those of x (n, m) in their own 16 bits, exactly, and adds in fp32."""
    return x.is_cuda and x.dtype in HALF and _gives_sums(x.device, x.dtype)


@cache
def _gives_sums(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch hands out the fp32 sums of a 16-bit product: from 2.8 on, and not on every device."""
    if "dtype" not in torch.ops.aten.mm.overloads():  # type: ignore[no-untyped-call]
        return False
    few = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        return _product(few, few).dtype == torch.float32
    except RuntimeError:
        return False


def _short_mean(x: Tensor) -> Tensor:
    """The mean of x (n, m), float32, as a number of the type of x that has few digits next to the spread of x."""
    variance, mean = torch.var_mean(x.float(), 0, correction=0)
    _, exponent = torch.frexp(variance.sqrt().clamp_min(CONSTANT) * SHIFT_GRID)
    grid = _power_of_two(exponent - 1)  # is at most that
    return ((mean / grid).round() * grid).to(x.dtype).float()


def _power_of_two(exponent: Tensor) -> Tensor:
    """2 ** exponent, float32."""
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right (a, b) float32 of 16-bit left (n, a) and right (n, b), by matrix units."""
    return torch.mm(left.mT, right, out_dtype=torch.float32)


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """total (a, b) += scale · leftᵀ right, for left (n, a) and right (n, b) of one type, fp32 or what `HALF` holds."""
    if left.dtype in HALF:
        for rows in strips(left.shape[0], PIECE_TOKENS):
            total.add_(_product(left[rows], right[rows]), alpha=scale)
    elif total.dtype == left.dtype:
        total.addmm_(left.mT, right, alpha=scale)
    else:
        total.add_(left.mT @ right, alpha=scale)
