"""Decide: from what is measured over the dense model, how much of which site stays."""

from __future__ import annotations

from .everything import everything
from .left_out import losses_without
from .measure import measured_curves
from .plan import Plan, empty_curves, make_plan
from .sensitivity import measure_sensitivity
from .session import Session


def decide(session: Session) -> Plan:
    """The plan, by measuring passes over the dense model where the allocation asks for them."""
    options, blocks = session.options, session.skeleton.blocks
    if options.in_steps and options.sparsity > 0:
        return everything(session)
    if options.needs_gradient:
        measure_sensitivity(session)
    measured = options.measures and options.structures != "layers"
    totals = losses_without(session) if options.measures and not measured else None
    curves = measured_curves(session) if measured else empty_curves(session.family, session.config, blocks, options)
    assert options.allocation is not None
    # Nothing to remove: nothing was measured, and every allocation gives the same plan.
    by = options.allocation if options.sparsity > 0 else "uniform"
    return make_plan(session.family, session.config, blocks, options, curves, by, totals)
