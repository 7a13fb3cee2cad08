"""The documents of a finished result: model card, page, plots, and the report that they are made from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, OptionError, OutputError, ReplacedError
from ..system.files import alone, digest, digest_of_bytes, disk, inside, write_bytes, write_together
from ..system.libraries import explained
from ..system.manifest import FILES, REPLACING, REPORT, announced, changed, expect_result, is_result, manifest, sealed
from ..system.output import check_outside_cache
from ..system.private import in_cache
from .card import model_card
from .page import html_page, is_page
from .plots import FOLDER, PLOTS, plot_images, plot_path
from .report import FORMAT
from .schema import fault
from .shareable import shareable

CARD = "README.md"
PAGE = "report.html"


def write_documents(directory: Path, report: dict[str, Any], new: bool = False, own_code: bool = True) -> list[Path]:
    """Write plots/*.png, report.html, README.md and report.json; returns the paths of what was written.

    new: `directory` becomes a result by it; else it has that of which the report is. own_code: as `model_card` has it.

    They are made as a whole, and written aside, before the first takes its name: a failure leaves those that were
    there, and what is interrupted among their renames is known for ours (`announced`). What a person has edited since
    it was written here, or has put there, is left alone. Sets `report["files"]`, the hashes of everything that belongs
    to the result. Nothing that is written names a place on this machine (`shareable`). Raises `OutputError` if the disk
    does not take them, a name is that of a file which the report does not list, or the report has what none can have;
    `ReplacedError` if another result has come into the place of the one that the report is of.
    """
    if not new:
        check_there(directory, report)
    plots = {plot_path(name): inside(directory, plot_path(name)) for name in PLOTS}
    files = manifest(directory, report)
    others = _unlisted(directory, files, (*plots, PAGE))
    public = shareable(report)
    if wrong := fault(public):
        raise OutputError(f"{directory / REPORT} could not be read again ({wrong}); it stays as it is")
    with _of(directory):
        drawn = plot_images(public)
        made = {**drawn, PAGE: html_page(public).encode()}
    if not edited(directory / CARD, files.get(CARD)):
        titles = [(plot.title, plot_path(name)) for name, plot in PLOTS.items() if plot_path(name) in made]
        with _of(directory):
            made[CARD] = model_card(public, plots=titles, own_code=own_code).encode()
    if not new and (taken := sorted(others.intersection(made))):
        raise _in_the_way(directory / taken[0])
    for name in [one for one in (*plots, PAGE) if one in made and files.get(one)]:
        if edited(directory / name, files[name]):
            del made[name]
    gone = {name: found for name, found in files.items() if name in plots and name not in drawn}
    old = set(gone).difference(*changed(directory, gone))
    files = {name: found for name, found in files.items() if name not in gone}
    coming = {name: digest_of_bytes(content) for name, content in made.items()}
    if not new:  # drawing takes a while
        check_there(directory, report)
    report[FILES] = dict(sorted((files | coming).items()))
    public |= {FILES: report[FILES]}
    public.pop(REPLACING, None)
    # Last: a directory with it is a result.
    write_together(directory, made | {REPORT: sealed(public)}, {} if new else {REPORT: announced(directory, coming)})
    with disk(directory / FOLDER):
        for name in old:
            plots[name].unlink(missing_ok=True)
    return [directory / name for name in (*made, REPORT)]


def store(
    directory: Path,
    report: dict[str, Any],
    section: str,
    measured: Any,
    seconds: float | None = None,
    own_code: bool = True,
) -> None:
    """Put into the report of a result, as it is by now, what was measured, and how long that took; write all documents.

    report: that of the result when it was measured, which gets it as well; own_code: as `model_card` has it.
    Another process may have added to the result meanwhile, or be about to. Raises what `write_documents` does.
    """
    check_there(directory, report)  # there may be none
    with alone(directory):
        check_there(directory, report)
        now = read_report(directory)
        for one in (report, now):
            one[section] = measured
            if seconds is not None:
                one["seconds"][section] = seconds
        now["options"]["evaluate"] = report["options"]["evaluate"]  # of tasks, perhaps others than were asked for first
        write_documents(directory, now, own_code=own_code)
        report[FILES] = now[FILES]


def check_way(directory: Path, report: dict[str, Any]) -> None:
    """Raise `OutputError` where something is in the way of a result's documents: told before hours of measuring."""
    paths = [inside(directory, plot_path(name)) for name in PLOTS]
    if os.path.lexists(folder := directory / FOLDER) and not folder.is_dir():
        raise _in_the_way(folder)
    if taken := _unlisted(directory, manifest(directory, report), (PAGE,)):
        raise _in_the_way(directory / min(taken))
    if folders := [path for path in (*paths, directory / PAGE, directory / CARD) if path.is_dir()]:
        raise _in_the_way(folders[0])


def rehearse(directory: Path, report: dict[str, Any]) -> None:
    """Make the documents of a report, as far as that is known before hours of measuring, and forget them.

    Raises `OutputError` for a report of which they cannot be made, or that could not be read again.
    """
    public = shareable(report)
    if wrong := fault(public):
        raise OutputError(f"{directory} would get a report that cannot be read again ({wrong}); it stays as it is")
    with _of(directory):
        plot_images(public)
        html_page(public)
        model_card(public)


def _of(directory: Path) -> AbstractContextManager[None]:
    """Made of a report, which may be a stranger's: whatever a library says to that."""
    return explained(lambda why: OutputError(f"the documents of {directory} cannot be made ({why})"))


def _unlisted(directory: Path, files: Mapping[str, str], names: Iterable[str]) -> set[str]:
    """Those of the names that something has which is no file of the result."""
    return {name for name in names if name not in files and os.path.lexists(directory / name)}


def _in_the_way(path: Path) -> OutputError:
    return OutputError(f"{path} is none that a run of llm_snp wrote, and in its way; move it")


def cached(directory: Path) -> str:
    """Why a result is left as it is, and what helps."""
    return f"{directory} is in the cache of the Hub, where nothing is changed; download it with --local-dir"


def check_there(directory: Path, report: dict[str, Any]) -> None:
    """Raise `ReplacedError` unless `directory` has the result that `report` is of: measuring it may take hours; and
    `OutputError` for one whose files are not to be changed.
    """
    if in_cache(directory):
        raise OutputError(f"{cached(directory)}, or give `report` an --output FILE.html")
    documents = {CARD, PAGE, *map(plot_path, PLOTS)}
    there, expected = (
        {name: found for name, found in files.items() if name not in documents}
        for files in (manifest(directory), manifest(directory, report))
    )
    if not is_result(directory) or there != expected:
        raise ReplacedError(
            f"{directory} has another result by now, or none: it was replaced or moved meanwhile; what was measured or "
            "drawn is written nowhere"
        )


def write_report(directory: Path, report: dict[str, Any]) -> None:
    """Write report.json alone, without which a directory is no result, where the other documents cannot be made."""
    report[FILES] = dict(sorted(manifest(directory, report).items()))
    write_bytes(directory / REPORT, sealed(shareable(report) | {FILES: report[FILES]}))


def kept(directory: Path, written: Sequence[Path]) -> list[Path]:
    """The documents that are there and were not `written`, because they are not as they were."""
    paths = [directory / name for name in (CARD, PAGE, *map(plot_path, PLOTS))]
    return [path for path in paths if os.path.lexists(path) and path not in written]


def edited(path: Path, expected: str | None) -> bool:
    """Whether a document is not what was written here. One without a report is of a run that was killed."""
    with disk(path):
        report = path.with_name(REPORT) if path.parent.name != FOLDER else path.parent.with_name(REPORT)
        finished = path.exists() and report.exists()
        return finished and (not path.is_file() or digest(path) != expected)


def write_page(path: Path, report: dict[str, Any]) -> None:
    """Write only the page, to a new file or over an earlier page. Raises `OptionError` for any other file."""
    page = html_page(report).encode()  # takes a while, in which something else may come there
    with disk(path):
        check_outside_cache(path, "--output")
        if path.suffix.lower() not in (".html", ".htm"):
            raise OptionError(f"--output {path} is no name for a page; give one that ends in .html")
        if is_result(path.parent) and path.name in manifest(path.parent):
            raise OptionError(f"--output {path} is part of a result; leave --output out to make its page anew")
        ours = path.is_file() and is_page(path.read_bytes())
        if os.path.lexists(path) and not ours:
            raise OptionError(
                f"--output {path} is there, and no page of llm_snp, or changed since; give another name, or move it"
            )
    write_bytes(path, page, replace=ours)


def _finite(text: str) -> float:
    """A number as JSON has it; `ValueError` for NaN and what is infinite."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is no number of JSON")
    return value


def read_report(directory: Path) -> dict[str, Any]:
    """The report of a result. Raises `CheckpointError` if `directory` is none that this llm_snp can read."""
    path, advice = directory / REPORT, "give the directory that a run of llm_snp has written"
    expect_result(directory)
    restore = "restore the file, or prune again"
    try:
        report = json.loads(path.read_bytes(), parse_constant=_finite, parse_float=_finite)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; {advice}") from error
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{path} is damaged or truncated, it is no JSON ({why}); {restore}") from error
    versions = report.get("versions") if isinstance(report, dict) else None
    if not isinstance(versions, dict) or "llm_snp" not in versions or not isinstance(report.get("format"), int):
        raise CheckpointError(f"{path} is no report of llm_snp; {advice}")
    if report["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {report['format']}, of llm_snp {versions['llm_snp']}; this llm_snp knows {FORMAT} and "
            "older: install a newer one"
        )
    if found := fault(report):
        raise CheckpointError(f"{path} is damaged: {found}; {restore}")
    # Earlier reports do not say it.
    report["model"].setdefault("custom_code", any(directory.glob("modeling_*.py")))
    return report
