"""What a run reads on this machine, so that it does not write there, and what is remembered of it afterwards."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..evaluation.harness import tasks_of, texts_of
from ..pruning.job import Job


def inputs_of(job: Job) -> Iterator[Path]:
    """The model's directory, and the local files and directories among texts, tasks and --offload."""
    options = job.options
    yield job.directory
    given = options.calibration
    texts = [*((given,) if isinstance(given, str) else given or ()), *texts_of(options.evaluate or ())]
    # A text may be followed by its share of the windows.
    names = [*texts, *(text.rpartition(":")[0] for text in texts), *tasks_of(options.evaluate or ()), options.offload]
    for name in names:
        if name and os.path.exists(path := os.path.expanduser(name)):
            yield Path(path)


def memory_of(job: Job) -> dict[str, Any]:
    """What the report does not say, because it is of this machine: the options as given, and the model's place."""
    model = job.options.model if job.from_hub or job.options.model is None else str(job.directory.resolve())
    return {"options": dataclasses.asdict(job.options), "model": model}
