"""Order a site's units, or the directions inside its heads, on the moments of what its consumer reads.

An order is a `Subspace`: with the units in it, what keeping the first k of them loses is known for every k.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import MOST_DAMPING, PruneConfig
from ..core import heads as head_space
from ..core.moments import Moments
from ..core.repair import subspace_of_units
from ..core.scores import FreeScores, RotaryPairs
from ..core.subspace import Subspace, factorise
from ..families import FREE, Attention, Site

# An expert is damped the more, the fewer tokens per neuron were routed to it, below so many. The default ridge is then
# their inverse: so large is the share of a neuron's variance that the others explain by chance.
TOKENS_PER_NEURON = 50


def damping_of(site: Site, moments: Moments, damping: float) -> float:
    """The ridge `damping` of a site, raised for an expert that saw few tokens, to no more than there can be."""
    return min(MOST_DAMPING, damping * scarcity(site, moments))


def scarcity(site: Site, moments: Moments) -> float:
    """By how much the damping of an expert is raised for the tokens it did not see; 1 for enough of them, and others.

    What it fits to n tokens it follows by chance in a share of m / n for its m neurons, as every least-squares fit.
    """
    if site.expert is None:
        return 1.0
    return max(1.0, TOKENS_PER_NEURON * site.units / max(1, moments.rows))


def order_units(
    moments: Moments,
    weight: Tensor,
    site: Site,
    options: PruneConfig,
    damping: float,
    keep: int,
    generator: torch.Generator,
    sensitivity: Tensor | None,
    parts: Tensor,
    energies: bool = True,
) -> Subspace:
    """The units of a site by the criterion of `--order`, for a consumer weight (d, m).

    keep: how many will stay, for orders that want to know; parts: which each unit belongs to, see `Site.part_of`;
    energies False: no loss curve is needed.
    """
    assert options.order is not None
    return subspace_of_units(
        moments,
        weight,
        options.order,
        site.group,
        damping,
        sensitivity,
        keep,
        site.nonnegative,
        generator,
        options.sensitive_order,
        energies,
        parts,
    )


def order_values(
    covariance: Tensor,
    weight: Tensor,
    attention: Attention,
    damping: float,
    sensitivity: Tensor | None,
    sensitive_basis: bool = False,
) -> tuple[Tensor, Tensor, Subspace]:
    """The value path in its best bases: bases (key/value heads, w, w), the consumer in them (d, m), and the subspace.

    In the full basis the block is what it was; its directions are then units like any others.
    covariance (m, m) of the attended values, weight (d, m) of the consumer. The sensitivity weighs the energies, and
    with `sensitive_basis` the bases, too.
    """
    seen = sensitivity if sensitive_basis else None
    heads, queries = attention.heads * attention.queries, attention.queries
    basis = head_space.value_basis(head_blocks(covariance, heads).double(), weight, damping, seen, queries)
    rotated, in_basis = rotate(covariance, weight, basis.repeat_interleave(queries, 0))
    columns = head_space.direction_columns(heads, basis.shape[-1], weight.device)
    return basis, in_basis, factorise(rotated, in_basis, columns, damping, sensitivity)


def order_scores(attention: Attention, moments: Mapping[str, Moments], damping: float) -> FreeScores | RotaryPairs:
    """What can go between query and key; moments: of the outputs of `query` and `key`, grouped by head."""
    queries, keys = moments["query"], moments["key"]
    if attention.scores == FREE:
        return FreeScores.of(by_head(queries.uncentred), by_head(keys.covariance), damping)
    return RotaryPairs.of(by_head(queries.uncentred), by_head(keys.covariance))


def by_head(second: Tensor) -> Tensor:
    """(h, w, w), also of a single head."""
    return second.reshape(-1, *second.shape[-2:])


def rotate(covariance: Tensor, weight: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Covariance (m, m) and consumer weight (d, m) in orthonormal head bases (h, w, w)."""
    half = head_space.to_basis(covariance, basis.to(covariance.dtype))
    return head_space.to_basis(half.mT, basis.to(covariance.dtype)), head_space.to_basis(weight, basis)


def head_blocks(covariance: Tensor, heads: int) -> Tensor:
    """The (h, w, w) diagonal blocks of a covariance (h·w, h·w)."""
    w = covariance.shape[0] // heads
    return covariance.view(heads, w, heads, w).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
