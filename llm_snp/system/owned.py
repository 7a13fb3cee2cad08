"""Whether a directory is that of an unfinished run of this user, and what beside it is that run's: by what it noted."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from .files import temporary
from .manifest import JOURNAL

LOCK = "lock"
OWNER = "owner"
REPLACES = "replaces"  # the inode of the earlier result that is put aside for a moment


def is_ours(partial: Path) -> bool:
    """Whether a run of this user has made it: it says so, or was killed before it had done so and has nothing in it."""
    if has_owner(partial):
        return True
    journal = partial / JOURNAL
    if _linked(partial) or not partial.is_dir() or not _by_this_user(partial):
        return False
    found = [*partial.iterdir(), *(journal.iterdir() if journal.is_dir() else ())]
    return all(path in (journal, journal / LOCK, temporary(journal / OWNER)) for path in found)


def has_owner(directory: Path) -> bool:
    """Whether its journal says whose it is, is no link to something else, and of no other user of the machine."""
    return not _linked(directory) and (directory / JOURNAL / OWNER).is_file() and _by_this_user(directory)


def _by_this_user(directory: Path) -> bool:
    """Whether directory, journal and its files are what this user makes: what is in another's he can change.

    Some file systems have one owner for all files, so what counts is whose a new file is.
    """
    journal = directory / JOURNAL
    owners = {path.lstat().st_uid for path in (directory, journal, *journal.rglob("*")) if os.path.lexists(path)}
    return owners == {os.geteuid()} or owners == {_new_file_of(directory.parent)}


def _new_file_of(directory: Path) -> int | None:
    """The user whose a file is that is made there, if one can be made."""
    with suppress(OSError), TemporaryFile(dir=directory) as file:
        return os.fstat(file.fileno()).st_uid
    return None


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
