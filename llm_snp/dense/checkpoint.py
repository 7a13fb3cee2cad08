"""A lazy reader of Hugging Face checkpoints: safetensors or pytorch_model.bin, sharded or not, a few tensors at a time.

Tensors are copied out of the mapped file, which is closed again: pages that stay mapped count as this process's memory.
Every key is accounted for on both sides before anything is computed (`Checkpoint.audit`): a silently skipped tensor
is a wrong model.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from ..core.linalg import all_finite
from ..errors import CheckpointError
from ..system.libraries import ONE_AT_A_TIME, explained, parse_json
from .claims import check_archive, check_pickled, check_weight_name, check_within

LISTED = 5  # at most so many keys are named in an error
WEIGHT_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
# Of tables of numbers that a model keeps beside its weights; no quantised weight is stored in it.
TABLE_TYPE = torch.int64
TYPES = WEIGHT_TYPES | {"I64": TABLE_TYPE}
ZIP_START = b"PK\x03\x04"


class Checkpoint:
    """The tensors of a checkpoint directory by their name in the model.

    `renames` are (regular expression, replacement) pairs that turn other key spellings into the model's own.
    Raises `CheckpointError` if the directory has no weights or a file is missing, truncated or not a weight file.
    """

    def __init__(self, directory: str | Path, renames: Iterable[tuple[str, str]] = ()):
        self.directory = Path(directory)
        self._legacy: dict[str, dict[str, Tensor]] = {}  # files that cannot be mapped are read once, as a whole
        self._where: dict[str, tuple[str, str]] = {}  # name in the model -> (file, key in the file)
        self._facts: dict[str, tuple[tuple[int, ...], Any]] = {}  # name in the model -> (shape, type)
        self._stamps: dict[str, tuple[int, int]] = {}  # file -> its size and time when it was first opened
        listed = weight_files(self.directory)
        self.files = [self.directory / file for file in listed]
        renames = list(renames)
        for file, keys in listed.items():
            handle = self._open(file)
            present = set(handle.keys()) if keys is not None else handle.keys()
            for key in present if keys is None else keys:
                if key not in present:
                    raise CheckpointError(f"{self.directory / file} has no tensor {key!r}, which the index expects")
                name = respelled(key, renames)
                if name in self._where:
                    raise CheckpointError(f"{self.directory} has {name} twice, as {self._where[name][1]} and as {key}")
                self._where[name] = (file, key)
                self._facts[name] = _facts(handle, key)
        if not self._where:
            raise CheckpointError(f"{self.directory} has weight files ({_some(list(listed))}), but no tensor in them")

    def _open(self, file: str) -> Any:
        """The tensors of a file by their key. Raises `CheckpointError`, also if it is not the file it was before."""
        path = self.directory / file
        if file in self._legacy:
            return self._legacy[file]
        try:
            found = path.stat()
            with open(path, "rb"):  # what may not be read looks to safetensors as if it were not there
                pass
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is gone; download it again") from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        self._check_stamp(file, found)

        def refusal(cause: str) -> CheckpointError:
            return CheckpointError(f"{path} cannot be read, it may be truncated: {cause}; download it again")

        with explained(refusal):
            if path.suffix == ".safetensors":
                return safe_open(path, framework="pt")
            tensors, mapped = _read_pickled(path)
        if not mapped:
            self._legacy[file] = tensors
        return tensors

    def _check_stamp(self, file: str, found: os.stat_result) -> None:
        stamp = (found.st_size, found.st_mtime_ns)
        if self._stamps.setdefault(file, stamp) != stamp:
            raise CheckpointError(
                f"{self.directory / file} has changed since it was first read; put back the file as it was"
            )

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if a file is not the one first read: for readers that open it by its name."""
        for path in self.files:
            try:
                self._check_stamp(path.name, path.stat())
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error

    def names(self) -> list[str]:
        """The tensors there are, by their name in the model."""
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._facts[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Type of a weight, without reading it. Raises `CheckpointError` if it is not floating-point."""
        return self._checked(name, self._facts[name][1])

    def _checked(self, name: str, dtype: Any) -> torch.dtype:
        if dtype in WEIGHT_TYPES.values():
            return dtype  # type: ignore[no-any-return]
        found, *allowed = (str(kind).removeprefix("torch.") for kind in (dtype, *WEIGHT_TYPES.values()))
        raise CheckpointError(
            f"{name} in {self._where[name][0]} has type {found}, expected one of {', '.join(allowed)}; "
            "a quantised model cannot be pruned: prune first, quantise afterwards"
        )

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by name (host, dtype of the file), each file opened once.

        Raises `CheckpointError` for one that is not finite, or neither floating-point nor a table (int64), and for a
        file that has changed.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self._where[name][0], []).append(name)
        for file, members in by_file.items():
            handle = self._open(file)
            for name in members:
                key = self._where[name][1]
                try:
                    tensor = handle[key] if isinstance(handle, dict) else handle.get_tensor(key)
                except (KeyError, SafetensorError) as error:
                    raise CheckpointError(f"{key} is gone from {self.directory / file}: it has changed") from error
                if tensor.dtype != TABLE_TYPE:
                    self._checked(name, tensor.dtype)
                if file not in self._legacy:
                    tensor = tensor.clone()
                if not all_finite(tensor):
                    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
                    raise CheckpointError(
                        f"{name} in {file} has {bad} entries that are NaN or infinite; the file is damaged"
                    )
                yield name, tensor

    def spelled(self, name: str) -> str:
        """A tensor's name as its file has it."""
        return self._where[name][1]

    def check_finite(self) -> None:
        """Read everything once. Raises `CheckpointError` as `tensors` does: what is damaged shows before the work."""
        for _ in self.tensors(self._where):
            pass

    def tensor(self, name: str) -> Tensor:
        """One tensor, as `tensors` gives it."""
        return next(self.tensors([name]))[1]

    def tables(self) -> dict[str, Tensor]:
        """The tables of numbers that a pruned model has beside its weights."""
        return dict(self.tensors(name for name in self._where if self._facts[name][1] == TABLE_TYPE))

    def block(self, prefix: str) -> dict[str, Tensor]:
        """All tensors under `prefix` + '.', by their name relative to it."""
        start = prefix + "."
        inside = [name for name in self._where if name.startswith(start)]
        return {name[len(start) :]: tensor for name, tensor in self.tensors(inside)}

    def audit(
        self,
        expected: Mapping[str, tuple[int, ...]],
        tied: Mapping[str, str],
        ignored: Iterable[str] = (),
        tables: Iterable[str] = (),
    ) -> None:
        """Account for every key. `expected`: name -> shape in the model; `tied`: name -> the name it shares.

        A tied name may be absent, or present (then it is the duplicate that is dropped). `ignored` are patterns
        that the model class itself declares harmless: such tensors are forgotten. `tables` are the names of those that
        hold int64. Raises `CheckpointError` naming missing, extra and misshaped tensors, and weights that are tables.
        """
        present = set(self._where)
        for name, source in tied.items():
            # A checkpoint may have stored only the other half of the pair.
            if source not in present and name in present:
                self._where[source], self._facts[source] = self._where.pop(name), self._facts.pop(name)
                present = set(self._where)
            elif source in present and name in present and not torch.equal(self.tensor(name), self.tensor(source)):
                raise CheckpointError(
                    f"{name} and {source} in {self.directory} differ, but config.json says that they are one; "
                    'set "tie_word_embeddings": false in it if they should differ'
                )
        missing = [name for name in expected if name not in present and name not in tied]
        patterns = [re.compile(pattern) for pattern in ignored]
        extra = [n for n in present - set(expected) if not any(pattern.search(n) for pattern in patterns)]
        if missing:
            raise CheckpointError(f"{self.directory} lacks {_tensors(missing)} of the model: {_some(missing)}")
        if extra:
            raise CheckpointError(
                f"{self.directory} has {_tensors(extra)} the model has no place for: {_some(sorted(extra))}; "
                "its config.json may belong to another model"
            )
        for name in present - set(expected):
            del self._where[name]
        tables = set(tables)
        for name, shape in expected.items():
            if name not in present:
                continue
            if self._facts[name][1] == TABLE_TYPE and name not in tables:
                self._checked(name, TABLE_TYPE)
            if self.shape(name) != tuple(shape):
                raise CheckpointError(
                    f"{name} in {self.directory} has shape {self.shape(name)}, but config.json implies {tuple(shape)}"
                )


def respelled(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """A tensor's name with every (regular expression, replacement) applied, one after the other."""
    for pattern, replacement in pairs:
        name = re.sub(pattern, replacement, name)
    return name


def weight_files(directory: Path) -> dict[str, list[str] | None]:
    """Weight files and the keys the index expects in each (None: no index, whatever the file holds).

    Of several the same one is taken that transformers would load. Raises `CheckpointError` if there are none, and for a
    link out of the directory.
    """
    for index_name, single in ((SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME), (WEIGHTS_INDEX_NAME, WEIGHTS_NAME)):
        if os.path.isfile(directory / single):
            check_within(directory / single, directory)
            return {single: None}
        index = directory / index_name
        if os.path.isfile(index):
            check_within(index, directory)
            files: dict[str, list[str] | None] = {**_read_index(index)}
            absent = [file for file in files if not os.path.isfile(directory / file)]
            if absent:
                are = "is" if len(absent) == 1 else "are"
                raise CheckpointError(
                    f"{index} lists {len(files)} weight files, but {_some(absent)} {are} missing; download again"
                )
            for file in files:
                check_within(directory / file, directory)
            return files
    raise CheckpointError(
        f"{directory} has no weights: expected {SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}, or the index of one"
    )


def _read_index(index: Path) -> dict[str, list[str]]:
    """The keys in each file that an index lists."""
    try:
        content = parse_json(index.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror}") from error
    except ValueError:
        content = None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f'{index} is not a checkpoint index, a JSON object with a "weight_map"')
    files: dict[str, list[str]] = {}
    for key, file in weight_map.items():
        files.setdefault(check_weight_name(file, index), []).append(key)
    return files


def _read_pickled(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a pytorch_model.bin, and whether they are mapped, not read (the zip format of torch >= 1.6)."""
    zipped = zipfile.is_zipfile(path)
    with open(path, "rb") as file:
        if not zipped and file.read(len(ZIP_START)) == ZIP_START:
            raise CheckpointError(f"{path} is truncated: its table of contents is missing; download it again")
    if zipped:
        check_archive(path)

    try:
        with ONE_AT_A_TIME, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    # torch's own text advises to load it unsafely; what is no pickle at all can fail in its reader in other ways.
    except (pickle.UnpicklingError, LookupError, ValueError, EOFError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors and was not loaded for safety; download it again"
        ) from error
    return check_pickled(loaded, path), zipped


def _facts(handle: Any, key: str) -> tuple[tuple[int, ...], Any]:
    """Shape and type of a tensor in an open file; safetensors' own name for a type that is none of a weight."""
    if isinstance(handle, dict):
        return tuple(handle[key].shape), handle[key].dtype
    found = handle.get_slice(key)
    return tuple(found.get_shape()), TYPES.get(found.get_dtype(), found.get_dtype())


def _tensors(names: list[str]) -> str:
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
