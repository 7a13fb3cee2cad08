"""`--dry-run`: the plan and what the run will need, from the config alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config import PruneConfig
from ..dense.hub import config_dtype
from ..dense.skeleton import empty_model, linear_blocks
from ..dense.storage import check_offload
from ..pruning.job import Job, open_job
from ..pruning.plan import Plan, check_budget, trial_plan
from ..result.carried import check_tokenizer_class
from ..system.device import resolve_dtype
from ..system.files import size
from ..system.output import check_harmless, check_output, check_partial
from .estimate import Estimate, estimate
from .inputs import inputs_of


@dataclass(frozen=True)
class Preview:
    """job, plan: the uniform one where `measured` says that the run will measure first; parameters: of the model."""

    job: Job
    plan: Plan
    measured: bool
    parameters: int
    estimate: Estimate
    dtype: torch.dtype


def preview(options: PruneConfig, device: torch.device | None = None) -> Preview:
    """The plan without weights; `device`: estimate for this one, whether it is there or not. Raises `SnpError`."""
    options.validate()
    check_offload(options.offload)
    job = open_job(options, weights=False)
    check_tokenizer_class(job.directory)
    if not options.resume:
        check_output(job.output, options.overwrite)
        check_partial(job.output)
        check_harmless(job.output, inputs_of(job))
    family, config, options = job.family, job.config, job.options
    device = device or job.device
    dtype = resolve_dtype(options.dtype, device, config_dtype(config))
    model = empty_model(config)
    parameters = sum(p.numel() for p in model.parameters())
    blocks, _ = linear_blocks(model, family.blocks)
    check_budget(family, config, blocks, options)
    plan = trial_plan(family, config, blocks, options)
    needed = estimate(model, family, config, options, job.length, dtype, device, 1 - plan.gone / parameters)
    return Preview(job, plan, options.measures, parameters, needed, dtype)


def preview_text(p: Preview) -> str:
    """What a person sees of it."""
    plan, options = p.plan, p.job.options
    lines = [
        f"plan for {options.model or 'the embedded OPT'}: {options.method}, order {options.order}, "
        f"allocation {options.allocation}, target {options.target}, attention {options.attention}"
        + ("" if options.experts in (None, "neurons") else f", experts {options.experts}")
    ]
    if p.measured:
        by = "which layers and units go is decided step by step" if options.in_steps else ""
        by = by or f"allocation {options.allocation} is decided by a measuring pass"
        lines.append(f"{by}; shown is the uniform plan")
    units = {(c.block, c.unit): c.units for c in plan.curves}
    for i, kept in enumerate(plan.kept):
        counts = "  ".join(f"{unit} {k}/{units[i, unit]}" for unit, k in kept.items())
        lines.append(f"block {i + 1:>3}/{len(plan.kept)}  {counts}")
    work = p.estimate.operations
    on_device = "" if p.job.device.type == "cpu" else f"{size(p.estimate.device)} on the device, "
    lines += [
        "",
        f"parameters  {p.parameters:,} -> {p.parameters - plan.gone:,} "
        f"({plan.achieved:.2%} of the blocks' linear layers, {plan.gone / p.parameters:.2%} of all)",
        f"windows     {options.samples} of {p.job.length} tokens, computed in {str(p.dtype).removeprefix('torch.')} "
        f"on {p.job.device}",
        f"peak memory about {on_device}{size(p.estimate.host)} on the host, beside Python and its libraries",
        f"disk        about {size(p.estimate.disk)} for {p.job.output} and what --resume needs",
        f"work        {sum(work.values()):.2g} floating-point operations: "
        + ", ".join(f"{name} {value / sum(work.values()):.0%}" for name, value in work.items() if value),
    ]
    return "\n".join(lines)
