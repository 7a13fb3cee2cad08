"""What a result was made of, as far as its report and this machine know."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..dense.hub import EMBEDDED, find, locate
from ..errors import CheckpointError, SnpError
from ..system.files import digest
from ..system.manifest import has_report
from ..system.private import HUB_ID, REVISION
from ..system.remembering import recall

WEIGHTS_READ = "the hash of the model's weights"  # in what this machine remembers of a result
COPIED = "a result that was copied does not know where that is"  # see `recall`


def dense_of(directory: Path, report: dict[str, Any]) -> str | None:
    """Where the dense model of a result is: its Hub id, or its directory on the machine that pruned it; None: embedded.

    Raises `CheckpointError` where only the machine of the run would know. A report's word for a directory is not taken:
    it may be a stranger's, and what is read there is distilled or timed, and published.
    """
    name: str | None = report["options"].get("model")
    if (known := recall(directory).get("model")) is not None and not report["model"].get("hub"):
        return str(known)
    if name is None:
        return None
    if not (report["model"].get("hub") and HUB_ID.fullmatch(name)):
        raise CheckpointError(f"{name} was a directory on the machine that made {directory}")
    if os.path.lexists(name):
        raise CheckpointError(
            f"{name} is on the Hub, and what has that name in the working directory is something else"
        )
    return name


def _revision_of(directory: Path, report: dict[str, Any]) -> str | None:
    """The revision of the dense model on the Hub. Raises `CheckpointError` for a place, which a stranger may name."""
    revision: str | None = report["options"].get("revision")
    if revision is not None and not REVISION.fullmatch(revision):
        raise CheckpointError(f"{directory} names {revision[:60]!a}, which is no branch, tag or commit")
    return revision


def find_dense(directory: Path, report: dict[str, Any]) -> Path:
    """The dense model of a result, fetched if need be.

    Raises `SnpError` if it cannot be had, or is a directory that has other weights than when the result was made of it.
    """
    found = locate(dense_of(directory, report), _revision_of(directory, report))
    expect_as_pruned(found, directory)
    return found


def expect_as_pruned(found: Path, directory: Path) -> None:
    """Raise `CheckpointError` if a model has other weights than when a result was made of it."""
    if not _as_pruned(found, directory):
        raise CheckpointError(f"{found} has other weights than when {directory} was made of it")


def _as_pruned(found: Path, directory: Path) -> bool:
    """Whether a model has the weights that a result was made of, as far as this machine knows those."""
    from ..dense.checkpoint import weight_files  # with torch, and the door is light

    memory = recall(directory)
    known = memory.get("read", {}).get(WEIGHTS_READ)
    # Without a hash, too: a place that a stranger has chosen holds nothing that he knows.
    if known is None and memory.get("model") != str(found):
        return True
    return bool(known == digest(*(found / name for name in weight_files(found))))


def is_dense_of(given: str, found: Path, directory: Path, report: dict[str, Any]) -> bool:
    """Whether the model that was given, and found there, is the one that a result was made of, with those weights."""
    try:
        name, revision = dense_of(directory, report), report["options"].get("revision")
    except CheckpointError:
        return False
    local = EMBEDDED if name is None else Path(os.path.expanduser(name))
    itself = (given == name and not revision) or (os.path.isdir(local) and found.samefile(local))
    return itself and _as_pruned(found, directory)


def ancestors(directory: Path, report: dict[str, Any]) -> list[Path]:
    """The directories of the models that a result was made of, the last one first, as far as they are on this machine.

    A report may name its own directory.
    """
    from ..documents.writing import read_report  # the door is light

    found: list[Path] = []
    with suppress(SnpError):
        while (place := find(dense_of(directory, report))) is not None and place not in found:
            found.append(place)
            if not has_report(place):
                break
            directory, report = place, read_report(place)
    return found
