"""What the same command does with a finished result: tasks of lm-evaluation-harness, measured speed, the Hub.

Nothing of it can harm the result, which has its name by then. These load whole models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch

from ..config import RUNS, PruneConfig
from ..dense.hub import config_dtype
from ..documents.writing import check_there, read_report, store
from ..errors import CheckpointError, DeviceMemoryError, Interrupted, ReplacedError, SnpError, first_line
from ..evaluation.harness import evaluate_harness
from ..evaluation.harness_check import Asked, check_tasks
from ..evaluation.harness_table import compare
from ..evaluation.harness_tasks import tasks_of
from ..evaluation.speed import measure_speed, measurements
from ..pruning.job import Job, output_of
from ..result.origin import expect_as_pruned
from ..result.publish import card_is_edited, push
from ..result.repository import check_push
from ..system.device import resolve_dtype
from ..system.files import digest_of_json
from ..system.libraries import out_of_memory
from ..system.manifest import is_result
from ..system.progress import Progress
from ..system.remembering import TASKS, recall, remember


def check_afterwards(options: PruneConfig) -> dict[str, Asked]:
    """Find out before the work begins what would fail after it. Raises `SnpError`.

    Returns what tasks ask of a model, which is not looked at yet (`check_room`).
    """
    tasks = tasks_of(options.evaluate or ())
    asked = check_tasks(tasks) if tasks else {}
    check_hub(options, maybe_finished=options.resume)
    return asked


def check_hub(options: PruneConfig, maybe_finished: bool) -> None:
    """The same for --push-to-hub alone.

    maybe_finished: whether what goes there may be a result that is there already, with a card that somebody has edited.
    """
    if options.push_to_hub:
        output, edited = output_of(options), False
        if maybe_finished and is_result(output):
            with suppress(CheckpointError):  # it is damaged
                edited = card_is_edited(output, read_report(output))
        check_push(options.push_to_hub, options.overwrite, options.private, edited)


def afterwards(job: Job, report: dict[str, Any], asked: Mapping[str, Asked], progress: Progress) -> dict[str, Any]:
    """Do what `job.options` ask for and `report` does not have; returns the report with it. asked: by the tasks.

    Raises `SnpError` (`ReplacedError` where another result has come into its place), and `Interrupted` for Ctrl-C; what
    was measured before is written.
    """
    options = job.options
    dtype = resolve_dtype(options.dtype, job.device, config_dtype(job.config))
    with _finished_all_the_same(job):
        tasks = tasks_of(options.evaluate or ())
        if tasks and "harness" not in report:
            expect_as_pruned(job.directory, job.output)  # that may be hours ago
            with progress.phase("harness", title=f"lm-evaluation-harness, {', '.join(tasks)}"):
                dense, pruned = (_measured(job, which, asked, dtype) for which in ("dense", "pruned"))
            store(job.output, report, "harness", compare(dense, pruned), _taken(progress, "harness"))
            memory = recall(job.output)
            memory.pop(TASKS, None)
            if "options" in memory:
                memory["options"] |= {"evaluate": options.evaluate}
            remember(job.output, memory)
        if options.measure_speed and "speed" not in report:
            expect_as_pruned(job.directory, job.output)
            with progress.phase("speed", measurements(job.directory, RUNS), unit="run") as step:
                speed = measure_speed(job.output, job.directory, job.device, dtype, step=step)
            store(job.output, report, "speed", speed, _taken(progress, "speed"))
        if options.push_to_hub:
            check_there(job.output, report)
            with progress.phase("push", title=f"push to {options.push_to_hub}"):
                url = push(job.output, options.push_to_hub, options.private, options.overwrite)
            progress.say(f"published as {url}")
    return report


def _measured(job: Job, which: str, asked: Mapping[str, Asked], dtype: torch.dtype) -> dict[str, Any]:
    """Results of all tasks on the dense or the pruned model. Each is kept on this machine as soon as it is there, for a
    later task that cannot be run, or an interruption.
    """
    seed, directory = job.options.seed, job.directory if which == "dense" else job.output
    settings = (which, str(directory.resolve()), str(job.device), str(dtype), seed)
    keys = {task: digest_of_json([*settings, found.digest]) for task, found in asked.items()}
    kept = recall(job.output).get(TASKS, {})
    known = {task: kept[key] for task, key in keys.items() if key in kept}

    def keep(task: str, results: Mapping[str, Any]) -> None:
        memory = recall(job.output)
        remember(job.output, memory | {TASKS: memory.get(TASKS, {}) | {keys[task]: results}})

    return evaluate_harness(directory, list(asked), job.device, dtype, seed=seed, known=known, keep=keep)


def _taken(progress: Progress, phase: str) -> float:
    return round(progress.seconds[phase], 3)


@contextmanager
def _finished_all_the_same(job: Job) -> Iterator[None]:
    """Say with whatever goes wrong that the result is there, and how to go on."""
    left = f"the pruned model is finished in {job.output}; the same command with --resume does the rest"
    try:
        yield
    except ReplacedError:
        raise
    except SnpError as error:
        raise type(error)(f"{error}; {left}") from error
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise DeviceMemoryError(
            f"the device ran out of memory with a whole model on it ({first_line(error)}); {left}, on --device cpu, too"
        ) from error
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted; {left}") from error
