"""The plan: how many units of which site stay, and who decided it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config import ORDERS, PruneConfig
from ..core.allocation import ALLOCATIONS, SiteCurve, allocate, allocate_alike
from ..core.orders import NEEDS_NONNEGATIVE
from ..errors import OptionError
from ..families import ATTENTION, EXPERTS, MLP, SCORES, SHARED, Attention, Family, Site, dropped
from .kinds import allocate_mixed, sites_of
from .layers import allocate_both, allocate_layers, layer_curves, removable
from .steps import Step, why_steps

# Attention kernels want head dimensions that are multiples of 8; more would forbid pruning heads of 64.
HEAD_DIM_MULTIPLE = 8
# The products of all experts at once, which transformers 5 computes them by, want rows that are multiples of 16 bytes.
EXPERT_MULTIPLE = 8


@dataclass(frozen=True)
class Plan:
    """kept[i] maps a unit name (heads, or directions inside them, and neurons) to how many are left in block i.

    asked, removed: parameters; base: linear parameters of all blocks, of which `sparsity` is the share.
    curves: what the allocation saw; alike: whether it had to keep the same in every block; beside: other parameters
    that go, those of blocks that go as a whole; structures: whether it was about units or layers; steps: in which it
    was made, if it was.
    """

    kept: tuple[dict[str, int], ...]
    curves: tuple[SiteCurve, ...]
    made_by: str
    asked: float
    removed: int
    base: int
    alike: bool = False
    beside: int = 0
    structures: str = "units"
    steps: tuple[Step, ...] = ()

    @property
    def why(self) -> str:
        """The allocation's reason in one sentence, with the number at which the budget was met."""
        if self.steps:
            return why_steps(self.steps)
        if self.structures != "units":
            return self._why_layers
        if self.alike:
            return {
                "uniform": "every site gives the same share, in every block as much",
                "variance": "the sites whose tails have the least of their variance give, in every block as much",
                "loss": "of all plans that are the same in every block, the one that loses least",
            }[self.made_by]
        taken = [
            priorities[curve.kept_counts.index(self.kept[curve.block][curve.unit]) - 1]
            for curve, priorities in zip(self.curves, ALLOCATIONS[self.made_by](self.curves), strict=True)
            if self.kept[curve.block][curve.unit] < curve.units and curve.site != EXPERTS
        ]
        cut = max(taken, default=0.0)
        experts = sum(curve.units - self.kept[curve.block][EXPERTS] for curve in self.curves if curve.site == EXPERTS)
        first = f"{experts} whole experts go, of all numbers the one that loses least, and " if experts else ""
        return {
            "uniform": "every site gives the same share",
            "variance": f"every site drops the longest tail with at most {cut:.3g} of its variance (τ)",
            "loss": f"{first}units go in order of loss per parameter, over all sites, up to {cut:.3g}",
        }[self.made_by]

    @property
    def _why_layers(self) -> str:
        gone = [curve for curve in self.curves if self.kept[curve.block][curve.unit] == 0]
        sites = ", ".join(f"{sum(curve.site == site for curve in gone)} {site}" for site in (ATTENTION, MLP))
        blocks = len(self.kept) - len(self.left)
        how = {"uniform": "spread over the depth", "loss": "those without which least is lost per parameter"}[
            self.made_by
        ]
        rest = ", and units in order of loss per parameter of what stays" if self.structures == "both" else ""
        return f"layers go as a whole, {how}: {sites}, with them {blocks} whole blocks{rest}"

    @property
    def whole_heads(self) -> bool:
        """Whether heads, or single query heads, go."""
        heads = (curve for curve in self.curves if curve.unit in ("heads", "queries"))
        return any(0 < self.kept[curve.block].get(curve.unit, 0) < curve.units for curve in heads)

    @property
    def gone(self) -> int:
        """All parameters that go, linear or not."""
        return self.removed + self.beside

    @property
    def left(self) -> list[int]:
        """The blocks of which something is left."""
        return [index for index, kept in enumerate(self.kept) if not dropped(kept)]

    @property
    def achieved(self) -> float:
        """Share of the blocks' linear parameters that goes."""
        return self.removed / self.base

    def untouched(self, block: int) -> bool:
        """Whether everything in a block stays."""
        whole = (self.kept[c.block][c.unit] == c.units for c in self.curves if c.block == block)
        return not dropped(self.kept[block]) and all(whole)


def check_order(family: Family, config: Any, options: PruneConfig) -> None:
    """Raise `OptionError` if the order cannot rank the units of some site, before anything is loaded."""
    sites = {site for index in _blocks(family, config) for site in sites_of(family, config, options, index)}
    for site in sorted(sites, key=lambda site: site.name):
        if options.order not in ORDERS and site.unit != EXPERTS:
            where = (
                "the MLP beside the experts" if site.name == SHARED else f"the {site.name} of blocks without experts"
            )
            raise OptionError(
                f"--order {options.order} ranks whole experts only, and {where} of this model would lose neurons, too; "
                "give another order, such as greedy"
            )
        by_direction = site.name == ATTENTION and site.unit == "heads" and options.attention == "dims"
        if options.order in NEEDS_NONNEGATIVE and not (site.nonnegative or by_direction):
            directions = site.name == ATTENTION and family.attention(config) is not None
            remedy = "--attention dims" if directions else "another order, such as greedy"
            raise OptionError(
                f"--order {options.order} needs activations that cannot be negative, and the {site.unit} of this "
                f"model's {site.name} layers can be; choose {remedy}"
            )


