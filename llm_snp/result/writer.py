"""The files of a checkpoint: one shard per block, one for the rest, the index last."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..core.stopwatch import timed
from ..system.files import digest, digest_of_bytes, write_tensors, write_together
from ..system.manifest import list_in_partial


class Writer:
    """Writes a checkpoint of `shards` shards into a directory. Raises `OutputError` if the disk does not take it."""

    def __init__(self, directory: Path, shards: int):
        self.directory = directory
        self._shards = shards
        self.files: dict[str, str] = {}  # name -> hash of what was written
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
        self.files[path.name] = digest(path)
        return self.files[path.name]

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
        self.files[path.name] = expected
        return tensors

    def _count(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self._map |= dict.fromkeys(tensors, path.name)
        self._bytes += sum(t.numel() * t.element_size() for t in tensors.values())
        self._parameters += sum(t.numel() for t in tensors.values() if t.is_floating_point())

    def bytes(self, files: Mapping[str, bytes]) -> None:
        """Write other files by their name, some perhaps in folders."""
        list_in_partial(self.directory, files)
        write_together(self.directory, files)
        self.files |= {name: digest_of_bytes(content) for name, content in files.items()}

    def index(self) -> None:
        """The index, after all shards: a directory without it does not load."""
        metadata = {"total_size": self._bytes, "total_parameters": self._parameters}
        index = {"metadata": metadata, "weight_map": dict(sorted(self._map.items()))}
        self.bytes({SAFE_WEIGHTS_INDEX_NAME: (json.dumps(index, indent=2) + "\n").encode()})

    @property
    def weight_bytes(self) -> int:
        return self._bytes
