"""What must be the same for an interrupted run to be gone on with, and what is kept of one."""

from __future__ import annotations

import dataclasses
import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from ..config import PruneConfig, shares
from ..dense.card import card_metadata
from ..dense.checkpoint import Checkpoint
from ..dense.data import Windows
from ..dense.readers import digests
from ..documents.report import nodes
from ..documents.shareable import command_line, shareable
from ..documents.writing import read_report
from ..errors import CheckpointError, ResumeError
from ..evaluation.harness_tasks import texts_of
from ..pruning.job import Job
from ..result.carried import Carried
from ..result.finishing import finished_all_the_same
from ..result.origin import WEIGHTS_READ
from ..system.files import digest, digest_of_json
from ..system.keeping import kept_for_later
from ..system.manifest import check_as_written
from ..system.remembering import recall
from ..system.workspace import Workspace, finished_result
from ..version import __version__

GONE_ON_WITH = "the run was interrupted and gone on with: seconds, versions and device are of its last part"
# Options that do not change the result.
FREE = frozenset(
    ("output", "device", "overwrite", "resume", "offload", "quiet", "measure_speed", "push_to_hub", "private")
)
# Options of which an unfinished run compares what they lead to: the model's files, windows of text, a type.
BY_CONTENT = frozenset(("model", "revision", "calibration", "evaluate", "dtype"))


def settings(options: PruneConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The options that decide the result, by the name of their flag, and the version that reads them."""
    fields = {
        _flag(f.name): getattr(options, f.name) for f in dataclasses.fields(options) if f.name not in FREE | BY_CONTENT
    }
    return {"llm_snp": __version__, **fields, "--dtype": str(dtype).removeprefix("torch.")}


def model_identity(job: Job, carried: Carried, checkpoint: Checkpoint) -> dict[str, str]:
    """Hashes of everything that is read of the dense model. Raises `CheckpointError` if it cannot be read."""
    try:
        return {
            "the hash of the model's config.json": digest(job.directory / "config.json"),
            "the hash of the model's tokenizer, templates and terms": carried.digest,
            "the hash of the terms in the model's card": digest_of_json(card_metadata(job.directory)),
            WEIGHTS_READ: digest(*checkpoint.files),
        }
    except OSError as error:
        raise CheckpointError(f"{error.filename or job.directory} cannot be read: {error.strerror}") from error


def calibration_identity(calibration: Windows) -> dict[str, str]:
    """The token windows, whatever the text they were drawn from was called."""
    return {"the hash of the calibration text's windows": calibration.sha256}


def texts_read(options: PruneConfig) -> list[str]:
    """The texts of a run, as they were given."""
    return [*shares(options.texts), *texts_of(options.evaluate or ())]


def finished_before(job: Job) -> dict[str, Any] | None:
    """The report of a result that is already there and was asked for with the same options, for --resume.

    Raises `ResumeError` naming the first option that is another one, or what was read and has changed since, and
    `CheckpointError` for a result that is not as it was written. With --overwrite such a result is to be replaced, and
    so is any where an unfinished run is kept: that is what is gone on with.
    """
    options, output = job.options, job.output.resolve()
    return finished_result(output, options.resume, options.overwrite, lambda: _finished(job, output))


def _finished(job: Job, output: Path) -> dict[str, Any]:
    options = job.options
    report = read_report(output)
    if report.get("healing"):
        raise ResumeError(
            f"--resume: {job.output} is finished and was healed since; give another --output, or --overwrite instead"
        )
    given = json.loads(json.dumps(dataclasses.asdict(options)))
    earlier = recall(output).get("options")
    if not isinstance(earlier, dict):  # made elsewhere, and brought here: the report has the names of files only
        model = {"name": options.model or "", "hub": job.from_hub}
        given = shareable(report | {"options": given, "model": report["model"] | model})["options"]
        earlier = report["options"]
    now = {"llm_snp": __version__, **given}
    earlier = {"llm_snp": report["versions"]["llm_snp"], **earlier}
    if "harness" not in report:  # tasks that were not run, as one of them cannot be, may be others
        for asked in (now, earlier):
            asked["evaluate"] = list(texts_of(asked.get("evaluate") or ()))
    for name in now:
        if name not in FREE and earlier.get(name) != now[name]:
            raise ResumeError(
                f"--resume: {job.output} is finished, and {_flag(name)} is {now[name]!r} now and was "
                f"{earlier.get(name)!r} there; give another --output, or --overwrite"
            )
    if isinstance(read := recall(output).get("read"), dict):
        checkpoint = Checkpoint(job.directory, job.family.renames)
        found = model_identity(job, Carried(job.directory), checkpoint) | digests(texts_read(options))
        for name in [name for name in {**read, **found} if read.get(name) != found.get(name)]:
            raise ResumeError(
                f"--resume: {job.output} is finished, and {name} is {found.get(name)!r} now and was {read.get(name)!r} "
                "then: it is no result of what is there now; give another --output, or --overwrite"
            )
    elif options.overwrite:  # a copy: its model and texts may be others by now
        raise ResumeError(f"--resume: nothing tells what {job.output} was made of")
    check_as_written(output, report)
    # As the run itself gave it: the report in the file has names where the caller has paths.
    evaluation: dict[str, Any] = {}
    for source, both in zip(texts_of(options.evaluate or ()), report["evaluation"].values(), strict=False):
        evaluation[source] = {which: found | {"source": source} for which, found in both.items()}
    return report | {
        "options": dataclasses.asdict(options),
        "output": str(job.output),
        "evaluation": evaluation,
    }


def _flag(name: str) -> str:
    """The option as the command line has it."""
    return {"model": "the model", "llm_snp": "llm_snp"}.get(name, f"--{name.replace('_', '-')}")


def kept_for_resume(workspace: Workspace | None, blocks: int, command: str) -> AbstractContextManager[None]:
    """`kept_for_later` for a pruning of so many blocks; command: what goes on from there."""
    return kept_for_later(
        workspace,
        lambda there: _left(there, blocks, command),
        "use --device cpu or a shorter --sequence-length; --dry-run tells what a run needs",
    )


def _left(workspace: Workspace, blocks: int, command: str) -> str:
    """What an unfinished run has to show, and how to go on; empty if there is nothing."""

    def count(pattern: str) -> int:
        return len(list(workspace.journal.glob(pattern)))

    if workspace.finished:
        return finished_all_the_same(workspace.output)
    if workspace.finished_blocks:
        what = f"{workspace.finished_blocks} of {blocks} blocks are finished"
    elif steps := count("step-*.json"):
        what = f"{steps} {'step is' if steps == 1 else 'steps are'} decided"
    elif measured := count("curves-*.json"):
        what = f"{measured} of {blocks} blocks are measured"
    elif count("sensitivity-*.json") == blocks:
        what = "the sensitivity of all blocks is measured"
    elif count("dense-*.json"):
        what = "the dense model is evaluated"
    else:
        return ""
    return f"{what} and kept in {workspace.directory}; go on with: {command}"


def again(options: PruneConfig) -> str:
    """The command that goes on with a run, whether a person typed it or a program called `prune`."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return command_line(dataclasses.asdict(options) | {"resume": False}, processes, nodes()) + " --resume"