def _blocks(family: Family, config: Any) -> range:
    """The blocks that have to be looked at to see all that differ: of a dense model one, if it is no mixture."""
    alike = family.mixture is None and getattr(config, "block_widths", None) is None
    return range(1 if alike else config.num_hidden_layers)


def empty_curves(family: Family, config: Any, blocks: Sequence[nn.Module], options: PruneConfig) -> list[SiteCurve]:
    """Sites with their costs but nothing measured; blocks may be on meta. `both` counts heads here."""
    return [curve for i, block in enumerate(blocks) for curve in block_curves(family, config, i, block, options)]


def block_curves(family: Family, config: Any, index: int, block: nn.Module, options: PruneConfig) -> list[SiteCurve]:
    """Those of one block."""
    attention = family.attention(config, index) if options.attention == "dims" else None
    curves = []
    for site in sites_of(family, config, options, index):
        if site.name == ATTENTION and attention is not None:
            curves += direction_curves(family, index, block, site, attention, options)
            continue
        curves.append(unit_curve(family, config, index, block, site, options))
    return curves


def block_choices(
    family: Family, config: Any, index: int, block: nn.Module, options: PruneConfig
) -> list[list[SiteCurve]]:
    """The curves of one block, for each kind of what `both` chooses from, or the one kind of other modes."""
    modes = ("heads", "dims", "queries") if options.attention == "both" else (options.attention,)
    chosen = (dataclasses.replace(options, attention=mode) for mode in modes)
    return [block_curves(family, config, index, block, kind) for kind in chosen]


def due_of_attentions(family: Family, config: Any, blocks: Sequence[nn.Module], options: PruneConfig) -> list[float]:
    """How many parameters the attention of each block must be able to give, or the budget cannot be met.

    All else gives what it can; what is missing is due of the attentions, in proportion to what each can give at most.
    """
    most, others = [], 0
    for index, block in enumerate(blocks):
        choices = block_choices(family, config, index, block, options)
        able = [[curve for curve in curves if curve.site in (ATTENTION, SCORES)] for curves in choices]
        most.append(max(_removable(curves) for curves in able))
        others += _removable(choices[0]) - _removable(able[0])
    asked = options.sparsity * sum(family.linear_parameters(block, config) for block in blocks)
    share = max(0.0, asked - others) / max(1, sum(most))
    return [share * each for each in most]


def unit_curve(
    family: Family, config: Any, index: int, block: nn.Module, site: Site, options: PruneConfig
) -> SiteCurve:
    """A site of a block counted in whole units."""
    multiple = options.round_to if site.unit in ("neurons", SHARED) else 1
    if site.experts and site.unit != EXPERTS:
        multiple = math.lcm(multiple, EXPERT_MULTIPLE)
    multiple = min(multiple, site.units)
    cost = family.unit_cost(block, site)
    only = family.stock_counts(config, site) if options.format == "stock" and site.name == ATTENTION else None
    return SiteCurve(index, site.name, site.unit, site.units, cost, multiple, least=site.least, only=only)


