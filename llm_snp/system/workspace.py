"""Where a result grows: `<output>.partial`, locked while a run writes to it, kept for --resume when one is interrupted.

At the end the directory gets its name, so that a result is complete or not there at all.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import OutputError
from .files import disk, size, write_text
from .manifest import JOURNAL, REPORT, empty_partial, has_report, is_result, remove_own, some, strays, strays_of_partial
from .owned import LOCK, OWNER, REPLACES, has_owner, is_ours, was_put_aside

PARTIAL = ".partial"
BLOCKS = "block-*.json"
STATES = "state-*.json"  # of a training
# Records that cost nothing: what a later run is compared with (`Journal.expect`).
COMPARED = frozenset(("settings", "model", "models", "calibration", "text"))


class Workspace:
    """The partial directory of `output`, held by this run until `finish`, `discard` or `keep`.

    inputs: what the run reads, see `check_harmless`; resume: go on with what an interrupted run left; without it,
    and without `overwrite`, what such a run has finished or measured is not thrown away but refused. Raises
    `OutputError`, also if another run holds the directory.
    """

    def __init__(self, output: Path, overwrite: bool, resume: bool, inputs: Mapping[Path, bool] | None = None):
        # A symbolic link stays one: what it points to is replaced.
        self.output = output.resolve()
        self.directory = self.output.with_name(self.output.name + PARTIAL)
        self.journal = self.directory / JOURNAL
        self.resumed = False  # whether there is something of an interrupted run to go on with
        self.finished = False  # whether the result has its name
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
            except BaseException:
                # What was there before stays.
                if self.directory in self._made:
                    self.discard()
                else:
                    self.keep()
                raise

    def _acquire(self) -> None:
        try:
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
            raise _in_the_way(self.directory)
        if not self.output.exists() and was_put_aside(self.journal, _aside(self.output)):
            # That run was killed while the result was about to take the place of an earlier one.
            self._put_back()
            check_output(self.output, self._overwrite)
        blocks, states = self.finished_blocks, len(list(self.journal.glob(STATES)))
        records = {path.stem for path in self.journal.glob("*.json")} - COMPARED
        if records and not (resume or self._overwrite):
            what = f"{blocks} finished blocks" if blocks else "the state" if states else "what was measured"
            raise OutputError(
                f"{self.directory} holds {what} of an interrupted run; add --resume to go on with it, if it is "
                "yours, or --overwrite to start anew"
            )
        self.resumed = resume and any(self.journal.glob("*.json"))
        write_text(self.journal / OWNER, f"process {os.getpid()} on {socket.gethostname()}")
        if not resume:
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

    def _put_aside(self) -> None:
        """The earlier result, noted so that a run that is killed here is told from a person who has made the other."""
        write_text(self.journal / REPLACES, str(self.output.stat().st_ino))
        os.rename(self.output, _aside(self.output))

    def _put_back(self) -> None:
        """Undo that, if it was done and nothing has taken the place."""
        if _aside(self.output).exists() and not self.output.exists():
            os.rename(_aside(self.output), self.output)

    @property
    def finished_blocks(self) -> int:
        """How many blocks this run, or the one that was interrupted, has finished."""
        return len(list(self.journal.glob(BLOCKS)))

    @property
    def written_bytes(self) -> int:
        """What the weights take that are there already."""
        return sum(path.stat().st_size for path in self.directory.glob("*.safetensors"))

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
        _check_aside(_aside(self.output))
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
        aside = _aside(self.output)
        return aside if aside.exists() else None

    def keep(self) -> None:
        """Leave what is finished for a later run."""
        self._lock.release()

    def discard(self) -> None:
        """Remove everything that was written, and the directories made for it, unless there is something else in it."""
        with suppress(OSError):
            empty_partial(self.directory)
        shutil.rmtree(self.journal, ignore_errors=True)
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
    if not (is_result(output) and has_owner(output)):  # a stranger's folder, or a person's, may have that name
        return
    if was_put_aside(journal, _aside(output)):
        remove_own(_aside(output))
    with suppress(OSError):
        for path in journal.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != OWNER:
                path.unlink(missing_ok=True)
        (journal / OWNER).unlink(missing_ok=True)  # the last: it says whose the rest is
        journal.rmdir()


def check_output(output: Path, overwrite: bool) -> None:
    """Raise `OutputError` unless `output` can become a result: absent, empty, or an earlier one with `overwrite`."""
    with disk(output):
        resolved = output.resolve()
        if os.path.ismount(resolved):
            raise OutputError(f"--output {output} is a mount point, which cannot be replaced; give a directory in it")
        partial = resolved.with_name(resolved.name + PARTIAL)
        if os.path.lexists(partial) and not is_ours(partial):
            raise _in_the_way(partial)
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
        aside = _aside(resolved)
        if not was_put_aside((resolved if resolved.exists() else partial) / JOURNAL, aside):
            _check_aside(aside)


def check_partial(output: Path) -> None:
    """Raise `OutputError` if the directory of an unfinished run, which is emptied or renamed, has more than that."""
    resolved = output.resolve()
    partial = resolved.with_name(resolved.name + PARTIAL)
    if partial.is_dir() and (others := strays_of_partial(partial)):
        raise OutputError(
            f"{partial}, where an unfinished run is kept, has files that no run of llm_snp wrote ({some(others)}); "
            "move them, or give another --output"
        )


def _check_aside(aside: Path) -> None:
    if os.path.lexists(aside):
        raise OutputError(f"{aside} is in the way; it may be a still earlier result: move or remove it")


def check_harmless(output: Path, inputs: Mapping[Path, bool]) -> None:
    """Raise `OutputError` if writing to `output` would touch an input, or remove what no run of llm_snp wrote.

    inputs: files and directories, and whether the output may not lie inside that directory either.
    To be called before the work, after `check_output`; hashes what an earlier result consists of.
    """
    with disk(output):
        resolved = output.resolve()
        places = (resolved, resolved.with_name(resolved.name + PARTIAL), _aside(resolved))
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
        if others := strays(resolved) if resolved.is_dir() else []:
            raise OutputError(
                f"--output {output} has files that no run of llm_snp wrote, or that were changed since "
                f"({some(others)}), and --overwrite would remove them; move them, or give another directory"
            )


def known(workspace: Workspace | None) -> Workspace:
    """The workspace, where there is one: on the main process."""
    assert workspace is not None
    return workspace


def check_space(directory: Path, needed: int) -> None:
    """Raise `OutputError` if the disk that will hold `directory` has less than `needed` bytes free."""
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"the result needs up to {size(needed)}, but the disk of {existing} has {size(free)} free; give --output "
            "on another disk"
        )


def _aside(output: Path) -> Path:
    """Where an earlier result is while the new one gets its name."""
    return output.with_name(output.name + ".replaced")


def _in_the_way(partial: Path) -> OutputError:
    return OutputError(f"{partial} is in the way and no unfinished run of yours; remove it, or give another --output")


def _owner(journal: Path) -> str:
    try:
        return f" ({(journal / OWNER).read_text(encoding='utf-8')})"
    except OSError:
        return ""
