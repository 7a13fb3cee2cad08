"""What a result was made of, as far as its report and this machine know."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..dense.hub import EMBEDDED
from ..system.manifest import recall


def dense_of(directory: Path, report: dict[str, Any]) -> str | None:
    """Where the dense model of a result is: its Hub id, or its directory on the machine that pruned it; None: embedded.

    Elsewhere a report tells no more of a directory than its name.
    """
    name: str | None = report["options"].get("model")
    if name is None or report["model"].get("hub"):
        return name
    known = recall(directory).get("model")
    if isinstance(known, str):
        return known
    # Reports of earlier versions have the path itself. Without any, a name must not become one on the Hub.
    return name if "/" in name else f"./{name}"


def is_dense_of(given: str, found: Path, directory: Path, report: dict[str, Any]) -> bool:
    """Whether the model that was given, and found there, is the one that a result was made of."""
    name, revision = dense_of(directory, report), report["options"].get("revision")
    local = EMBEDDED if name is None else Path(os.path.expanduser(name))
    return (given == name and not revision) or (local.is_dir() and found.samefile(local))
