"""Repair one site of a block: moments in, smaller weights out.

The weights are cut from the tensors of the checkpoint, in their own dtype; what the repair changed is rounded to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import PruneConfig
from ..core.moments import Moments
from ..core.repair import (
    Pruned,
    finish,
    lost_energy,
    refit_all,
    refit_bias,
    without_repair,
)
from ..core.subspace import truncate
from ..errors import NumericalError
from ..families import Site
from .calibrate import SiteMoments
from .order import damping_of, order_units, scarcity
from .weights import State, linear_weights, store

# --damping auto tries these, best on the held-out windows wins.
DAMPING_GRID = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
RAISES = 8  # times that a damping becomes ten times as large, at most, where weights would not fit into their type
Solve = Callable[[Moments, float], Pruned]


@dataclass(frozen=True)
class SiteResult:
    """The new tensors of a block (host, dtype of the checkpoint) and what pruning this site lost.

    scarce: experts that were given too few tokens, and the damping of each.
    """

    state: State
    lost: float
    total: float
    damping: float
    scarce: dict[int, float] = field(default_factory=dict)


def repair_site(
    state: State,
    site: Site,
    moments: Sequence[SiteMoments],
    keep: int,
    options: PruneConfig,
    sensitivity: Tensor | None,
    seed: int,
    share: float = 1.0,
) -> SiteResult:
    """`repair_units` of every member of a site; moments: of each."""

    def one(of: State, member: Site, own: SiteMoments) -> SiteResult:
        return repair_units(of, member, own, keep, options, sensitivity, seed + (member.expert or 0), share)

    return _together(state, site, moments, options, one)


def _together(
    state: State,
    site: Site,
    moments: Sequence[SiteMoments],
    options: PruneConfig,
    repair: Callable[[State, Site, SiteMoments], SiteResult],
) -> SiteResult:
    """The members of a site one after the other. The damping is the least of those that saw enough."""
    lost, total, dampings, scarce = 0.0, 0.0, [], {}
    for member, own in zip(site.members, moments, strict=True):
        result = repair(state, member, own)
        state, lost, total = result.state, lost + result.lost, total + result.total
        if member.expert is not None and (raised := scarcity(member, own.all)) > 1:
            # Where nothing is repaired it is the order's.
            scarce[member.expert] = result.damping or raised * options.curve_damping
        else:
            dampings.append(result.damping)
    return SiteResult(state, lost, total, min(dampings or scarce.values()), scarce)


def repair_units(
    state: State,
    site: Site,
    moments: SiteMoments,
    keep: int,
    options: PruneConfig,
    sensitivity: Tensor | None,
    seed: int,
    share: float = 1.0,
) -> SiteResult:
    """Keep `keep` whole units of a site of a block and repair its consumer; of none its bias is left, as a constant.

    share: see `Session.share`.
    """
    device, parts = moments.fit.first.device, site.part_of(state)

    if not keep:
        return _leave_constant(state, site, moments.all, options)

    def solve(moments: Moments, damping: float) -> Pruned:
        refitted, damping = refit_all(moments, linear_weights(state, site.consumer, device)[0], damping, share)
        generator = torch.Generator().manual_seed(seed)
        subspace = order_units(
            moments, refitted, site, options, damping, keep, generator, sensitivity, parts, energies=False
        )
        if options.target == "none":
            return without_repair(moments, subspace, *linear_weights(state, site.consumer, device), keep)
        columns, refit = truncate(subspace, refitted, keep)
        damping = subspace.damping
        del subspace, refitted  # the largest matrices there are
        return finish(moments, *linear_weights(state, site.consumer, device), columns, refit, damping)

    damping = choose_damping(options, moments, linear_weights(state, site.consumer, device), solve)
    new = dict(state)
    pruned = _solved(new, site, solve, moments.all, damping_of(site, moments.all, damping), options)
    columns = pruned.columns.cpu()
    for name in site.layers[:-1]:
        rows = site.rows_left(name, new[f"{name}.weight"].shape[0], columns)
        for suffix in ("weight", "bias"):
            if f"{name}.{suffix}" in new:
                new[f"{name}.{suffix}"] = new[f"{name}.{suffix}"][rows].contiguous()
    units = columns[:: site.group] // site.group
    if site.table is not None and keep < site.units:
        new[site.table] = parts[units]
    for table in site.tables:
        if table in new:
            new[table] = new[table][units]
    return SiteResult(new, pruned.lost, pruned.total, pruned.damping)


def _solved(new: State, site: Site, solve: Solve, moments: Moments, damping: float, options: PruneConfig) -> Pruned:
    """What `solve` gives with a damping, put into `new`, or with as much more as it takes to fit into that type.

    With more of it the weights are nearer to those that are there, which do. One layer must not cost a whole run.
    """
    for left in reversed(range(RAISES + 1)):
        pruned = solve(moments, damping)
        try:
            store(new, site.consumer, pruned.weight, pruned.bias if f"{site.consumer}.bias" in new else None)
            break
        except NumericalError:
            if not left or options.target == "none":
                raise
            damping = max(10 * damping, DAMPING_GRID[0])
    return pruned


def _leave_constant(state: State, site: Site, moments: Moments, options: PruneConfig) -> SiteResult:
    """Of a site of which nothing is kept the bias of its consumer, where there is one: the mean of its target."""
    weight, bias = linear_weights(state, site.consumer, moments.first.device)
    nothing = torch.arange(0, device=weight.device)
    pruned, lost = finish(moments, weight, bias, nothing, weight[:, nothing], 0.0), 0.0
    if options.target == "none" and bias is not None:
        lost = (pruned.bias - bias).square().sum().item()  # the shift of the mean, which nothing corrects
    layers = (f"{layer}.{suffix}" for layer in site.layers for suffix in ("weight", "bias"))
    gone = {*layers, *site.tables, *((site.table,) if site.table else ())}
    if site.enclosing:  # with norms of queries and keys
        gone |= {name for name in state if name.startswith(f"{site.enclosing}.")}
    new = {name: tensor for name, tensor in state.items() if name not in gone}
    if bias is not None:
        key = f"{site.consumer}.bias"
        new[key] = state[key] if options.target == "none" else pruned.bias.to(state[key].dtype).cpu()
    return SiteResult(new, pruned.lost + lost, pruned.total, pruned.damping)


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


def refit_site(
    state: State, site: Site, moments: Sequence[SiteMoments], options: PruneConfig, share: float = 1.0
) -> SiteResult:
    """`refit_consumer` of every member of a site; moments: of each."""
    return _together(state, site, moments, options, lambda of, one, own: refit_consumer(of, one, own, options, share))


def refit_consumer(
    state: State, site: Site, moments: SiteMoments, options: PruneConfig, share: float = 1.0
) -> SiteResult:
    """Refit a consumer whose inputs are already what they will be; the ridge pulls to its present weights.

    With target `none` only the bias follows the mean. share: see `Session.share`.
    """
    weight, bias = linear_weights(state, site.consumer, moments.fit.first.device)
    everything = torch.arange(weight.shape[1], device=weight.device)

    def solve(moments: Moments, damping: float) -> Pruned:
        refit, damping = (weight, 0.0) if options.target == "none" else refit_all(moments, weight, damping, share)
        return finish(moments, weight, bias, everything, refit, damping)

    damping = choose_damping(options, moments, (weight, bias), solve)
    new = dict(state)
    pruned = _solved(new, site, solve, moments.all, damping_of(site, moments.all, damping), options)
    return SiteResult(new, pruned.lost, pruned.total, pruned.damping)
