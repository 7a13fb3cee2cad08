"""The method, from the dense blocks to the pruned ones: block by block calibrate, order, repair each site, save, and
advance the hidden states.

Names no family and no criterion. Attention is pruned before the MLP, so that the MLP is fitted to what it will read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor, nn

from ..dense.stream import Stream
from ..families import EXPERTS, Site, dropped
from .calibrate import Reference, SiteMoments, calibrate_block, calibrate_site
from .directions import narrow_heads
from .experts import removal_of, with_experts
from .plan import Plan
from .repair import SiteResult, refit_site, repair_site
from .sensitivity import read_sensitivity
from .session import Session
from .weights import State


@dataclass(frozen=True)
class SiteLoss:
    """What pruning a site lost: output energies and the damping that was used (`core.repair.Pruned`).

    scarce: experts that were given too few tokens, by their number as text, and the damping of each.
    """

    lost: float
    total: float
    damping: float
    scarce: dict[str, float] = field(default_factory=dict)


# site name -> what pruning it lost; empty for a block that stays as it was
BlockLoss = dict[str, SiteLoss]
# Gives a block's pruned tensors and losses if an earlier run has finished it.
Finished = Callable[[int], tuple[State, BlockLoss] | None]


def prune_blocks(
    session: Session,
    plan: Plan,
    save: Callable[[int, State | None, BlockLoss], None],
    finished: Finished | None = None,
    phase: str = "prune",
    title: str = "",
) -> None:
    """Prune all blocks front to back and hand each finished block's tensors to `save`; None of one that is gone.

    A block that `finished` gives is not pruned again: the hidden states only move through it. phase, title: see
    `Progress.phase`.
    """
    skeleton, family, config = session.skeleton, session.family, session.config
    follows_dense = session.options.target in ("dense", "residual")
    with session.progress.phase(phase, len(skeleton), title) as step:
        stream = session.stream()
        dense_stream: Stream | None = None
        for i, dense_state in skeleton.block_states(range(len(skeleton))):
            last = i + 1 == len(skeleton)
            done = finished(i) if finished and not dropped(plan.kept[i]) else None
            if dense_stream is None and plan.untouched(i):
                # So far the pruned model is the dense model: there is nothing to repair.
                if done is None:
                    save(i, dense_state, {})
                if not last:
                    stream.advance(i, skeleton.load_block(i, dense_state))
                step()
                continue
            if follows_dense and dense_stream is None:
                dense_stream = stream.copy()
            if dropped(plan.kept[i]):
                save(i, None, {})
                if dense_stream is not None and not last:
                    dense_stream.advance(i, skeleton.load_block(i, dense_state))
                step()
                continue
            if done is None:
                pruner = _BlockPruner(session, plan.kept[i], i, stream, dense_stream)
                losses = pruner.run(dense_state)
                save(i, pruner.state, losses)
                block = pruner.block
                del pruner
            else:
                widths = family.widths(config, plan.kept[i], i)
                block = skeleton.load_block(i, done[0], partial(family.pruned_class.narrow, **widths))
                if dense_stream is not None and not last:
                    dense_stream.advance(i, skeleton.load_block(i, dense_state))
            if not last:
                stream.advance(i, block)
            del block  # or it would live on while the next one is pruned
            step()


class _BlockPruner:
    """One block while it is pruned: its tensors, the live block with them, and what they are fitted to.

    Every process measures its share of the windows; the main one solves, and the others get what it found.
    """

    def __init__(self, session: Session, kept: dict[str, int], index: int, stream: Stream, dense_stream: Stream | None):
        self.session, self.kept, self.index = session, kept, index
        self.stream, self.dense_stream = stream, dense_stream
        weighs = session.options.sensitive_order
        self.sensitivity: dict[str, Tensor] = read_sensitivity(session, index) if weighs else {}
        self.done: dict[str, int] = {}
        self.state: State = {}
        self.block: nn.Module
        self.dense: nn.Module | None = None

    def run(self, state: State) -> BlockLoss:
        """Prune the sites one after the other, each to what the ones before it have become."""
        self.dense = self.session.skeleton.load_block(self.index, state)
        self._take(state)
        losses: BlockLoss = {}
        mode = "queries" if "queries" in self.kept else self.session.options.attention
        sites = self.session.family.prunable(self.session.config, mode, self.index)
        if not sites and self.dense_stream is not None:
            self.dense_stream.advance(self.index, self.dense)
        for site in sites:
            last = site is sites[-1]
            narrowed = False
            if site.experts and EXPERTS in self.kept:
                narrowed, site = site.experts > self.kept[EXPERTS], self._without_experts(site)
            whole = site.unit in self.kept  # units go as a whole
            if not whole and not site.experts:
                narrowed = self._narrow_heads(site)
            moments = self._calibrate(site, narrowed, last)
            losses[site.name] = self._order_and_repair(site, moments, whole)
        return losses

    def _without_experts(self, site: Site) -> Site:
        """Let experts go, chosen on the pruned stream; the site of those that are left, counted in neurons."""
        keep = self.kept[EXPERTS]
        if keep < site.experts:
            weighs = read_sensitivity(self.session, self.index).get(site.name)
            removal = removal_of(self.session, self.index, self.block, self.stream, site.by_expert, weighs)
            del self.block
            self.done[EXPERTS] = keep
            self._take(with_experts(self.state, site, sorted(removal.order[:keep])))
        return replace(site, experts=keep)

    def _narrow_heads(self, site: Site) -> bool:
        """Cut the heads to the directions that are kept, ordered on the pruned stream; False if all of them are."""
        attention = self.session.family.attention(self.session.config, self.index)
        assert attention is not None
        kept = {unit: self.kept[unit] for unit in attention.directions}
        if all(kept[unit] == units for unit, (_, units) in attention.directions.items()):
            return False
        moments = calibrate_block(self.index, self.block, self.stream, (site,), attention)
        options, g = self.session.options, self.sensitivity.get(site.name)
        state = self.session.processes.on_main(
            lambda: narrow_heads(self.state, site, attention, moments, kept, options, g)
        )
        self.done |= kept
        self._take(self._from_main(state))
        return True

    def _calibrate(self, site: Site, narrowed: bool, last: bool) -> list[SiteMoments]:
        """The moments of what the consumer of each of the site's members reads, with the target it is repaired to.

        The live blocks are let go of: solving works on the tensors alone, and needs the memory.
        """
        options = self.session.options
        assert self.dense is not None
        reference = None
        if self.dense_stream is not None:
            residual = options.target == "residual" and site.stream is not None
            reference = Reference(self.dense, self.dense_stream, residual, advance=last)
        elif narrowed:  # what the whole heads give on the pruned stream
            reference = Reference(self.dense, None)
        hold_out = options.damping == "auto"
        moments = calibrate_site(self.index, self.block, self.stream, site, reference, hold_out)
        del self.block
        if last:
            self.dense = None
        return moments

    def _order_and_repair(self, site: Site, moments: list[SiteMoments], whole: bool) -> SiteLoss:
        """Keep as many of the site's units as the plan says, and refit its consumer; of experts that of each."""
        options, g, share = self.session.options, self.sensitivity.get(site.name), self.session.share(site)

        def solve() -> SiteResult:
            if not whole:
                return refit_site(self.state, site, moments, options, share)
            seed = options.seed + 1_000_003 * self.index + sum(map(ord, site.name))
            return repair_site(self.state, site, moments, self.kept[site.unit], options, g, seed, share)

        result = self.session.processes.on_main(solve)
        loss = self.session.processes.from_main(lambda: _loss(result))
        if whole:
            self.done[site.unit] = self.kept[site.unit]
        self._take(self._from_main(None if result is None else result.state))
        return loss

    def _take(self, state: State) -> None:
        """Take new tensors, and a live block with the widths that are done so far."""
        self.state = state
        family = self.session.family
        widths = family.widths(self.session.config, self.done, self.index)
        self.block = self.session.skeleton.load_block(self.index, state, partial(family.pruned_class.narrow, **widths))

    def _from_main(self, state: State | None) -> State:
        """The tensors of the main process, of which only those that changed travel."""
        processes, changed = self.session.processes, None
        if state is not None:
            changed = {name: tensor for name, tensor in state.items() if tensor is not self.state.get(name)}
        left = processes.from_main(lambda: set(state or ()))
        found = self.state | processes.tensors_from_main(changed, self.session.skeleton.device)
        return {name: tensor for name, tensor in found.items() if name in left}


def _loss(result: SiteResult | None) -> SiteLoss:
    assert result is not None
    scarce = {str(expert): damping for expert, damping in result.scarce.items()}
    return SiteLoss(result.lost, result.total, result.damping, scarce)
