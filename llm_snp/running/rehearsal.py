"""The documents of a run before it begins: what they cannot hold shows now, and not hours later."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from ..dense.data import Windows
from ..dense.skeleton import Skeleton
from ..documents.card import model_card
from ..documents.page import html_page
from ..documents.report import Report
from ..documents.schema import fault
from ..documents.shareable import shareable
from ..errors import CheckpointError
from ..evaluation.perplexity import summed
from ..pruning.job import Job
from ..pruning.plan import trial_plan
from ..result.assembly import result_config
from ..system.libraries import explained


def rehearse(
    job: Job, skeleton: Skeleton, report: Report, tokenizer: Any, evaluation: Mapping[str, Windows]
) -> dict[str, Any]:
    """Make config, report, card and page of a run that follows the uniform plan and loses nothing, and forget them.

    Every name is what it will be: of model, texts, options, licence, tags. Returns that report. Raises
    `CheckpointError` for a config that the result could not have; what else is raised is a fault of llm_snp, met before
    the hours that a run takes.
    """
    trial = copy.deepcopy(report)
    options = job.options
    plan = trial_plan(job.family, job.config, skeleton.blocks, options)
    with explained(
        lambda cause: CheckpointError(f"{job.directory}/config.json is none that a result can have ({cause})")
    ):
        config, needs_code = result_config(job, plan.kept, tokenizer)
        config.to_json_string().encode()
    trial.planned(plan, plan.base, needs_code)
    for index in range(len(skeleton)):
        trial.block(index, {})
    for source, windows in evaluation.items():
        for which in ("dense", "pruned"):
            trial.evaluated(source, which, summed(0.0, windows))
    trial.finished(job.output, 0, {})
    data = trial.data
    for text in (model_card(data), html_page(data), written := json.dumps(shareable(data), allow_nan=False)):
        text.encode()
    if found := fault(json.loads(written)):  # what is written is what `report`, `push` and `heal` read
        raise CheckpointError(f"{job.directory} would get a report that cannot be read ({found}); please tell us")
    return data
