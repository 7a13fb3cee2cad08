"""What may become an output: told before anything is done, and again before a result gets its name.

A directory `<output>.partial` is where a result grows, `<output>.replaced` where an earlier one is meanwhile.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from ..errors import OutputError
from .files import disk, size
from .manifest import JOURNAL, REPORT, has_report, is_result, some, strays, strays_of_partial
from .owned import is_ours, was_put_aside
from .private import lies_in_cache


def check_output(output: Path, overwrite: bool) -> None:
    """Raise `OutputError` unless `output` can become a result: absent, empty, or an earlier one with `overwrite`."""
    with disk(output):
        resolved = output.resolve()
        if os.path.ismount(resolved):
            raise OutputError(f"--output {output} is a mount point, which cannot be replaced; give a directory in it")
        check_outside_cache(output, "--output")
        partial = partial_of(resolved)
        if os.path.lexists(partial) and not is_ours(partial):
            raise in_the_way(partial)
        parent = next(path for path in resolved.parents if path.exists())
        if not parent.is_dir():
            raise OutputError(f"--output {output} cannot be made: {parent} is a file; give another directory")
        if not os.access(parent, os.W_OK):
            raise OutputError(f"--output {output} cannot be made: {parent} is not writable; give another directory")
        if resolved.exists() and not resolved.is_dir():
            raise OutputError(f"--output {output} is a file; give a directory")
        if resolved.exists() and any(resolved.iterdir()):
            if not is_result(resolved):
                found = f"its {REPORT} is damaged" if has_report(resolved) else "no result of llm_snp"
                raise OutputError(f"--output {output} is not empty and {found}; give another directory")
            if not overwrite:
                raise OutputError(f"--output {output} holds an earlier result; give another directory, or --overwrite")
        # A run that was killed within `finish` leaves one, which the next run puts back or removes.
        aside = aside_of(resolved)
        if not was_put_aside((resolved if resolved.exists() else partial) / JOURNAL, aside):
            check_aside(aside)


def check_outside_cache(path: Path, flag: str) -> None:
    """Raise `OutputError` for what would be written among the snapshots in the Hub's cache."""
    if lies_in_cache(path):
        raise OutputError(
            f"{flag} {path} lies in the cache of the Hub, whose tools remove it when they clean up; give a place "
            "elsewhere"
        )


def check_partial(output: Path) -> None:
    """Raise `OutputError` if the directory of an unfinished run, which is emptied or renamed, has more than that."""
    resolved = output.resolve()
    partial = partial_of(resolved)
    if partial.is_dir() and (others := strays_of_partial(partial)):
        raise OutputError(
            f"{partial}, where an unfinished run is kept, has files that no run of llm_snp wrote ({some(others)}); "
            "move them, or give another --output"
        )


def check_aside(aside: Path) -> None:
    if os.path.lexists(aside):
        raise OutputError(f"{aside} is in the way; it may be a still earlier result: move or remove it")


def check_harmless(output: Path, inputs: Mapping[Path, bool]) -> None:
    """Raise `OutputError` if writing to `output` would touch an input, or remove what no run of llm_snp wrote.

    inputs: files and directories, and whether the output may not lie inside that directory either.
    To be called before the work, after `check_output`; hashes what an earlier result consists of.
    """
    with disk(output):
        resolved = output.resolve()
        if _runs_in(resolved):
            raise OutputError(
                f"--output {output} is or holds the directory that this runs in, which a result would take the place "
                "of; start elsewhere, or give another directory"
            )
        places = (resolved, partial_of(resolved), aside_of(resolved))
        for path, closed in inputs.items():
            real = path.resolve()
            # A file may lie elsewhere than the directory that has its name.
            members = [member.resolve() for member in real.iterdir()] if real.is_dir() else []
            if any(one.is_relative_to(place) for one in (real, *members) for place in places):
                raise OutputError(
                    f"--output {output} is or holds {path}, which the run reads, or its model was made of; give "
                    "another directory, or move that"
                )
            if closed and real.is_dir() and resolved.is_relative_to(real):
                raise OutputError(f"--output {output} lies inside {path}, which the run reads; give another directory")
        earlier = [resolved, *(path for path in resolved.rglob("*") if path.is_dir())] if resolved.is_dir() else []
        if closed_to_us := [path for path in earlier if not os.access(path, os.W_OK)]:
            raise OutputError(
                f"--output {output} cannot be replaced: {closed_to_us[0]} is not writable; give another directory"
            )
        if others := strays(resolved) if resolved.is_dir() else []:
            raise OutputError(
                f"--output {output} has files that no run of llm_snp wrote, or that were changed since "
                f"({some(others)}), and --overwrite would remove them; move them, or give another directory"
            )


def _runs_in(directory: Path) -> bool:
    """Whether the working directory is a directory or lies in it."""
    try:
        return directory.exists() and Path.cwd().is_relative_to(directory)
    except FileNotFoundError:  # it is gone
        return False


def check_space(directory: Path, needed: int, what: str = "the result needs", flag: str = "--output") -> None:
    """Raise `OutputError` if the disk that will hold `directory` has less than `needed` bytes free.

    what: needs them; flag: the option that names the directory.
    """
    existing = _existing(directory)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"{what} up to {size(needed)}, but the disk of {existing} has {size(free)} free; give {flag} on another "
            "disk"
        )


def same_disk(one: Path, other: Path) -> bool:
    """Whether both lie, or will lie, on the same."""
    return _existing(one).stat().st_dev == _existing(other).stat().st_dev


def _existing(directory: Path) -> Path:
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    return existing


def partial_of(output: Path) -> Path:
    """Where a result grows."""
    return output.with_name(output.name + ".partial")


def aside_of(output: Path) -> Path:
    """Where an earlier result is while the new one gets its name."""
    return output.with_name(output.name + ".replaced")


def in_the_way(partial: Path) -> OutputError:
    return OutputError(f"{partial} is in the way and no unfinished run of yours; remove it, or give another --output")
