"""What must be the same for an interrupted run to be gone on with, and what is kept of one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import __version__
from .checkpoint import Checkpoint
from .config import PruneConfig
from .data import Windows
from .errors import RESUMABLE, DeviceMemoryError, Interrupted, SnpError
from .files import digest
from .job import Job
from .report import command_line
from .workspace import JOURNAL, REPORT, Workspace, is_result, tidy
from .writer import TOKENIZER_FILES

# Options that do not change the result, or whose effect is compared by content (model, calibration text, dtype).
FREE = frozenset(
    "model output calibration evaluate revision device dtype overwrite resume offload quiet".split()  # noqa: SIM905
)


def settings(options: PruneConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The options that decide the result, by the name of their flag, and the version that reads them."""
    fields = {
        f"--{f.name.replace('_', '-')}": getattr(options, f.name)
        for f in dataclasses.fields(options)
        if f.name not in FREE
    }
    return {"llm_snp": __version__, **fields, "--dtype": str(dtype).removeprefix("torch.")}


def model_identity(job: Job, checkpoint: Checkpoint) -> dict[str, str]:
    """Hashes of everything that is read of the dense model."""
    tokenizer = [job.directory / name for name in TOKENIZER_FILES if (job.directory / name).is_file()]
    return {
        "the model's config.json": digest(job.directory / "config.json"),
        "the model's tokenizer": digest(*tokenizer),
        "the model's weights": digest(*checkpoint.files),
    }


def calibration_identity(calibration: Windows) -> dict[str, str]:
    """The token windows, whatever the text they were drawn from was called."""
    return {"the calibration text (sha256 of its windows)": calibration.sha256}


def finished_before(job: Job) -> dict[str, Any] | None:
    """The report of a result that is already there and was asked for with the same options, for --resume."""
    output = job.output.resolve()
    if not job.options.resume or job.options.overwrite or not is_result(output):
        return None
    if (output / JOURNAL).exists():  # killed between giving the directory its name and tidying up
        tidy(output)
    report: dict[str, Any] = json.loads((output / REPORT).read_text(encoding="utf-8"))
    now = json.loads(json.dumps(dataclasses.asdict(job.options)))
    same = [name for name in now if name not in FREE or name == "model"]
    return report if all(report["options"].get(name) == now[name] for name in same) else None


@contextmanager
def kept_for_resume(workspace: Workspace | None, blocks: int) -> Iterator[None]:
    """Whatever ends the run early, leave what can be gone on with and say so, or nothing at all."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, torch.OutOfMemoryError):
            error = DeviceMemoryError(
                f"the device ran out of memory ({str(error).splitlines()[0]}); use --device cpu or a shorter "
                "--sequence-length; --dry-run tells what a run needs"
            )
        worth = workspace is not None and (not isinstance(error, SnpError) or isinstance(error, RESUMABLE))
        left = _left(workspace, blocks) if worth and workspace is not None else ""
        if workspace is not None:
            if left:
                workspace.keep()
            else:
                workspace.discard()
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"interrupted; {left}" if left else "interrupted; nothing was left behind") from error
        if left and isinstance(error, SnpError):
            raise type(error)(f"{error}; {left}") from error
        raise error


def _left(workspace: Workspace, blocks: int) -> str:
    """What an unfinished run has to show, and how to go on; empty if there is nothing."""
    finished = workspace.finished_blocks
    measured = len(list(workspace.journal.glob("curves-*.json")))
    if not finished and not measured:
        return ""
    what = f"{finished} of {blocks} blocks are finished" if finished else f"{measured} of {blocks} blocks are measured"
    return f"{what} and kept in {workspace.directory}; go on with: {_again()}"


def _again() -> str:
    command = command_line()
    return command if "--resume" in command.split() else f"{command} --resume"
