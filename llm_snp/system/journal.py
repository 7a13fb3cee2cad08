"""What an unfinished run has done so far: small records and tensors on disk, so that it can go on after being killed.

Only the main process has the folder. Reading is a collective, so that all processes take the same turns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import ResumeError
from .files import digest, digest_of_json, disk, write_json, write_tensors
from .processes import Processes
from .progress import Progress

DIGEST = "digest"
RECORD = "record"


class Journal:
    """Records by name in `folder`, each there whole or not at all, and each with its hash.

    waiting: what is there is another run's until `begin`, and not read; what is expected or written is taken down then.
    """

    def __init__(self, folder: Path, processes: Processes, progress: Progress | None = None, waiting: bool = False):
        self.folder, self.processes, self.progress = folder, processes, progress or Progress(quiet=True)
        self.rescued: list[str] = []  # what was there, but damaged, and was made again
        self._expected: set[str] = set()
        self.waits = waiting  # for `begin`: what is there is another run's
        self._waiting: list[Callable[[], None]] = []

    def begin(self) -> None:
        """Take down what was expected or written so far, where that had to wait. A collective."""
        waiting, self._waiting, self.waits = self._waiting, [], False
        for take_down in waiting:
            take_down()

    def rescue(self, what: str) -> None:
        """Say, and note for the report, that something of the interrupted run has to be made again, and why."""
        line = f"{what}: made again"
        if line not in self.rescued:
            self.rescued.append(line)
            self.progress.say(line)

    def read(self, name: str) -> dict[str, Any] | None:
        """The record of that name, on all processes; None if there is none, or it is not what was written."""
        if self.waits:
            return None
        return self.processes.from_main(lambda: self._read(name))

    def _read(self, name: str, required: bool = False) -> dict[str, Any] | None:
        path = self.folder / f"{name}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            record: dict[str, Any] = content[RECORD]
            if digest_of_json(record) == content[DIGEST]:
                return record
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            pass
        if not required:
            self.rescue(f"{path.name} of the interrupted run was damaged")
        return None

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        if self.waits:
            self._waiting.append(partial(self.write, name, record))
        elif self.processes.main:
            write_json(self.folder / f"{name}.json", {DIGEST: digest_of_json(dict(record)), RECORD: dict(record)})

    def forget(self, names: Iterable[str]) -> None:
        """Remove records that rest on something that is not as it was."""
        if self.processes.main:
            with disk(self.folder):
                for name in names:
                    (self.folder / f"{name}.json").unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        """Whether there are tensors of that name and they are what was written, on all processes."""
        return self.processes.from_main(lambda: self._sound(name))

    def _sound(self, name: str) -> bool:
        record, path = self._read(name), self.folder / f"{name}.safetensors"
        if record is None:
            return False
        try:
            if digest(path) == record[DIGEST]:
                return True
        except OSError:
            pass
        self.rescue(f"{path.name} of the interrupted run was gone or damaged")
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

        return self.processes.tensors_from_main(self.processes.on_main(load), device)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        if self.processes.main:
            path = self.folder / f"{name}.safetensors"
            write_tensors(path, tensors)
            self.write(name, {DIGEST: digest(path)})

    def expect(self, what: str, fields: Mapping[str, Any]) -> None:
        """Note `fields` for later runs, or, in a later run, check that they are the same.

        To be called before anything else is written. Raises `ResumeError` naming the first field that differs, or if
        there is nothing to compare with although there is more in the folder: it may be of another command.
        """
        if self.waits:
            self._waiting.append(partial(self.expect, what, fields))
            return
        earlier, alone = self.processes.from_main(lambda: (self._read(what, required=True), self._alone(what)))
        self._expected.add(what)
        if earlier is None and alone:
            self.write(what, fields)
            return
        if earlier is None:
            raise ResumeError(
                f"{self.folder / what}.json is gone or damaged, so nothing tells whether the interrupted run was of "
                "this command; start anew with --overwrite instead of --resume"
            )
        now = json.loads(json.dumps(dict(fields)))
        for name in [*now, *(name for name in earlier if name not in now)]:
            if earlier.get(name) != now.get(name):
                raise ResumeError(
                    f"--resume: {name} is {now.get(name)!r} now and was {earlier.get(name)!r} in the interrupted run; "
                    "give the same again, or start anew with --overwrite instead of --resume"
                )

    def _alone(self, what: str) -> bool:
        """Whether there is no record but this one and those that were expected before it."""
        there = {path.stem for path in self.folder.glob("*.json")}
        return there <= {what, *self._expected}
