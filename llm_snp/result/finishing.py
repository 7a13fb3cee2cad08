"""The end of a run: the documents of a result, what this machine remembers of it, and the name of its directory."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..documents.plots import PLOTS, plot_path
from ..documents.writing import CARD, PAGE, write_documents, write_report
from ..errors import OutputError
from ..system.files import disk
from ..system.libraries import explained
from ..system.manifest import FILES, REPORT, list_in_partial
from ..system.progress import Progress
from ..system.remembering import remember
from ..system.workspace import Workspace


def finish(
    workspace: Workspace,
    files: Mapping[str, str],
    report: dict[str, Any],
    memory: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Make the partial directory a result. files: name -> hash of what it consists of beside its documents.

    memory: what stays on this machine. Raises `OutputError` if the disk does not take it, or the documents cannot be
    made; the result is whole all the same.
    """
    directory = workspace.directory
    report[FILES] = dict(files)
    with disk(directory):  # of a run that came so far, and was gone on with: its documents are none of this report
        (directory / REPORT).unlink(missing_ok=True)
        list_in_partial(directory, (CARD, PAGE, *map(plot_path, PLOTS)))
    try:
        with explained(lambda why: OutputError(f"the documents of the result cannot be made ({why})")):
            write_documents(directory, report, new=True)
    finally:  # whatever the documents have met, the result is whole, and `report DIR` makes them anew
        if not (directory / REPORT).exists():
            write_report(directory, report)
        remember(directory, memory)
        workspace.finish()
    if workspace.left:
        progress.say(f"kept {workspace.left}: someone put files into {workspace.output} while it was replaced")


def finished_all_the_same(output: Path) -> str:
    """What a run that was ended after its result had its name has to say of that."""
    said = f"{output} is finished all the same"
    if (output / CARD).exists():
        return said
    return f"{said}, but for its documents, which `python -m llm_snp report {shlex.quote(str(output))}` makes"
