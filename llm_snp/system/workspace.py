"""Where a result grows: `<output>.partial`, locked while a run writes to it, kept for --resume when one is interrupted.

At the end the directory gets its name, so that a result is complete or not there at all.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from ..errors import CheckpointError, OutputError, ResumeError
from .files import disk, write_text
from .manifest import JOURNAL, empty_partial, is_result, remove_own
from .output import aside_of, check_aside, check_harmless, check_output, check_partial, in_the_way, partial_of
from .owned import LOCK, OWNER, REPLACES, has_owner, is_ours, was_put_aside

T = TypeVar("T")
BLOCKS = "block-*.json"
STATES = "state-*.json"  # of a training
# Records that cost nothing: what a later run is compared with (`Journal.expect`).
COMPARED = frozenset(("settings", "model", "models", "calibration", "text"))


def _records(journal: Path) -> set[str]:
    """Of what a run has finished or measured, by name."""
    return {path.stem for path in journal.glob("*.json")} - COMPARED


def finished_result(output: Path, resume: bool, overwrite: bool, compare: Callable[[], T]) -> T | None:
    """What `compare` finds of the result at `output` that is to be gone on with; None if there is none.

    compare: raises `ResumeError` or `CheckpointError` for a result that is none of this command's. With `overwrite`
    such a one is to be replaced, and so is any where an unfinished run is kept: that is what is gone on with then.
    """
    untidy = (output / JOURNAL).exists()  # its run was killed before it had tidied up
    tidy(output)
    if not resume or not is_result(output):
        return None
    if not overwrite:
        return compare()
    if untidy or not _records(partial_of(output) / JOURNAL):
        with suppress(ResumeError, CheckpointError):
            return compare()
    return None


class Workspace:
    """The partial directory of `output`, held by this run until `finish`, `discard` or `keep`.

    inputs: what the run reads, see `check_harmless`; resume: go on with what an interrupted run left; without it,
    and without `overwrite`, what such a run has finished or measured is refused, and with that not thrown away before
    `begin`; like: what a new output is no more open than. Raises `OutputError`, also if another run holds the
    directory.
    """

    def __init__(
        self,
        output: Path,
        overwrite: bool,
        resume: bool,
        inputs: Mapping[Path, bool] | None = None,
        like: Path | None = None,
    ):
        # A symbolic link stays one: what it points to is replaced.
        self.output = output.resolve()
        self.directory = partial_of(self.output)
        self.journal = self.directory / JOURNAL
        self.resumed = False  # whether there is something of an interrupted run to go on with
        self.finished = False  # whether the result has its name
        self.earlier = False  # whether there is something that --overwrite throws away, until `begin`
        self._overwrite = overwrite
        check_output(output, overwrite)
        check_partial(output)
        check_harmless(output, inputs or {})
        missing = (self.directory, *self.directory.parents)
        self._made = [path for path in missing if not path.exists()]
        self._lock = FileLock(self.journal / LOCK, blocking=False)
        with disk(self.directory):
            try:
                self.journal.mkdir(parents=True, exist_ok=True)
                self._acquire()
                self._take_over(resume)
                self._try_to_replace()
                self._share_as_before(like)
            except BaseException:
                # What was there before stays.
                if self.directory in self._made:
                    self.discard()
                else:
                    self.keep()
                raise

    def _acquire(self) -> None:
        try:
            with suppress(NotImplementedError):  # where the disk knows no locks, there is none
                self._lock.acquire()
        except Timeout as error:
            self._made = []  # the other run was quicker to make them
            raise OutputError(
                f"another run{_owner(self.journal)} is writing to {self.directory}; wait for it, or give another "
                "--output"
            ) from error

    def _take_over(self, resume: bool) -> None:
        """What an interrupted run left: go on with it, refuse to throw it away, or throw it away."""
        if not is_ours(self.directory):  # it has come there since it was looked for
            raise in_the_way(self.directory)
        if not self.output.exists() and was_put_aside(self.journal, aside_of(self.output)):
            # That run was killed while the result was about to take the place of an earlier one.
            self._put_back()
            check_output(self.output, self._overwrite)
        blocks, states = self.finished_blocks, len(list(self.journal.glob(STATES)))
        records = _records(self.journal)
        if records and not (resume or self._overwrite):
            what = f"{blocks} finished blocks" if blocks else "the state" if states else "what was measured"
            raise OutputError(
                f"{self.directory} holds {what} of an interrupted run; add --resume to go on with it, if it is "
                "yours, or --overwrite to start anew"
            )
        self.resumed = resume and any(self.journal.glob("*.json"))
        write_text(self.journal / OWNER, f"process {os.getpid()} on {socket.gethostname()}")
        self.earlier = bool(records) and not resume
        if not (resume or self.earlier):
            self._empty()

    def _try_to_replace(self) -> None:
        """Do at the start what `finish` does at the end, and undo it: whether that can be done shows nowhere else.

        What an image of a container brought cannot be renamed in it, nor what is somebody else's in `/tmp`.
        """
        if not self.output.exists():
            return
        try:
            try:
                self._put_aside()
            finally:
                self._put_back()
                (self.journal / REPLACES).unlink(missing_ok=True)
        except OSError as error:
            # An overlay file system does not rename what lies below; an empty directory can be made anew there.
            if error.errno == errno.EXDEV and not any(self.output.iterdir()):
                mode = stat.S_IMODE(self.output.stat().st_mode)
                self.output.rmdir()
                self.output.mkdir()
                self.output.chmod(mode)
                return
            raise OutputError(
                f"--output {self.output} is there and cannot be replaced ({error.strerror}); remove it, or give "
                "another directory"
            ) from error

    def _share_as_before(self, like: Path | None) -> None:
        """Let those read and write who can in what is replaced: a person may have made that for himself alone.

        A new output is not open to more than `like` is, which may be a stranger's, and not to more than usual.
        """
        there = self.output.exists()
        other = self.output if there else like
        if other is None:
            return
        found = other.stat()
        most = 0o7777 if there else stat.S_IMODE(self.directory.stat().st_mode)
        with suppress(OSError):  # of a group that one is not in
            os.chown(self.directory, -1, found.st_gid)
        with suppress(OSError):  # not every file system has modes
            self.directory.chmod(stat.S_IMODE(found.st_mode) & most | stat.S_IRWXU)

    def _put_aside(self) -> None:
        """The earlier result, noted so that a run that is killed here is told from a person who has made the other."""
        write_text(self.journal / REPLACES, str(self.output.stat().st_ino))
        os.rename(self.output, aside_of(self.output))

    def _put_back(self) -> None:
        """Undo that, if it was done and nothing has taken the place."""
        if aside_of(self.output).exists() and not self.output.exists():
            os.rename(aside_of(self.output), self.output)

    def begin(self) -> None:
        """Throw away what --overwrite was meant for: all that this run could be refused for is known."""
        if self.earlier:
            with disk(self.directory):
                self._empty()
            self.earlier = False

    @property
    def finished_blocks(self) -> int:
        """How many blocks this run, or the one that was interrupted, has finished."""
        return len(list(self.journal.glob(BLOCKS)))

    @property
    def written_bytes(self) -> int:
        """What the files take that are there already."""
        return sum(path.stat().st_size for path in self.directory.rglob("*") if path.is_file())

    def _empty(self) -> None:
        empty_partial(self.directory)
        for path in self.journal.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in (LOCK, OWNER):
                path.unlink()

    def finish(self) -> None:
        """Give the directory its name, in place of an earlier result."""
        check_output(self.output, self._overwrite)  # another run may have been quicker
        check_aside(aside_of(self.output))
        with disk(self.output):
            try:
                if self.output.exists():
                    self._put_aside()
                os.rename(self.directory, self.output)
            except BaseException:
                self._put_back()
                raise
        self.finished = True
        tidy(self.output)
        self._lock.release()

    @property
    def left(self) -> Path | None:
        """Where files are that were put into an earlier result while this run replaced it."""
        aside = aside_of(self.output)
        return aside if aside.exists() else None

    def keep(self) -> None:
        """Leave what is finished for a later run."""
        self._lock.release()

    def discard(self) -> None:
        """Remove everything that was written, and the directories made for it, unless there is something else in it."""
        with suppress(OSError):
            empty_partial(self.directory)
        _remove(self.journal)
        self._lock.release()
        for directory in (self.directory, *self._made[1:]):
            with suppress(OSError):
                directory.rmdir()


def tidy(output: Path) -> None:
    """Remove what is no part of a result, and the earlier one: after `finish`, or after a run that was killed within.

    What someone else has put into the earlier one stays, under the name that it has by then.
    """
    output = output.resolve()
    journal = output / JOURNAL
    if not is_result(output):
        return
    if not has_owner(output):  # a stranger's folder, or a person's, may have that name
        with suppress(OSError):
            journal.rmdir()  # an empty one may be ours, of a run that was killed before this
        return
    if was_put_aside(journal, aside_of(output)):
        remove_own(aside_of(output))
    _remove(journal)


def _remove(journal: Path) -> None:
    """Remove a journal, last what says whose the rest is: what a run that is killed here leaves is a later run's."""
    with suppress(OSError):
        for path in journal.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != OWNER:
                path.unlink(missing_ok=True)
        (journal / OWNER).unlink(missing_ok=True)
        journal.rmdir()


def known(workspace: Workspace | None) -> Workspace:
    """The workspace, where there is one: on the main process."""
    assert workspace is not None
    return workspace


def _owner(journal: Path) -> str:
    try:
        return f" ({(journal / OWNER).read_text(encoding='utf-8')})"
    except OSError:
        return ""
