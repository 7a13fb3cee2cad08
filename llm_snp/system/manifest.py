"""Which files of a directory a run of llm_snp wrote, by the list in its report, so that no other is ever removed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckpointError
from .files import MEANWHILE, digest, digest_of_json, temporary, whole, write_json
from .private import in_cache, within
from .progress import one_line

REPORT = "report.json"
FILES = "files"  # of a report: name -> hash of everything beside it that is part of the result
REPLACING = "replacing"  # of a report whose documents are being replaced: name -> hash of what comes
EDITED = "edited"  # of a report on the Hub: that its card is a person's, who has pushed it with the result
SEAL = "seal"  # of a report: hash of the rest of it, by which it is told whether somebody has changed that
JOURNAL = ".llm_snp"  # folder of a run that goes on; in a result only until it has tidied up
PRIVATE = ".cache/huggingface"  # a folder that the Hub's tools and git leave out
MEMORY = f"{PRIVATE}/llm_snp.json"  # see `remembering`
IGNORE = f"{PRIVATE}/.gitignore"
WRITTEN = "written"  # in the journal: the names of what else a run has begun to write beside its shards
SETTINGS = ("config.json", "model.safetensors.index.json")  # with which weights are read
ADVICE = "give the directory that a run of llm_snp has written"
HASH = r"[0-9a-f]{32}"  # of a file, as `digest` writes it
LISTED = 5  # at most so many names are in an error
SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")  # which an unfinished run has beside what it lists


def is_result(directory: Path) -> bool:
    """Whether a directory has the report of an earlier run."""
    return bool(_report(directory))


def has_report(directory: Path) -> bool:
    """The same, or a report that is damaged; the file of that name of another program is none."""
    path = directory / REPORT
    if not path.is_file():
        return False
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return True
    return is_result(directory)


def has_edited_card(directory: Path) -> bool:
    """Whether a result was published with a card that a person had edited."""
    return _report(directory).get(EDITED) is True


def announced(directory: Path, files: Mapping[str, str]) -> bytes:
    """The report that a result has while its documents are replaced by those with other hashes (name -> hash).

    Whoever finds a part of them there, after a kill, knows them by it.
    """
    report = _report(directory)
    return sealed(report | {FILES: manifest(directory, report), REPLACING: dict(files)})


def sealed(report: Mapping[str, Any]) -> bytes:
    """What report.json has of a report."""
    content = _unsealed(report)
    return (json.dumps(content | {SEAL: digest_of_json(content)}, indent=2, allow_nan=False) + "\n").encode()


def _as_written(report: Mapping[str, Any]) -> bool:
    """Whether nobody has changed a report since it was written."""
    return digest_of_json(_unsealed(report)) == report.get(SEAL)


def _unsealed(report: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name != SEAL}


def expect_directory(directory: Path) -> None:
    """Raise `CheckpointError` if `directory` is none."""
    if not os.path.isdir(directory):  # also False for what cannot be a path, such as a name that is too long
        found = "is a file" if os.path.exists(directory) else "does not exist"
        raise CheckpointError(f"{directory} {found}; {ADVICE}")


def expect_result(directory: Path) -> None:
    """Raise `CheckpointError` if `directory` can be no result, as there is no report in it."""
    expect_directory(directory)
    if not os.path.isfile(directory / REPORT):
        raise CheckpointError(f"{directory} has no {REPORT}; {ADVICE}")


def _report(directory: Path) -> dict[str, Any]:
    """The report of a directory, as far as a result can be told by it; empty if there is none."""
    report = object_in(directory / REPORT)
    versions = report.get("versions")
    return report if isinstance(versions, dict) and "llm_snp" in versions else {}


def object_in(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none, as in a pipe or a device, which never end."""
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def manifest(directory: Path, report: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Name -> hash of the files that belong to a result, without its report.

    Names that lead out of the directory are never part of it, whatever a report says, nor are those without a hash:
    what a report only names is nobody's proof that a run wrote it. Of documents whose replacement was interrupted, the
    new ones have the new hash.
    """
    content = _report(directory) if report is None else report
    replaced = {
        name: found for name, found in _hashes(content.get(REPLACING)) if _is_own(directory / name, directory, found)
    }
    return dict(_hashes(content.get(FILES))) | replaced


def _hashes(listed: Any) -> list[tuple[str, str]]:
    return [
        (name, found)
        for name, found in (listed.items() if isinstance(listed, dict) else ())
        if is_inside(name) and isinstance(found, str) and re.fullmatch(HASH, found)
    ]


def is_inside(name: str) -> bool:
    """Whether a name of a report is that of a file below its directory."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def names_in(directory: Path) -> Iterator[str]:
    """The files below a directory, and links, by their name relative to it, in order; not what is ours for a time."""
    for folder, folders, files in os.walk(directory):
        place = Path(folder)
        links = [name for name in folders if (place / name).is_symlink()]
        folders[:] = sorted(name for name in folders if name not in links and place / name != directory / JOURNAL)
        for name in sorted([*files, *links]):
            found = (place / name).relative_to(directory).as_posix()
            if found not in (REPORT, MEMORY, IGNORE):
                yield found


def changed(directory: Path, files: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Of a manifest the names that are missing, and those whose content is not what was written (or are links)."""
    missing, other = [], []
    for name, expected in files.items():
        path = directory / name
        if not path.is_file():
            missing.append(name)
        elif not _is_own(path, directory, expected):
            other.append(name)
    return missing, other


def check_weights(directory: Path, report: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for weights that are none of the result's, and would be read in their place."""
    first, files = directory / "model.safetensors", manifest(directory, report)
    if os.path.lexists(first) and first.name not in files:
        if any(name.endswith(".safetensors") and not os.path.lexists(directory / name) for name in files):
            raise CheckpointError(
                f"{first} is in place of the result's weights, as training leaves it that saves where it began: what "
                f"{REPORT} says is of others; move the model into a directory of its own, without that"
            )
        raise CheckpointError(
            f"{first} is no file of the result, and would be read in place of its weights; move it into a directory of "
            "its own"
        )


def check_as_written(directory: Path, report: Mapping[str, Any]) -> None:
    """The same, and for weights, their index or a config that are not as they were written: reads all of them."""
    check_weights(directory, report)
    files = manifest(directory, report)
    read = {name: found for name, found in files.items() if name.endswith(".safetensors") or name in SETTINGS}
    if wrong := faults(*changed(directory, read)):
        raise CheckpointError(
            f"{directory} is not as it was written: {wrong}; restore that, or prune again (a model that was trained on "
            "belongs into a directory of its own, without report.json)"
        )


def strays(directory: Path) -> list[str]:
    """The files of a result's directory, its report among them, that no run wrote, or that were changed since.

    Not those that were being written when a run was killed, under the name that they have until they are whole.
    """
    report = _report(directory)
    files = manifest(directory, report)
    half = {temporary(PurePosixPath(name)).as_posix() for name in (*files, REPORT, REPORT + MEANWHILE, MEMORY, IGNORE)}
    others = [
        name
        for name in names_in(directory)
        if name not in half and (name not in files or not _is_own(directory / name, directory, files[name]))
    ]
    return others if not report or _as_written(report) else [REPORT, *others]


def _is_own(path: Path, directory: Path, expected: str) -> bool:
    """Whether a file is no link or device, nor in a linked folder, and has the hash that was kept.

    In a snapshot of the Hub's cache files are links to its blobs.
    """
    try:
        itself = path.resolve() == directory.resolve() / path.relative_to(directory)
        if not path.is_file() or not (itself or (in_cache(directory) and within(path, directory))):
            return False
        return digest(path) == expected
    except OSError:
        return False


def strays_of_partial(directory: Path) -> list[str]:
    """The files in the directory of an unfinished run that no run wrote: it has no hashes yet, but a list.

    Shards are known by their names.
    """
    listed = {*object_in(directory / JOURNAL / WRITTEN), REPORT, MEMORY, IGNORE}
    known = listed | {temporary(PurePosixPath(name)).as_posix() for name in listed}
    others = []
    for name in names_in(directory):
        shard = SHARD.fullmatch(whole(PurePosixPath(name)).as_posix())
        if not (name in known or shard) or (directory / name).is_symlink():
            others.append(name)
    return others


def list_in_partial(directory: Path, names: Iterable[str]) -> None:
    """Note the names of files that a run is about to write, for whoever clears up after it."""
    if (directory / JOURNAL).is_dir():
        path = directory / JOURNAL / WRITTEN
        write_json(path, object_in(path) | dict.fromkeys(names))


def empty_partial(directory: Path) -> None:
    """Remove what an unfinished run wrote beside its journal, and folders that are empty then."""
    kept = set(strays_of_partial(directory))
    for name in [*names_in(directory), REPORT, MEMORY, IGNORE]:
        if name not in kept:
            (directory / name).unlink(missing_ok=True)
    for folder, _, _ in os.walk(directory, topdown=False):
        if Path(folder) not in (directory, directory / JOURNAL):
            with suppress(OSError):
                os.rmdir(folder)


def remove_own(directory: Path) -> None:
    """Remove what runs of llm_snp wrote, and with it the directory, unless there is something else in it."""
    if is_result(directory):
        kept = set(strays(directory))
        # The report last: by it the rest is known, should this be killed.
        for name in [*names_in(directory), MEMORY, IGNORE, REPORT]:
            if name not in kept:
                with suppress(OSError):
                    (directory / name).unlink()
    for folder, _, _ in os.walk(directory, topdown=False):
        with suppress(OSError):
            os.rmdir(folder)  # those that are empty


def some(names: Sequence[str]) -> str:
    """A few names on one line, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return one_line(", ".join(names[:LISTED])) + more


def faults(missing: Sequence[str], other: Sequence[str]) -> str:
    """What `changed` has found, for an error; empty if that is nothing."""
    return ", ".join(f"{some(names)} {what}" for names, what in ((missing, "missing"), (other, "changed")) if names)
