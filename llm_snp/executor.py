"""The loop: plan, then block by block moments, solve, shrink, save; the hidden states move through the pruned block.

Names no family and no criterion. Attention is pruned before the MLP, so that the MLP is fitted to what it will read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from .calibrate import Reference, block_moments, site_moments
from .config import PruneConfig
from .families import Family, Site
from .measure import measured_curves
from .plan import Plan, empty_curves, make_plan
from .progress import Progress
from .prune_site import SiteResult, State, narrow_heads, prune_units, refit_consumer
from .sensitivity import Sensitivity, gradient_windows, measure_sensitivity
from .skeleton import Skeleton
from .stream import Stream

# site name -> what pruning it did
BlockResult = dict[str, SiteResult]


def decide(
    skeleton: Skeleton, family: Family, config: Any, tokens: Tensor, options: PruneConfig, progress: Progress
) -> tuple[Plan, Sensitivity]:
    """The plan, by one measuring pass over the dense model where the allocation asks for it; tokens (N, T)."""
    curves = empty_curves(family, config, skeleton.blocks, options)
    sensitivity: Sensitivity = {}
    if options.needs_gradient:
        windows = tokens[: gradient_windows(tokens.shape[0], len(skeleton))]
        with progress.phase("sensitivity", 2 * len(skeleton)) as step:
            matrix = options.sensitivity == "fisher"
            progress.say(f"gradient of the loss on {windows.shape[0]} windows, labels from the calibration text")
            sensitivity = measure_sensitivity(skeleton, windows, family.sites(config), matrix, step)
    if options.measures:
        with progress.phase("measure", len(skeleton)) as step:
            stream = Stream(skeleton, tokens)
            curves = measured_curves(skeleton, family, config, stream, options, curves, sensitivity, step)
    assert options.allocation is not None
    # Nothing to remove: nothing was measured, and every allocation gives the same plan.
    by = options.allocation if options.sparsity > 0 else "uniform"
    return make_plan(family, config, skeleton.blocks, options, curves, by), sensitivity


def prune_blocks(
    skeleton: Skeleton,
    family: Family,
    config: Any,
    tokens: Tensor,
    options: PruneConfig,
    plan: Plan,
    sensitivity: Sensitivity,
    progress: Progress,
    save: Callable[[int, State, BlockResult], None],
) -> None:
    """Prune all blocks front to back and hand each finished block's tensors to `save`."""
    with progress.phase("prune", len(skeleton)) as step:
        stream = Stream(skeleton, tokens)
        follows_dense = options.target in ("dense", "residual")
        dense_stream: Stream | None = None
        for i in range(len(skeleton)):
            state = skeleton.block_state(i)
            if dense_stream is None and plan.untouched(i):
                # So far the pruned model is the dense model: there is nothing to repair.
                save(i, state, {})
                stream.advance(i, skeleton.load_block(i, state))
                step()
                continue
            if follows_dense and dense_stream is None:
                dense_stream = stream.copy()
            pruner = _BlockPruner(skeleton, family, config, options, plan.kept[i], sensitivity, i, stream, dense_stream)
            results = pruner.run(state)
            save(i, pruner.state, results)
            last = i + 1 == len(skeleton)
            if not last:
                stream.advance(i, pruner.block)
            step()


class _BlockPruner:
    """One block while it is pruned: its tensors, the live block with them, and what they are fitted to."""

    def __init__(
        self,
        skeleton: Skeleton,
        family: Family,
        config: Any,
        options: PruneConfig,
        kept: dict[str, int],
        sensitivity: Sensitivity,
        index: int,
        stream: Stream,
        dense_stream: Stream | None,
    ):
        self.skeleton, self.family, self.config, self.options = skeleton, family, config, options
        self.kept, self.sensitivity, self.index = kept, sensitivity, index
        self.stream, self.dense_stream = stream, dense_stream
        self.done: dict[str, int] = {}
        self.state: State = {}
        self.block: nn.Module

    def run(self, state: State) -> BlockResult:
        self.dense = self.skeleton.load_block(self.index, state)
        self._load(state)
        results: BlockResult = {}
        sites = self.family.sites(self.config)
        for site in sites:
            results[site.name] = self._prune(site, last=site is sites[-1])
        return results

    def _load(self, state: State) -> None:
        """Take new tensors, and a live block with the widths that are done so far."""
        self.state = state
        widths = self.family.widths(self.config, self.done)
        self.block = self.skeleton.load_block(self.index, state, partial(self.family.narrow, **widths))

    def _prune(self, site: Site, last: bool) -> SiteResult:
        unit = "dims" if site.unit not in self.kept else site.unit
        keep = self.kept[unit]
        g = self.sensitivity.get((self.index, site.name))
        by_direction = unit == "dims" and keep < site.group
        if by_direction:
            self._narrow_heads(site, keep, g)
        reference = None
        if self.dense_stream is not None:
            reference = Reference(self.dense, self.dense_stream, self.options.target == "residual", advance=last)
        elif by_direction:  # what the whole heads give on the pruned stream
            reference = Reference(self.dense, None)
        moments = site_moments(
            self.index, self.block, self.stream, site, reference, hold_out=self.options.damping == "auto"
        )
        if unit == "dims":
            result = refit_consumer(self.block, self.state, site, moments, self.options, keep)
        else:
            seed = self.options.seed + 1_000_003 * self.index + sum(map(ord, site.name))
            result = prune_units(self.block, self.state, site, moments, keep, self.options, g, seed)
        self.done[unit] = keep
        self._load(result.state)
        return result

    def _narrow_heads(self, site: Site, rank: int, g: Tensor | None) -> None:
        """Cut the heads to `rank` directions, chosen on the pruned stream."""
        attention = self.family.attention(self.config)
        found = block_moments(self.index, self.block, self.stream, (site,), attention)
        state = narrow_heads(
            self.block,
            self.state,
            site,
            attention,
            found[site.name],
            found[attention.query],
            found[attention.key],
            rank,
            self.options.curve_damping,
            g,
        )
        self.done["dims"] = rank
        self._load(state)
