"""The files of a checkpoint: one shard per block, one for the rest, the index last."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..core.stopwatch import timed
from ..system.files import digest, disk, write_json, write_tensors, write_text

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
    """Writes a checkpoint of `shards` shards into a directory. Raises `OutputError` if the disk does not take it."""

    def __init__(self, directory: Path, shards: int):
        self.directory = directory
        self._shards = shards
        self._map: dict[str, str] = {}
        self._bytes = 0
        self._parameters = 0

    def path(self, number: int) -> Path:
        """Of shard `number` (from 0)."""
        return self.directory / f"model-{number + 1:05d}-of-{self._shards:05d}.safetensors"

    @timed("save")
    def shard(self, number: int, tensors: Mapping[str, Tensor]) -> str:
        """Write shard `number` with tensors named as in the model; returns a hash of the file."""
        path = self.path(number)
        write_tensors(path, tensors)
        self._count(path, tensors)
        return digest(path)

    def adopt(self, number: int, expected: str) -> dict[str, Tensor] | None:
        """The tensors of a shard that an earlier run wrote, as if written now; None if it is not what it was."""
        path = self.path(number)
        try:
            if digest(path) != expected:
                return None
            tensors = load_file(path)
        except (OSError, SafetensorError):
            return None
        self._count(path, tensors)
        return tensors

    def _count(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self._map |= dict.fromkeys(tensors, path.name)
        self._bytes += sum(t.numel() * t.element_size() for t in tensors.values())
        self._parameters += sum(t.numel() for t in tensors.values() if t.is_floating_point())

    def text(self, name: str, content: str) -> None:
        write_text(self.directory / name, content)

    def json(self, name: str, content: Any) -> None:
        write_json(self.directory / name, content)

    def copy(self, source: Path, names: tuple[str, ...] | None = None) -> None:
        """Copy a file, or of a directory those of `names` that it has."""
        files = [source] if names is None else [source / name for name in names if (source / name).is_file()]
        with disk(self.directory):
            for file in files:
                shutil.copyfile(file, self.directory / file.name)

    def index(self) -> None:
        """The index, after all shards: a directory without it does not load."""
        metadata = {"total_size": self._bytes, "total_parameters": self._parameters}
        self.json(SAFE_WEIGHTS_INDEX_NAME, {"metadata": metadata, "weight_map": dict(sorted(self._map.items()))})

    @property
    def weight_bytes(self) -> int:
        return self._bytes
