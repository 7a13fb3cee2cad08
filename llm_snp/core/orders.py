"""Orders: which units of a site matter most. All share one repair, so only the order differs between methods.

Each order is a pure function `UnitStatistics -> (u,) long`, most important unit first. Ties go to the lower index.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import OptionError
from .elimination import eliminate
from .linalg import damped_cholesky, damped_inverse, mean_diagonal, symmetric_powers


@dataclass(frozen=True)
class UnitStatistics:
    """What an order may look at.

    covariance   (m, m), centred and not damped; float64, or float32 for a wide site, and so is what is made of it
    mean         (m,) float64, E x
    weight       (d, m) float64: the consumer with every unit present, refitted to its target
    group        g, columns per unit; unit i holds columns i·g .. (i+1)·g - 1
    damping      λ / mean diagonal of the covariance
    sensitivity  (d, d) float64 or None for the identity: what an output error costs the model (G)
    keep         how many units will be kept; a hint that only `i-spasp` needs
    nonnegative  whether x ≥ 0 by construction (ReLU)
    generator    source of randomness, on the CPU
    """

    covariance: Tensor
    mean: Tensor
    weight: Tensor
    group: int = 1
    damping: float = 0.0
    sensitivity: Tensor | None = None
    keep: int | None = None
    nonnegative: bool = False
    generator: torch.Generator | None = None

    @property
    def units(self) -> int:
        return self.covariance.shape[0] // self.group

    def damped(self) -> Tensor:
        """C + λ I with the first damping for which C can be factorised, (m, m)."""
        _, used = damped_cholesky(self.covariance, self.damping)
        damped = self.covariance.clone()
        damped.diagonal().add_(used * mean_diagonal(self.covariance))
        return damped

    def inverse(self) -> Tensor:
        """(C + λ I)⁻¹, (m, m), contiguous; a matrix of the caller's own."""
        return damped_inverse(self.covariance, self.damping)[0]

    def energy(self) -> Tensor:
        """M = Wᵀ G W, (m, m), contiguous; a matrix of the caller's own."""
        weighted = self.weight if self.sensitivity is None else self.sensitivity @ self.weight
        return self.weight.mT.to(self.covariance.dtype) @ weighted.to(self.covariance.dtype)

    def by_unit(self, columns: Tensor) -> Tensor:
        """Sum of columns (m,) over the columns of each unit, (u,)."""
        return columns.view(self.units, self.group).sum(1)


def _descending(score: Tensor) -> Tensor:
    return torch.argsort(score, descending=True, stable=True)


def order_energy(s: UnitStatistics) -> Tensor:
    """Activation variance C_ii, the plainest criterion."""
    return _descending(s.by_unit(s.covariance.diagonal()))


def order_saw(s: UnitStatistics) -> Tensor:
    """Sum of absolute outgoing weights Σ_o |W_oi| (SNP-SAW; Offergeld et al., arXiv 2405.17506)."""
    return _descending(s.by_unit(s.weight.abs().sum(0)))


def order_zca(s: UnitStatistics) -> Tensor:
    """1 / ((C^-½)_ii)²: what is left of a unit after un-normalised ZCA (SNP-ZCA; arXiv 2405.17506)."""
    return _descending(s.by_unit(symmetric_powers(s.damped(), -0.5)[0].diagonal().pow(-2)))


def order_loo(s: UnitStatistics) -> Tensor:
    """Leave-one-out residual: the variance of a unit that all other units together cannot explain.

    tr((C⁻¹)_ii⁻¹) over the unit's block: 1 / (C⁻¹)_ii for a neuron (METHOD, section 3).
    """
    g, u = s.group, s.units
    if g == 1:
        return _descending(s.inverse().diagonal().reciprocal())
    blocks = s.inverse().view(u, g, u, g).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return _descending(torch.linalg.inv(blocks).diagonal(dim1=-2, dim2=-1).sum(-1))


def order_wanda(s: UnitStatistics) -> Tensor:
    """C_ii ‖W_i‖²: variance times outgoing weight (Wanda-sp and FLAP, arXiv 2312.11983)."""
    weighted = s.weight if s.sensitivity is None else s.sensitivity @ s.weight
    return _descending(s.by_unit(s.covariance.diagonal() * (s.weight * weighted).sum(0)))


def order_leverage(s: UnitStatistics) -> Tensor:
    """Ridge leverage (C (C + λI)⁻¹)_ii (MoDeGPT, arXiv 2408.09632).

    λ is the damping, but at least 0.01 of the mean diagonal: without a ridge every leverage is 1.
    """
    ridged = replace(s, damping=max(s.damping, 1e-2))
    return _descending(ridged.by_unit((ridged.inverse() * s.covariance).sum(0)))


def order_greedy(s: UnitStatistics) -> Tensor:
    """Backward elimination by exact output error, refitting after each removal (OSSCAR, arXiv 2403.12983;

    ZipLM, arXiv 2302.04089), over all units at once by blocked updates: `elimination.eliminate`.
    """
    removed, _ = eliminate(s.inverse(), s.energy(), s.group, overwrite=True)
    return removed.flip(0)


def order_random(s: UnitStatistics) -> Tensor:
    """A seeded random order: the floor of every comparison."""
    return torch.randperm(s.units, generator=s.generator).to(s.weight.device)


ISPASP_ITERATIONS = 20


def order_ispasp(s: UnitStatistics) -> Tensor:
    """Iterative sparse structured pruning (Wolfe and Kyrillidis, arXiv 2112.04905, Algorithm 1).

    With hidden activations H ≥ 0, output U = W H, kept set S and residual V = U - W_S H_S, repeat: score all units
    by the row sums of Wᵀ V, take the 2k largest, merge with S, keep the k of the union with the largest row sums
    of H, update V. Row sums over tokens are n times first moments, so no activation is stored. Stops when S
    repeats. Kept units come first, by score; then the others. Raises `OptionError` unless x ≥ 0.
    """
    if not s.nonnegative:
        raise OptionError(
            "--order i-spasp needs activations that cannot be negative (ReLU); "
            "this site has others: choose another order, such as greedy"
        )
    u, keep = s.units, s.keep or max(1, s.units // 2)
    hidden = s.by_unit(s.mean)
    kept = torch.zeros(u, dtype=torch.bool, device=s.mean.device)
    score = hidden
    seen: set[bytes] = set()
    for _ in range(ISPASP_ITERATIONS):
        columns = kept.repeat_interleave(s.group)
        residual = s.weight @ torch.where(columns, 0.0, s.mean)
        score = s.by_unit(s.weight.mT @ residual)
        merged = kept.clone()
        merged[_descending(score)[: 2 * keep]] = True
        best = _descending(torch.where(merged, hidden, -torch.inf))[:keep]
        kept = torch.zeros_like(kept)
        kept[best] = True
        state = kept.cpu().numpy().tobytes()
        if state in seen:
            break
        seen.add(state)
    first = _descending(torch.where(kept, hidden, -torch.inf))[:keep]
    rest = _descending(torch.where(kept, -torch.inf, score))[: u - keep]
    return torch.cat([first, rest])


ORDERS: dict[str, Callable[[UnitStatistics], Tensor]] = {
    "zca": order_zca,
    "saw": order_saw,
    "energy": order_energy,
    "loo": order_loo,
    "random": order_random,
    "wanda": order_wanda,
    "leverage": order_leverage,
    "i-spasp": order_ispasp,
    "greedy": order_greedy,
}

# Orders that can rank only units that are nowhere negative.
NEEDS_NONNEGATIVE = frozenset({"i-spasp"})
