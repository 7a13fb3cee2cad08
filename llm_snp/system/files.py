"""Files that are there whole or not at all, and what a disk can do wrong as one kind of error."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeVar

import xxhash
from safetensors import SafetensorError

from ..errors import DiskFullError, OutputError
from .progress import say

if TYPE_CHECKING:  # what needs no tensors needs no torch
    from torch import Tensor

CHUNK = 1 << 24
UNFINISHED = ".llm_snp"  # at the end of names that are ours alone, so that no file of anybody else has one
LONGEST_NAME = 255  # bytes, of all file systems in use
MEANWHILE = ".meanwhile"  # after the name of a file, while what it has for a time is written aside
AnyPath = TypeVar("AnyPath", bound=PurePath)


def write_text(path: Path, content: str) -> None:
    """Write a text file: temporary name, fsync, rename."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_bytes(path: Path, content: bytes, replace: bool = True) -> None:
    """Write a file: temporary name, fsync, rename. Without `replace`, one that is there is an `OutputError`."""
    with disk(path), _temporary(path) as aside:
        _write_new(aside, content)
        (_settle if replace else _settle_new)(aside, path)


def write_together(directory: Path, files: Mapping[str, bytes], meanwhile: Mapping[str, bytes] | None = None) -> None:
    """Write files by their name relative to `directory`, folders and all: all of them, or after an error none.

    Each is written aside first; then they take their names, in the order given. meanwhile: what the files of these
    names have until then. Raises `OutputError` for a folder that is a link (`inside`).
    """
    with disk(directory), ExitStack() as stack:
        ready = []
        for suffix, contents in ((MEANWHILE, meanwhile or {}), ("", files)):
            for name, content in contents.items():
                path = inside(directory, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                aside = stack.enter_context(_temporary(path.with_name(path.name + suffix)))
                _write_new(aside, content)
                _durable(aside)
                ready.append((aside, path))
        for _, path in ready:
            if path.is_dir():  # which `replace` would find out after others have their names
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        for aside, path in ready:
            _settle(aside, path)


def inside(directory: Path, name: str) -> Path:
    """The path of a file in `directory`. Raises `OutputError` if a folder on the way there is a link.

    A directory that a stranger has packed may have one that leads to files of whoever opens it.
    """
    path = directory / name
    for parent in path.relative_to(directory).parents:
        if (directory / parent).is_symlink() and parent.parts:
            raise OutputError(
                f"{directory / parent} is a link to another place, where nothing may be written; put a folder there"
            )
    return path


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file: temporary name, fsync, rename."""
    from safetensors.torch import save_file

    with disk(path), _temporary(path) as aside:
        mode = aside.stat().st_mode & 0o777
        save_file(_unshared(tensors), aside, metadata={"format": "pt"})
        # safetensors makes files that only their owner can read; this is what the umask asks for
        with suppress(OSError):  # not every file system has modes
            aside.chmod(mode)
        _settle(aside, path)


def size(count: float) -> str:
    """Bytes as a person reads them: `2.61 GB`, `3.1 MB`, `12 kB`, `7 bytes`."""
    for scale, style, unit in ((1e9, ".2f", "GB"), (1e6, ".1f", "MB"), (1e3, ".0f", "kB")):
        if count >= scale:
            return f"{count / scale:{style}} {unit}"
    return f"{count:.0f} bytes"


def digest(*paths: Path) -> str:
    """One hash over the contents of files, for telling whether they changed (not for security)."""
    found = xxhash.xxh3_128()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                found.update(chunk)
    return found.hexdigest()


def digest_of_bytes(content: bytes) -> str:
    """The same for what a file has, or is to have."""
    return xxhash.xxh3_128_hexdigest(content)


def digest_of_json(content: Any) -> str:
    """The same for what is written as JSON: equal for what was written and what is read back."""
    return digest_of_bytes(json.dumps(content).encode())


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turn what a disk can do wrong into `OutputError`, a full one into `DiskFullError`."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        number = getattr(error, "errno", None)
        # safetensors writes by itself and reports the system's error as text
        found = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
        if found:
            number = int(found[1])
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"{path} cannot be written: the disk is full; free some space or give another directory"
            ) from error
        reason = os.strerror(number) if number else str(error)
        raise OutputError(f"{path} cannot be written: {reason}; give another directory") from error


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory for the moment, where the system has temporary files. Raises `OutputError` if there can be none."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="llm_snp-", ignore_cleanup_errors=True)
    except OSError as error:
        raise OutputError(
            f"no temporary file can be made ({error.strerror}: {error.filename or tempfile.tempdir}); free some space "
            "there, or set TMPDIR to a directory that can be written to"
        ) from error
    with folder as name:
        yield Path(name)


@contextmanager
def written_aside(path: Path, replace: Callable[[], bool]) -> Iterator[Path]:
    """For what somebody else writes: the name to write under. At the end it becomes `path`, after an error it goes.

    replace: asked then, whether what may be there by that name goes; if not, and something has come since, that is an
    `OutputError`.
    """
    with disk(path), _temporary(path) as aside:
        yield aside
        if replace():
            _settle(aside, path)
        else:
            _settle_new(aside, path)


def temporary(path: AnyPath) -> AnyPath:
    """The name that a file has until it is whole; one that nobody else gives: what has it is removed.

    Of a name that is too long with more around it, a hash: what a licence or a template is called, a stranger chose.
    """
    name = f".{path.name}{UNFINISHED}"
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = f".{digest_of_bytes(os.fsencode(path.name))}{UNFINISHED}"
    return path.with_name(name)


def whole(path: AnyPath) -> AnyPath:
    """The name that a file will have; of any other file its own."""
    name = path.name.removeprefix(".").removesuffix(UNFINISHED)
    return path.with_name(name) if name and path == temporary(path.with_name(name)) else path


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """An empty file to write to first. After an error it goes: half a shard takes the room of what comes next.

    What a killed run has left under that name goes, too, and a link, which would be written through. Raises
    `OutputError` while another process writes to it.
    """
    aside = temporary(path)
    held = _claimed(aside, path)
    try:
        yield aside
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    finally:
        os.close(held)


def _claimed(aside: Path, path: Path) -> int:
    """A new file that this process has locked, as its descriptor: that also a killed process lets go."""
    while True:
        try:
            held = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            _remove_left(aside, path)
            continue
        # Between the two another process may have taken it for one that a killed run has left.
        with suppress(FileNotFoundError):
            if _lock(held) and os.path.samestat(os.fstat(held), os.lstat(aside)):
                return held
        os.close(held)


def _remove_left(aside: Path, path: Path) -> None:
    """Remove what has the name of an unfinished file, unless that is being written."""
    try:
        found = os.open(aside, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # a link, a folder, what may not be read, or gone by now
        aside.unlink(missing_ok=True)
        return
    try:
        if not _lock(found):
            raise OutputError(f"{path} is being written by another process; wait for it, or give another name")
        aside.unlink(missing_ok=True)
    finally:
        os.close(found)


def _lock(file: int) -> bool:
    """Whether this process has an open file for itself; where the disk knows no locks, it says so."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Wait until no other process is in here with this directory; where the disk knows no locks, nobody waits."""
    with disk(directory):
        found = os.open(directory, os.O_RDONLY)
    try:
        if not _lock(found):
            say(f"waiting: another process is writing the documents of {directory}")
            with suppress(OSError):
                fcntl.flock(found, fcntl.LOCK_EX)
        yield
    finally:
        os.close(found)


def _write_new(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)


def _settle_new(temporary: Path, final: Path) -> None:
    """The same where nothing may have that name yet. Raises `OutputError` if something does."""
    _durable(temporary)
    try:
        os.link(temporary, final)
        temporary.unlink()
    except OSError as error:
        if os.path.lexists(final):
            raise OutputError(f"{final} has come there since this run began, and stays; give another name") from error
        os.replace(temporary, final)  # a disk without hard links


def _settle(temporary: Path, final: Path) -> None:
    """Make a written file durable, then visible under its name, to those who could see what had it."""
    _durable(temporary)
    if final.is_file() and not final.is_symlink():
        with suppress(OSError):  # not every file system has modes
            shutil.copymode(final, temporary)
    os.replace(temporary, final)


def _durable(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name, each contiguous and with memory of its own, as safetensors wants them."""
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        own[name] = tensor
    return own
