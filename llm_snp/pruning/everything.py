"""`--method everything`: the loop of *Pruning Everything, Everywhere, All at Once* (arXiv 2506.04513), for decoders.

Each step makes two candidates of one size from a parent: one without its least important layer, one with fewer units.
The one whose hidden states, behind the final norm and on windows that nothing is fitted to, have the higher linear CKA
with the parent's is the parent of the next step. The first parent is the dense model; the last step is as small as what
the budget leaves.

A candidate has of its parent the widths only: its weights are made of the dense model's in one go, so that no step
repairs what the one before has done to them, and all follow the dense hidden states. The model of the last plan is then
made as any other is, on all windows. Three things are decisions of ours:

layer       an attention or an MLP: what the residual stream can skip alone, as a residual block of the paper's networks
importance  KL divergence of the parent's predictions without the layer, as in the paper's code, for each parameter
units       go by loss per parameter, from curves that are measured once, over the dense model
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..core.allocation import SiteCurve, allocate
from ..core.moments import Moments
from ..core.similarity import linear_cka
from ..dense.stream import Stream
from ..errors import NumericalError
from ..families import ATTENTION, SCORES
from .executor import BlockLoss, prune_blocks
from .layers import layer_curves
from .left_out import LeftOut, Losses
from .measure import measured_curves
from .plan import Plan, planned
from .sensitivity import measure_sensitivity
from .session import Session
from .steps import Candidate, Step
from .weights import State

Kept = list[dict[str, int]]


def everything(session: Session) -> Plan:
    """The plan that the loop comes to. All processes take part; what an interrupted run has decided stays."""
    held_out = session.options.held_out
    fitting = replace(session, tokens=session.tokens[:-held_out])
    if session.options.needs_gradient:
        measure_sensitivity(fitting)
    return _Loop(fitting, session.tokens[-held_out:], measured_curves(fitting)).run()


@dataclass(frozen=True)
class _Made:
    """A model that was made: its plan, the held-out hidden states behind its last block, and what it loses without
    each of its layers.
    """

    plan: Plan
    states: Stream
    losses: Losses


class _Loop:
    """session: with the windows that candidates are fitted to; held_out (M, T): others; curves: of the dense model."""

    def __init__(self, session: Session, held_out: Tensor, curves: Sequence[SiteCurve]):
        self.session, self.curves = session, curves
        self.watching = replace(session, tokens=held_out)
        blocks = session.skeleton.blocks
        every = layer_curves(session.family, session.config, blocks, session.options, {})
        self.layers = {(curve.block, curve.site): curve for curve in every if curve.only and 0 in curve.only}

    def run(self) -> Plan:
        whole: Kept = [{} for _ in self.session.skeleton.blocks]
        for curve in self.curves:
            whole[curve.block][curve.unit] = curve.units
        plan, steps, journal = self._plan(whole), list[Step](), self.session.journal
        dense: _Made | None = None
        parent: _Made | None = None
        while not self._met(plan, steps):
            name = f"step-{len(steps):05d}"
            known, before = journal.read(name), list(plan.kept)
            if known is not None and known["before"] != before:  # as after curves were measured again elsewhere
                journal.rescue(f"{name} of the interrupted run began at another plan")
                known = None
            if known is None:
                dense = dense or self._make(self._plan(whole), "the dense model")
                parent = parent or (dense if plan.removed == 0 else self._make(plan, "where the run was interrupted"))
                step, parent = self._step(len(steps) + 1, dense, parent)
                plan = parent.plan
                journal.write(name, {"step": dataclasses.asdict(step), "before": before, "kept": list(plan.kept)})
            else:
                step, plan = Step.from_json(known["step"]), self._plan(known["kept"])
            steps.append(step)
        return replace(plan, steps=tuple(steps))

    def _met(self, plan: Plan, steps: Sequence[Step]) -> bool:
        """Whether the budget is met: to half of what the smallest unit costs, or by a step that had it all to give."""
        smallest = min((curve.gone(curve.kept_counts[1]) for curve in _left(plan) if curve.removable), default=0)
        return bool(steps and steps[-1].layer is None) or plan.asked - plan.removed <= smallest / 2

    def _step(self, number: int, dense: _Made, parent: _Made) -> tuple[Step, _Made]:
        """The step that was taken from a parent, and what it has made."""
        remaining = parent.plan.asked - parent.plan.removed
        sizes = {key: size for key in parent.losses if (size := self._size(parent.plan, key)) <= remaining}
        layer = min(sizes, key=lambda key: parent.losses[key] / sizes[key], default=None)
        amount = remaining if layer is None else sizes[layer]
        made: dict[str, tuple[_Made, Candidate]] = {}
        if layer is not None:
            block, site = layer
            found = self._make(self._without(parent.plan, layer), f"step {number}, without the {site} of block {block}")
            made["layer"] = found, self._candidate(found, parent, dense, block, site, parent.losses[layer])
        if layer is None or sum(curve.removable for curve in _left(parent.plan)) >= amount:
            found = self._make(self._with_fewer(parent.plan, amount), f"step {number}, with fewer units")
            made["units"] = found, self._candidate(found, parent, dense)
        step = Step.of(**{name: candidate for name, (_, candidate) in made.items()})
        shown = ", ".join(f"{name} {candidate.to_parent:.4f}" for name, (_, candidate) in made.items())
        self.session.progress.say(f"step {number}: similarity {shown}; taken: {step.taken}")
        return step, made[step.taken][0]

    def _candidate(
        self,
        made: _Made,
        parent: _Made,
        dense: _Made,
        block: int | None = None,
        site: str | None = None,
        loss: float | None = None,
    ) -> Candidate:
        to_parent = similarity(parent.states, made.states)
        to_dense = to_parent if parent is dense else similarity(dense.states, made.states)
        return Candidate(made.plan.removed - parent.plan.removed, to_parent, to_dense, block, site, loss)

    def _plan(self, kept: Kept) -> Plan:
        """The plan with so many units; of a layer of which none are left the curve is that of a layer."""
        gone = {key: layer for key, layer in self.layers.items() if kept[layer.block].get(layer.unit) == 0}
        rest = [curve for curve in self.curves if (curve.block, _site(curve)) not in gone]
        curves = sorted([*rest, *gone.values()], key=lambda curve: curve.block)
        session, counts = self.session, [kept[curve.block][curve.unit] for curve in curves]
        return planned(session.family, session.config, session.skeleton.blocks, session.options, curves, counts, "loss")

    def _without(self, plan: Plan, key: tuple[int, str]) -> Plan:
        kept, layer = [dict(block) for block in plan.kept], self.layers[key]
        for curve in plan.curves:
            if (curve.block, _site(curve)) == key:
                del kept[layer.block][curve.unit]
        kept[layer.block][layer.unit] = 0
        return self._plan(kept)

    def _with_fewer(self, plan: Plan, amount: float) -> Plan:
        kept, left = [dict(block) for block in plan.kept], _left(plan)
        for curve, count in zip(left, allocate("loss", left, amount), strict=True):
            kept[curve.block][curve.unit] = count
        return self._plan(kept)

    def _size(self, plan: Plan, key: tuple[int, str]) -> int:
        """Parameters that a model still has of a layer, and that go with it."""
        units = (c.gone(plan.kept[c.block][c.unit]) for c in plan.curves if (c.block, _site(c)) == key)
        return self.layers[key].gone(0) - sum(units)

    def _make(self, plan: Plan, title: str) -> _Made:
        """The model of a plan, block by block, while the held-out windows, and branches without each layer, go through
        it; what is kept of it are their hidden states.
        """
        session, skeleton = self.session, self.session.skeleton
        states, left_out = self.watching.stream(), LeftOut(self.watching)

        def through(index: int, state: State | None, _: BlockLoss) -> None:
            if state is None:
                return
            widths = session.family.widths(session.config, plan.kept[index], index)
            block = skeleton.load_block(index, state, partial(session.family.pruned_class.narrow, **widths))
            sites = session.sites(index)
            able = [s for s in sites if (index, s.name) in self.layers and not self._is_gone(plan, index, s.name)]
            left_out.block(index, block, able)
            states.advance(index, block)

        prune_blocks(session, plan, through, phase="steps", title=title)
        return _Made(plan, states, left_out.losses())

    def _is_gone(self, plan: Plan, index: int, name: str) -> bool:
        return plan.kept[index].get(self.layers[index, name].unit) == 0


def _site(curve: SiteCurve) -> str:
    """What query and key lose is the attention's."""
    return ATTENTION if curve.site == SCORES else curve.site


