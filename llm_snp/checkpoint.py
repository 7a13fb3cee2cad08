"""A lazy reader of Hugging Face checkpoints: safetensors or pytorch_model.bin, sharded or not, one tensor at a time.

Every key is accounted for on both sides before anything is computed (`Checkpoint.audit`): a silently skipped tensor
is a wrong model.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from .errors import CheckpointError

LISTED = 5  # at most so many keys are named in an error


class Checkpoint:
    """The tensors of a checkpoint directory by their name in the model.

    `renames` are (regular expression, replacement) pairs that turn other key spellings into the model's own.
    Raises `CheckpointError` if the directory has no weights or a file is missing, truncated or not a weight file.
    """

    def __init__(self, directory: str | Path, renames: Iterable[tuple[str, str]] = ()):
        self.directory = Path(directory)
        self._handles: dict[str, Any] = {}
        self._where: dict[str, tuple[str, str]] = {}  # name in the model -> (file, key in the file)
        listed = self._files()
        self.files = [self.directory / file for file in listed]
        for file, keys in listed.items():
            for key in self._open(file).keys() if keys is None else keys:
                name = key
                for pattern, replacement in renames:
                    name = re.sub(pattern, replacement, name)
                self._where[name] = (file, key)

    def _files(self) -> dict[str, list[str] | None]:
        """Weight files and the keys the index expects in each (None: no index, whatever the file holds)."""
        for index_name, single in ((SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME), (WEIGHTS_INDEX_NAME, WEIGHTS_NAME)):
            index = self.directory / index_name
            if index.is_file():
                try:
                    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise CheckpointError(f"{index} is not a checkpoint index: {error}") from error
                files: dict[str, list[str] | None] = {}
                for key, file in weight_map.items():
                    keys = files.setdefault(file, [])
                    assert keys is not None
                    keys.append(key)
                absent = [file for file in files if not (self.directory / file).is_file()]
                if absent:
                    raise CheckpointError(
                        f"{index} lists {len(files)} weight files, but {_some(absent)} is missing; download it again"
                    )
                return files
            if (self.directory / single).is_file():
                return {single: None}
        raise CheckpointError(
            f"{self.directory} has no weights: expected {SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}, or the index of one"
        )

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            path = self.directory / file
            try:
                if path.suffix == ".safetensors":
                    self._handles[file] = safe_open(path, framework="pt")
                else:  # mmap needs the zip format of torch >= 1.6; older files are read whole
                    mmap = zipfile.is_zipfile(path)
                    self._handles[file] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError, OSError) as error:
                reason = str(error).strip().splitlines() or [type(error).__name__]
                raise CheckpointError(
                    f"{path} cannot be read, it may be truncated: {reason[0]}; download it again"
                ) from error
        return self._handles[file]

    def keys(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        file, key = self._where[name]
        handle = self._open(file)
        try:
            return tuple(handle[key].shape if isinstance(handle, dict) else handle.get_slice(key).get_shape())
        except (KeyError, SafetensorError) as error:
            raise CheckpointError(f"{self.directory / file} has no tensor {key!r}, which the index expects") from error

    def tensor(self, name: str) -> Tensor:
        """One tensor (host, dtype of the file). Raises `CheckpointError` if it is not finite or not floating-point."""
        file, key = self._where[name]
        handle = self._open(file)
        tensor = handle[key] if isinstance(handle, dict) else handle.get_tensor(key)
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{name} in {file} has type {tensor.dtype}; only floating-point weights can be pruned"
            )
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise CheckpointError(f"{name} in {file} has {bad} entries that are NaN or infinite; the file is damaged")
        return tensor

    def block(self, prefix: str) -> dict[str, Tensor]:
        """All tensors under `prefix` + '.', by their name relative to it."""
        start = prefix + "."
        return {name[len(start) :]: self.tensor(name) for name in self._where if name.startswith(start)}

    def audit(
        self, expected: Mapping[str, tuple[int, ...]], tied: Mapping[str, str], ignored: Iterable[str] = ()
    ) -> None:
        """Account for every key. `expected`: name -> shape in the model; `tied`: name -> the name it shares.

        A tied name may be absent, or present (then it is the duplicate that is dropped). `ignored` are patterns
        that the model class itself declares harmless. Raises `CheckpointError` naming missing, extra and misshaped
        tensors.
        """
        present = set(self._where)
        for name, source in tied.items():
            # A checkpoint may have stored only the other half of the pair.
            if source not in present and name in present:
                self._where[source] = self._where.pop(name)
                present = set(self._where)
        missing = [name for name in expected if name not in present and name not in tied]
        patterns = [re.compile(pattern) for pattern in ignored]
        extra = [n for n in present - set(expected) if not any(pattern.search(n) for pattern in patterns)]
        if missing:
            raise CheckpointError(f"{self.directory} lacks {len(missing)} tensors of the model: {_some(missing)}")
        if extra:
            raise CheckpointError(
                f"{self.directory} has {len(extra)} tensors the model has no place for: {_some(sorted(extra))}; "
                "its config.json may belong to another model"
            )
        for name, shape in expected.items():
            if name in present and self.shape(name) != tuple(shape):
                raise CheckpointError(
                    f"{name} in {self.directory} has shape {self.shape(name)}, but config.json implies {tuple(shape)}"
                )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
