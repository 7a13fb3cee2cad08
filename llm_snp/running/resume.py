"""What must be the same for an interrupted run to be gone on with, and what is kept of one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..config import PruneConfig
from ..dense.checkpoint import Checkpoint
from ..dense.data import Windows
from ..documents.report import command_line
from ..errors import RESUMABLE, CheckpointError, DeviceMemoryError, Interrupted, ResumeError, SnpError
from ..pruning.job import Job
from ..result.writer import TOKENIZER_FILES
from ..system.files import digest
from ..system.workspace import JOURNAL, REPORT, Workspace, is_result, tidy
from ..version import __version__

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


def model_identity(job: Job, checkpoint: Checkpoint) -> dict[str, str]:
    """Hashes of everything that is read of the dense model. Raises `CheckpointError` if it cannot be read."""
    tokenizer = [job.directory / name for name in TOKENIZER_FILES if (job.directory / name).is_file()]
    try:
        return {
            "the hash of the model's config.json": digest(job.directory / "config.json"),
            "the hash of the model's tokenizer": digest(*tokenizer),
            "the hash of the model's weights": digest(*checkpoint.files),
        }
    except OSError as error:
        raise CheckpointError(f"{error.filename or job.directory} cannot be read: {error.strerror}") from error


def calibration_identity(calibration: Windows) -> dict[str, str]:
    """The token windows, whatever the text they were drawn from was called."""
    return {"the hash of the calibration text's windows": calibration.sha256}


def finished_before(job: Job) -> dict[str, Any] | None:
    """The report of a result that is already there and was asked for with the same options, for --resume.

    Raises `ResumeError` naming the first option that is another one. With --overwrite an earlier result is to be
    replaced, unless the run that is gone on with has made it and was killed before it had tidied up.
    """
    options, output = job.options, job.output.resolve()
    untidy = (output / JOURNAL).exists()
    tidy(output)
    if not options.resume or not is_result(output) or (options.overwrite and not untidy):
        return None
    report: dict[str, Any] = json.loads((output / REPORT).read_text(encoding="utf-8"))
    now = {"llm_snp": __version__, **json.loads(json.dumps(dataclasses.asdict(options)))}
    earlier = {"llm_snp": report["versions"]["llm_snp"], **report["options"]}
    for name in now:
        if name not in FREE and earlier.get(name) != now[name]:
            if options.overwrite:
                return None
            raise ResumeError(
                f"--resume: {job.output} is finished, and {_flag(name)} is {now[name]!r} now and was "
                f"{earlier.get(name)!r} there; give another --output, or --overwrite"
            )
    return report


def _flag(name: str) -> str:
    """The option as the command line has it."""
    return {"model": "the model", "llm_snp": "llm_snp"}.get(name, f"--{name.replace('_', '-')}")


@contextmanager
def kept_for_resume(workspace: Workspace | None, blocks: int) -> Iterator[None]:
    """Whatever ends the run early, leave what can be gone on with and say so, or nothing at all.

    What an earlier run has left is never removed here: a wrong option must not cost what took days.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, torch.OutOfMemoryError):
            error = DeviceMemoryError(
                f"the device ran out of memory ({str(error).splitlines()[0]}); use --device cpu or a shorter "
                "--sequence-length; --dry-run tells what a run needs"
            )
        left = "" if workspace is None else _left(workspace, blocks)
        # The same command can go on from here; after a ResumeError another one can, as its own sentence says.
        resumable = not isinstance(error, SnpError) or isinstance(error, RESUMABLE)
        if workspace is not None:
            if workspace.resumed or (left and (resumable or isinstance(error, ResumeError))):
                workspace.keep()
            else:
                workspace.discard()
                left = ""
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"interrupted; {left or 'nothing was left behind'}") from error
        if left and resumable and isinstance(error, SnpError):
            raise type(error)(f"{error}; {left}") from error
        raise error


def _left(workspace: Workspace, blocks: int) -> str:
    """What an unfinished run has to show, and how to go on; empty if there is nothing."""

    def count(pattern: str) -> int:
        return len(list(workspace.journal.glob(pattern)))

    if workspace.finished:
        return f"{workspace.output} is finished all the same"
    if workspace.finished_blocks:
        what = f"{workspace.finished_blocks} of {blocks} blocks are finished"
    elif measured := count("curves-*.json"):
        what = f"{measured} of {blocks} blocks are measured"
    elif count("sensitivity-*.json") == blocks:
        what = "the sensitivity of all blocks is measured"
    elif count("dense-*.json"):
        what = "the dense model is evaluated"
    else:
        return ""
    return f"{what} and kept in {workspace.directory}; go on with: {_again()}"


def _again() -> str:
    command = command_line()
    return command if "--resume" in command.split() else f"{command} --resume"
