"""What an unfinished run has done so far: small records and tensors on disk, so that it can go on after being killed.

Only the main process has the folder. Reading is a collective, so that all processes take the same turns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .errors import ResumeError
from .files import digest, write_json, write_tensors
from .processes import Processes

DIGEST = "digest"


class Journal:
    """Records by name in `folder`, each there whole or not at all."""

    def __init__(self, folder: Path, processes: Processes):
        self.folder, self.processes = folder, processes
        self.rescued: list[str] = []  # what was there, but damaged, and has to be done again

    def read(self, name: str) -> dict[str, Any] | None:
        """The record of that name, on all processes; None if there is none."""
        return self.processes.from_main(lambda: self._read(name))

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            record = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            self.rescued.append(f"the record {name} of the interrupted run was damaged")
            return None
        return record if isinstance(record, dict) else None

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        if self.processes.main:
            write_json(self.folder / f"{name}.json", dict(record))

    def has(self, name: str) -> bool:
        """Whether there are tensors of that name and they are what was written, on all processes."""
        return self.processes.from_main(lambda: self._sound(name))

    def _sound(self, name: str) -> bool:
        record, path = self._read(name), self.folder / f"{name}.safetensors"
        if record is None:
            return False
        if path.is_file() and digest(path) == record.get(DIGEST):
            return True
        self.rescued.append(f"{path.name} of the interrupted run was damaged")
        return False

    def read_tensors(self, name: str, device: torch.device) -> dict[str, Tensor]:
        """The tensors of that name (host), on all processes. Raises `ResumeError` if they are gone."""

        def load() -> dict[str, Tensor] | None:
            try:
                return load_file(self.folder / f"{name}.safetensors")
            except (OSError, SafetensorError) as error:
                raise ResumeError(
                    f"{self.folder / name}.safetensors is gone or damaged, while the run needs it; start it again "
                    "with --resume"
                ) from error

        return self.processes.tensors_from_main(load() if self.processes.main else None, device)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        if self.processes.main:
            path = self.folder / f"{name}.safetensors"
            write_tensors(path, tensors)
            self.write(name, {DIGEST: digest(path)})

    def expect(self, what: str, fields: Mapping[str, Any]) -> None:
        """Note `fields` for later runs, or, in a later run, check that they are the same.

        Raises `ResumeError` naming the first field that differs.
        """
        earlier = self.read(what)
        if earlier is None:
            self.write(what, fields)
            return
        now = json.loads(json.dumps(dict(fields)))
        for name in [*now, *(name for name in earlier if name not in now)]:
            if earlier.get(name) != now.get(name):
                raise ResumeError(
                    f"--resume: {name} is {now.get(name)!r} now and was {earlier.get(name)!r} in the interrupted run; "
                    "give the same again, or start anew with --overwrite instead of --resume"
                )