def _left(plan: Plan) -> list[SiteCurve]:
    """The sites of a plan with what it leaves of their units, as if that were all there is."""
    left = []
    for curve in plan.curves:
        kept = plan.kept[curve.block][curve.unit]
        if kept:
            assert curve.loss is not None
            left.append(replace(curve, units=kept, loss=curve.loss[: kept + 1], variance=None))
    return left


@torch.no_grad()
def similarity(some: Stream, others: Stream) -> float:
    """Linear CKA of what two models of one skeleton have behind their final norm; streams behind the last block.

    Raises `NumericalError` where that is not finite.
    """
    skeleton, moments = some.skeleton, None
    with skeleton.outer_weights():
        for (rows, hidden), (_, other) in zip(some.parts(), others.parts(), strict=True):
            features = (skeleton.features(some.tokens[rows], states) for states in (hidden, other))
            both = torch.cat(list(features), -1).flatten(0, 1)
            if moments is None:
                moments = Moments.like(both)
                some.processes.same(moments.shift)
            moments.add(both)
    assert moments is not None
    moments.reduce(some.processes.sum)
    if not moments.finite:
        raise NumericalError(
            "hidden states behind the final norm overflow the type they are computed in; use --dtype float32 or "
            "bfloat16"
        )
    return some.processes.from_main(partial(linear_cka, moments.covariance))
