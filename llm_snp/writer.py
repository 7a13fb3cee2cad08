"""The result directory, complete or not there at all.

Everything is written to `<output>.partial` first, each file whole (temporary name, fsync, rename), one shard per
block, the index last; then the directory gets its name. A failed run leaves nothing behind.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .errors import OutputError

REPORT = "report.json"
PARTIAL = ".partial"
MARK = ".llm_snp"  # marks a partial directory as one that may be removed
# Of the dense model these go along unchanged; weights, config and card are written anew.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


class Writer:
    """Writes a checkpoint of `shards` shards into a partial directory; `finish` gives it its name.

    Raises `OutputError` if `output` holds something that is not an earlier result, or the disk is full.
    """

    def __init__(self, output: Path, shards: int, overwrite: bool):
        # A symbolic link stays one: what it points to is replaced.
        self.output = output.resolve()
        self.partial = self.output.with_name(self.output.name + PARTIAL)
        self._shards = shards
        self._map: dict[str, str] = {}
        self._bytes = 0
        self._parameters = 0
        check_output(output, overwrite)
        with _disk(self.partial):
            if self.partial.exists():  # an earlier run was killed
                shutil.rmtree(self.partial)
            self._made = [parent for parent in (self.partial, *self.partial.parents) if not parent.exists()]
            self.partial.mkdir(parents=True)
            (self.partial / MARK).touch()

    def shard(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write shard `number` (from 0) with tensors named as in the model."""
        name = f"model-{number + 1:05d}-of-{self._shards:05d}.safetensors"
        with _disk(self.partial):
            temporary = self.partial / f".{name}"
            save_file(_unshared(tensors), temporary, metadata={"format": "pt"})
            # safetensors makes files that only their owner can read; this is what the umask asks for.
            temporary.chmod(self.partial.stat().st_mode & 0o666)
            _settle(temporary, self.partial / name)
        self._map |= dict.fromkeys(tensors, name)
        self._bytes += sum(t.numel() * t.element_size() for t in tensors.values())
        self._parameters += sum(t.numel() for t in tensors.values())

    def text(self, name: str, content: str) -> None:
        with _disk(self.partial):
            temporary = self.partial / f".{name}"
            temporary.write_text(content, encoding="utf-8")
            _settle(temporary, self.partial / name)

    def json(self, name: str, content: Any) -> None:
        self.text(name, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def copy(self, source: Path, names: tuple[str, ...] | None = None) -> None:
        """Copy a file, or of a directory those of `names` that it has."""
        files = [source] if names is None else [source / name for name in names if (source / name).is_file()]
        with _disk(self.partial):
            for file in files:
                shutil.copyfile(file, self.partial / file.name)

    def index(self) -> None:
        """The index, after all shards: a directory without it does not load."""
        metadata = {"total_size": self._bytes, "total_parameters": self._parameters}
        self.json(SAFE_WEIGHTS_INDEX_NAME, {"metadata": metadata, "weight_map": dict(sorted(self._map.items()))})

    @property
    def weight_bytes(self) -> int:
        return self._bytes

    def finish(self) -> None:
        """Give the directory its name, in place of an earlier result."""
        old = _aside(self.output)
        with _disk(self.output):
            (self.partial / MARK).unlink()
            replaces = self.output.exists()
            if replaces:
                os.rename(self.output, old)
            try:
                os.rename(self.partial, self.output)
            except BaseException:
                if replaces:
                    os.rename(old, self.output)
                raise
        shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Remove everything that was written, and the directories made for it."""
        shutil.rmtree(self.partial, ignore_errors=True)
        for directory in self._made[1:]:
            with suppress(OSError):
                directory.rmdir()


def check_output(output: Path, overwrite: bool) -> None:
    """Raise `OutputError` unless `output` can become a result: absent, empty, or an earlier one with `overwrite`."""
    with _disk(output):
        resolved = output.resolve()
        partial = resolved.with_name(resolved.name + PARTIAL)
        if partial.exists() and not (partial / MARK).is_file():
            raise OutputError(f"{partial} is in the way and not from llm_snp; remove it, or give another --output")
        parent = next(path for path in resolved.parents if path.exists())
        if not parent.is_dir():
            raise OutputError(f"--output {output} cannot be made: {parent} is a file; give another directory")
        if not os.access(parent, os.W_OK):
            raise OutputError(f"--output {output} cannot be made: {parent} is not writable; give another directory")
        if not resolved.exists():
            return
        if not resolved.is_dir():
            raise OutputError(f"--output {output} is a file; give a directory")
        if not any(resolved.iterdir()):
            return
        if not _is_result(resolved):
            raise OutputError(f"--output {output} is not empty and no result of llm_snp; give another directory")
        if not overwrite:
            raise OutputError(f"--output {output} holds an earlier result; give another directory, or --overwrite")
        if _aside(resolved).exists():
            raise OutputError(f"{_aside(resolved)} is in the way; it may be a still earlier result: move or remove it")


def _aside(output: Path) -> Path:
    """Where an earlier result is while the new one gets its name."""
    return output.with_name(output.name + ".replaced")


def _is_result(directory: Path) -> bool:
    """Whether a directory has the report of an earlier run."""
    try:
        return "llm_snp" in json.loads((directory / REPORT).read_text(encoding="utf-8"))["versions"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_space(directory: Path, needed: int) -> None:
    """Raise `OutputError` if the disk that will hold `directory` has less than `needed` bytes free."""
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"the result needs up to {needed / 1e9:.2f} GB, but the disk of {existing} has {free / 1e9:.2f} GB free; "
            "give --output on another disk"
        )


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


def _settle(temporary: Path, final: Path) -> None:
    """Make a written file durable, then visible under its name."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turn what a disk can do wrong into `OutputError`."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        number = getattr(error, "errno", None)
        # safetensors writes by itself and reports the system's error as text
        found = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
        if found:
            number = int(found[1])
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"{path} cannot be written: the disk is full; free some space or give another --output"
            ) from error
        reason = os.strerror(number) if number else str(error)
        raise OutputError(f"{path} cannot be written: {reason}; give another --output") from error
