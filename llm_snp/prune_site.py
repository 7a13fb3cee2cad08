"""Prune one site of a live block: moments in, smaller weights out.

The weights are cut from the tensors of the checkpoint, in their own dtype; what the repair changed is rounded to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import PruneConfig
from .core import heads as head_space
from .core.moments import Moments
from .core.repair import (
    Pruned,
    finish,
    lost_energy,
    refit_all,
    refit_bias,
    subspace_of_units,
    without_repair,
)
from .core.subspace import Subspace, factorise, truncate
from .errors import NumericalError
from .families import Attention, Site

State = dict[str, Tensor]
# --damping auto tries these, best on the held-out windows wins.
DAMPING_GRID = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class SiteMoments:
    """Moments of a consumer's input on the fitting windows, and on those held out for `--damping auto`."""

    fit: Moments
    held: Moments | None = None

    @property
    def all(self) -> Moments:
        return self.fit if self.held is None else self.fit.merge(self.held)


@dataclass(frozen=True)
class SiteResult:
    """The new tensors of a block (host, dtype of the checkpoint) and what pruning this site lost."""

    state: State
    lost: float
    total: float
    damping: float


def linear_weights(state: State, name: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Weight (d, m) and bias (d,) of a linear layer as the checkpoint has them, float64, on `device`."""
    bias = state.get(f"{name}.bias")
    return state[f"{name}.weight"].to(device, torch.float64), None if bias is None else bias.to(device, torch.float64)


def prune_units(
    state: State,
    site: Site,
    moments: SiteMoments,
    keep: int,
    options: PruneConfig,
    sensitivity: Tensor | None,
    seed: int,
) -> SiteResult:
    """Keep `keep` whole units of a site of a block and repair its consumer."""
    device = moments.fit.first.device

    def solve(moments: Moments, damping: float) -> Pruned:
        refitted, damping = refit_all(moments, linear_weights(state, site.consumer, device)[0], damping)
        assert options.order is not None
        generator = torch.Generator().manual_seed(seed)
        subspace = subspace_of_units(
            moments,
            refitted,
            options.order,
            site.group,
            damping,
            sensitivity,
            keep,
            site.nonnegative,
            generator,
            options.sensitive_order,
            energies=False,
        )
        if options.target == "none":
            return without_repair(moments, subspace, *linear_weights(state, site.consumer, device), keep)
        columns, refit = truncate(subspace, refitted, keep)
        damping = subspace.damping
        del subspace, refitted  # the largest matrices there are
        return finish(moments, *linear_weights(state, site.consumer, device), columns, refit, damping)

    damping = choose_damping(options, moments, linear_weights(state, site.consumer, device), solve)
    pruned = solve(moments.all, damping)
    new = dict(state)
    columns = pruned.columns.cpu()
    for name in site.layers[:-1]:
        rows = site.rows_left(name, new[f"{name}.weight"].shape[0], columns)
        for suffix in ("weight", "bias"):
            if f"{name}.{suffix}" in new:
                new[f"{name}.{suffix}"] = new[f"{name}.{suffix}"][rows].contiguous()
    store(new, site.consumer, pruned.weight, pruned.bias if f"{site.consumer}.bias" in state else None)
    return SiteResult(new, pruned.lost, pruned.total, pruned.damping)


def choose_damping(
    options: PruneConfig,
    moments: SiteMoments,
    layer: tuple[Tensor, Tensor | None],
    solve: Callable[[Moments, float], Pruned],
) -> float:
    """The damping asked for, or for `auto` the one of a grid whose repair errs least on the held-out windows.

    layer: weight (d, m) and bias (d,) of the consumer before pruning.
    """
    if moments.held is None:
        assert not isinstance(options.damping, str)
        return options.damping
    weight, bias = layer
    errors = []
    for damping in DAMPING_GRID:
        pruned = solve(moments.fit, damping)
        held = moments.held
        error = lost_energy(held, weight, pruned.columns, pruned.weight)
        if bias is not None:
            # The bias that would be right for the held-out windows, minus the one that was fitted.
            offset = refit_bias(held, weight, bias, pruned.columns, pruned.weight) - pruned.bias
            error += offset.square().sum().item()
        errors.append(error)
    return DAMPING_GRID[min(range(len(errors)), key=errors.__getitem__)]


def refit_consumer(state: State, site: Site, moments: SiteMoments, options: PruneConfig) -> SiteResult:
    """Refit a consumer whose inputs are already what they will be; the ridge pulls to its present weights.

    With target `none` only the bias follows the mean.
    """
    weight, bias = linear_weights(state, site.consumer, moments.fit.first.device)
    everything = torch.arange(weight.shape[1], device=weight.device)

    def solve(moments: Moments, damping: float) -> Pruned:
        refit, damping = (weight, 0.0) if options.target == "none" else refit_all(moments, weight, damping)
        return finish(moments, weight, bias, everything, refit, damping)

    damping = choose_damping(options, moments, (weight, bias), solve)
    pruned = solve(moments.all, damping)
    new = dict(state)
    store(new, site.consumer, pruned.weight, None if bias is None else pruned.bias)
    return SiteResult(new, pruned.lost, pruned.total, pruned.damping)


def narrow_heads(
    state: State,
    site: Site,
    attention: Attention,
    values: Moments,
    queries: Moments,
    keys: Moments,
    rank: int,
    options: PruneConfig,
    sensitivity: Tensor | None,
) -> State:
    """Keep `rank` directions of every head between query and key and in the value path; out_proj refitted to itself.

    values: moments of the consumer's input; queries, keys: of the projections' outputs, grouped by head.
    """
    device, damping = values.first.device, options.curve_damping
    weight, bias = linear_weights(state, site.consumer, device)
    basis, in_basis, subspace = value_subspace(
        values.covariance, weight, attention.heads, damping, sensitivity, options.sensitive_order
    )
    query, key, _ = head_space.score_basis(queries.uncentred, keys.covariance, damping)
    new = dict(state)
    for name, transform in ((attention.query, query), (attention.key, key), (attention.value, basis)):
        rows, row_bias = head_space.transform_rows(*linear_weights(state, name, device), transform[:, :rank])
        store(new, name, rows, row_bias)
    columns, refit = truncate(subspace, in_basis, rank)
    new_bias = None
    if bias is not None:
        mean = head_space.to_basis(values.mean[None], basis)[0]
        new_bias = bias + in_basis @ mean - refit @ mean[columns]
    store(new, site.consumer, refit, new_bias)
    return new


def value_subspace(
    covariance: Tensor,
    weight: Tensor,
    heads: int,
    damping: float,
    sensitivity: Tensor | None,
    sensitive_basis: bool = False,
) -> tuple[Tensor, Tensor, Subspace]:
    """The value path of all heads in its best bases: bases (h, w, w), the consumer in them (d, m), and the subspace.

    In the full basis the block is what it was; its directions are then units like any others.
    covariance (m, m) of the attended values, weight (d, m) of the consumer. The sensitivity weighs the energies, and
    with `sensitive_basis` the bases, too.
    """
    seen = sensitivity if sensitive_basis else None
    basis = head_space.value_basis(head_blocks(covariance, heads).double(), weight, damping, seen)
    rotated, in_basis = rotate(covariance, weight, basis)
    columns = head_space.direction_columns(heads, basis.shape[-1], weight.device)
    return basis, in_basis, factorise(rotated, in_basis, columns, damping, sensitivity)


def rotate(covariance: Tensor, weight: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Covariance (m, m) and consumer weight (d, m) in orthonormal head bases (h, w, w)."""
    half = head_space.to_basis(covariance, basis.to(covariance.dtype))
    return head_space.to_basis(half.mT, basis.to(covariance.dtype)), head_space.to_basis(weight, basis)


def head_blocks(covariance: Tensor, heads: int) -> Tensor:
    """The (h, w, w) diagonal blocks of a covariance (h·w, h·w)."""
    w = covariance.shape[0] // heads
    return covariance.view(heads, w, heads, w).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def store(state: State, name: str, weight: Tensor, bias: Tensor | None) -> None:
    """Put a layer's new weight and bias into a state, rounded to its dtype. Raises `NumericalError` on overflow."""
    for suffix, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        key = f"{name}.{suffix}"
        rounded = value.to(state[key].dtype)
        if not torch.isfinite(rounded).all():
            raise NumericalError(
                f"the repaired {key} exceeds what {state[key].dtype} can hold (largest entry "
                f"{value.abs().max().item():.3g}); give a larger --damping"
            )
        state[key] = rounded.cpu().contiguous()