def direction_curves(
    family: Family, index: int, block: nn.Module, site: Site, attention: Attention, options: PruneConfig
) -> list[SiteCurve]:
    """The attention site of a block counted in directions of all its heads instead of heads."""
    multiple = min(options.round_to, HEAD_DIM_MULTIPLE)
    return [
        SiteCurve(
            index,
            where,
            unit,
            units,
            family.direction_cost(block, site, attention, unit),
            min(units, max(1, multiple // 2) if unit == "pairs" else multiple),
        )
        for unit, (where, units) in attention.directions.items()
    ]


def check_budget(family: Family, config: Any, blocks: Sequence[nn.Module], options: PruneConfig) -> None:
    """Raise `OptionError` if no plan can meet the budget, before anything is measured."""
    if options.round_to > 1:  # first whether it is --sparsity alone
        check_budget(family, config, blocks, dataclasses.replace(options, round_to=1))
    if options.structures == "layers":
        layers = layer_curves(family, config, blocks, options, {})
        base = sum(family.linear_parameters(block, config) for block in blocks)
        _check_removable(options, removable(layers, options.whole_blocks), base)
        return
    choices = (block_choices(family, config, index, block, options) for index, block in enumerate(blocks))
    most = sum(max(map(_removable, kinds)) for kinds in choices)
    _check_removable(options, most, sum(family.linear_parameters(block, config) for block in blocks))


def _removable(curves: Sequence[SiteCurve]) -> int:
    """Parameters that can go at most."""
    return sum(curve.removable for curve in curves)


def _check_removable(options: PruneConfig, most: int, base: int) -> None:
    """most: parameters that can go; base: all linear ones of the blocks."""
    if options.sparsity * base > most and options.structures == "layers":
        raise OptionError(
            f"--sparsity {options.sparsity:g} would need layers that have to stay: but for the first attention, which "
            f"tells a KV cache its length, at most {int(1000 * most / base) / 1000:g} can be removed from this model "
            f"as {'whole blocks' if options.whole_blocks else 'layers'}: lower it, or leave out --structures layers"
        )
    if options.sparsity * base > most and options.round_to > 1:
        raise OptionError(
            f"--sparsity {options.sparsity:g} and --round-to {options.round_to} exclude each other: with a multiple of "
            f"{options.round_to} units left in every layer, or all where it has fewer, at most "
            f"{int(1000 * most / base) / 1000:g} can be removed from this model{_with(options)}; lower one of them"
        )
    if options.sparsity * base > most:
        raise OptionError(
            f"--sparsity {options.sparsity:g} would leave a block empty; with one unit left everywhere"
            f"{', of experts as many as work on a token,' if options.experts == 'whole' else ''} at most "
            f"{int(1000 * most / base) / 1000:g} can be removed from this model{_with(options)}: lower it"
        )


def make_plan(
    family: Family,
    config: Any,
    blocks: Sequence[nn.Module],
    options: PruneConfig,
    curves: Sequence[SiteCurve],
    by: str,
    totals: Mapping[tuple[int, str], float] | None = None,
) -> Plan:
    """Allocate the budget over `curves` with allocation `by`. Raises `OptionError` if that cannot be met.

    totals: what is lost without each layer, by block and site (default: as the curves have it).
    """
    base = sum(family.linear_parameters(block, config) for block in blocks)
    asked = options.sparsity * base
    if totals is None:
        totals = {(curve.block, curve.site): curve.total for curve in curves if curve.total is not None}
    by_layer = options.structures in ("layers", "both")
    layers = layer_curves(family, config, blocks, options, totals) if by_layer else []
    if options.structures == "layers":
        counts, curves = allocate_layers(by, layers, asked, options.whole_blocks), layers
    elif options.structures == "both" and by == "loss":
        curves, counts = allocate_both(curves, layers, asked)
    elif any(curve.site == EXPERTS for curve in curves):
        curves, counts = allocate_mixed(curves, asked, options.alike)
    else:
        _check_removable(options, _removable(curves), base)
        counts = (allocate_alike if options.alike else allocate)(by, curves, asked)
    return planned(family, config, blocks, options, curves, counts, by)


def planned(
    family: Family,
    config: Any,
    blocks: Sequence[nn.Module],
    options: PruneConfig,
    curves: Sequence[SiteCurve],
    counts: Sequence[int],
    by: str,
) -> Plan:
    """The plan in which each of `curves` keeps its count."""
    bases = [family.linear_parameters(block, config) for block in blocks]
    asked, structures = options.sparsity * sum(bases), options.structures or "units"
    kept: list[dict[str, int]] = [{} for _ in blocks]
    gone = [0] * len(blocks)
    for curve, count in zip(curves, counts, strict=True):
        kept[curve.block][curve.unit] = count
        gone[curve.block] += curve.gone(count)
    beside = 0
    for index, block in enumerate(blocks):
        if dropped(kept[index]):
            gone[index] = bases[index]
            beside += sum(p.numel() for p in block.parameters()) - bases[index]
            continue
        alone = {curve.site for curve in curves if curve.block == index and kept[index][curve.unit] == 0}
        for site in sites_of(family, config, options, index):
            beside += family.beside_cost(block, site) if site.name in alone else 0
            beside += family.router_row(block, site) * (site.experts - kept[index].get(EXPERTS, site.experts))
    return Plan(tuple(kept), tuple(curves), by, asked, sum(gone), sum(bases), options.alike, beside, structures)


def trial_plan(family: Family, config: Any, blocks: Sequence[nn.Module], options: PruneConfig) -> Plan:
    """A plan of the size asked for, before anything is measured: the same share everywhere.

    `both` counts heads if they can give as much, else directions, else query heads, else in each block what can give
    most. Raises `OptionError` if nothing can.
    """
    base = sum(family.linear_parameters(block, config) for block in blocks)
    choices = [block_choices(family, config, index, block, options) for index, block in enumerate(blocks)]
    for kinds in (*zip(*choices, strict=True), [max(kinds, key=_removable) for kinds in choices]):
        curves = [curve for block in kinds for curve in block]
        if _removable(curves) >= options.sparsity * base:
            break
    return make_plan(family, config, blocks, options, curves, "uniform")


def _with(options: PruneConfig) -> str:
    """What narrows the choice of what can be removed."""
    if options.format != "auto":
        return f" with --format {options.format}"
    return f" with --attention {options.attention}" if options.attention == "none" else ""
