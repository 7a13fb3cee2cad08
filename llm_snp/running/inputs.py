"""What a run reads on this machine, so that it does not write there, and what is remembered of it afterwards."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..config import shares
from ..documents.writing import read_report
from ..errors import CheckpointError
from ..evaluation.harness_tasks import tasks_of, texts_of
from ..pruning.job import Job
from ..result.origin import ancestors
from ..system.manifest import check_as_written, is_result

ADAPTER = "adapter_config.json"  # peft's
UNREAD = f"{ADAPTER} lies beside the weights, and is not read: merge the adapter first to prune it, too"
CHANGED_SINCE = "the model's weights have changed since they were pruned, as by training: its report is of before"


def inputs_of(job: Job) -> dict[Path, bool]:
    """The model's directory, those of what it was made of, and the local ones and files among texts, tasks, --offload.

    True of those in which nothing may be written; tasks and hidden states may lie in a directory with all kinds of
    things, such as the one that one works in.
    """
    options = job.options
    texts = [*shares(options.texts), *texts_of(options.evaluate or ())]
    before = report_of(job.directory)
    found = dict.fromkeys([job.directory, *(ancestors(job.directory, before) if before else ())], True)
    for names, closed in ((texts, True), ((*tasks_of(options.evaluate or ()), options.offload), False)):
        for name in names:
            if name and os.path.exists(path := os.path.expanduser(name)):
                found.setdefault(Path(path), closed)
    return found


def report_of(directory: Path) -> dict[str, Any] | None:
    """The report of the run that made a model that is pruned again, as far as there is one that can be read."""
    with suppress(CheckpointError):
        return read_report(directory) if is_result(directory) else None
    return None


def remarks(directory: Path, before: Mapping[str, Any] | None) -> list[str]:
    """What whoever has the model may not know: what lies there and is not read, and a report that is of other weights.

    before: of the run that made it, whose weights are read for that.
    """
    found = [UNREAD] if os.path.lexists(directory / ADAPTER) else []
    try:
        if before is not None:
            check_as_written(directory, before)
    except CheckpointError:
        found.append(CHANGED_SINCE)
    return found


def memory_of(job: Job, read: Mapping[str, str]) -> dict[str, Any]:
    """What the report does not say, because it is of this machine: the options as given, and the model's place.

    read: hashes of the model and the texts that the run has read.
    """
    model = job.options.model if job.from_hub or job.options.model is None else str(job.directory.resolve())
    return {"options": dataclasses.asdict(job.options), "model": model, "read": dict(read)}
