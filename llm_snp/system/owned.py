"""Whether a directory is that of an unfinished run, and what beside it is that run's: by what it noted there."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from .manifest import JOURNAL

LOCK = "lock"
OWNER = "owner"
REPLACES = "replaces"  # the inode of the earlier result that is put aside for a moment


def is_ours(partial: Path) -> bool:
    """Whether a run has made it: it says whose it is, or was killed before it had done so and has nothing in it."""
    if has_owner(partial):
        return True
    journal = partial / JOURNAL
    if _linked(partial) or not partial.is_dir():
        return False
    found = [*partial.iterdir(), *(journal.iterdir() if journal.is_dir() else ())]
    return all(path in (journal, journal / LOCK) for path in found)


def has_owner(directory: Path) -> bool:
    """Whether its journal says whose it is, and is no link to something else."""
    return not _linked(directory) and (directory / JOURNAL / OWNER).is_file()


def _linked(directory: Path) -> bool:
    """Whether it, or something in its journal, is a link: all of that is written to, or removed.

    The lock, which is opened as it is, may have no other name either: an archive can make it that of another file.
    """
    journal = directory / JOURNAL
    if any(path.is_symlink() for path in (directory, journal, *journal.rglob("*"))):
        return True
    with suppress(OSError):
        return (journal / LOCK).stat().st_nlink > 1
    return False


def was_put_aside(journal: Path, aside: Path) -> bool:
    """Whether a run that was killed within `finish` has put an earlier result there; a person may have put another."""
    with suppress(OSError):
        return (journal / REPLACES).read_text(encoding="utf-8") == str(aside.lstat().st_ino)
    return False
