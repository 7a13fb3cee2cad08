"""The result directory, complete or not there at all.

Everything is written to `<output>.partial` first, each file whole (temporary name, fsync, rename), one shard per
block, the index last; then the directory gets its name. A failed run leaves nothing behind.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .errors import OutputError

REPORT = "report.json"
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
        self.output = output
        self.partial = output.with_name(output.name + ".partial")
        self._shards = shards
        self._map: dict[str, str] = {}
        self._bytes = 0
        self._parameters = 0
        check_output(output, overwrite)
        with _disk(self.partial):
            if self.partial.exists():
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True)

    def shard(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write shard `number` (from 0) with tensors named as in the model."""
        name = f"model-{number + 1:05d}-of-{self._shards:05d}.safetensors"
        with _disk(self.partial):
            temporary = self.partial / f".{name}"
            save_file(dict(sorted(tensors.items())), temporary, metadata={"format": "pt"})
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
        with _disk(self.output):
            if self.output.exists():
                shutil.rmtree(self.output)
            os.replace(self.partial, self.output)

    def discard(self) -> None:
        """Remove everything that was written."""
        shutil.rmtree(self.partial, ignore_errors=True)


def check_output(output: Path, overwrite: bool) -> None:
    """Raise `OutputError` unless `output` can become a result: absent, empty, or an earlier one with `overwrite`."""
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputError(f"--output {output} is a file; give a directory")
    if not any(output.iterdir()):
        return
    if not (output / REPORT).is_file():
        raise OutputError(f"--output {output} is not empty and no result of llm_snp; give another directory")
    if not overwrite:
        raise OutputError(f"--output {output} holds an earlier result; give another directory, or --overwrite")


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
    except SafetensorError as error:  # safetensors writes by itself and reports the system's error as text
        raise OutputError(f"{path} cannot be written: {error}; free some space or give another --output") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else (error.strerror or str(error))
        raise OutputError(f"{path} cannot be written: {reason}; free some space or give another --output") from error
