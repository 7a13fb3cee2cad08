"""What is kept of an interrupted healing, and what must be the same for it to be gone on with."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..config import shares
from ..dense.readers import digests
from ..documents.writing import read_report
from ..errors import CheckpointError, ResumeError
from ..result.finishing import finished_all_the_same
from ..result.rewriting import Rewriting
from ..result.settings import content_of
from ..system.files import digest, digest_of_bytes, disk
from ..system.journal import DIGEST, Journal
from ..system.manifest import check_as_written
from ..system.remembering import recall
from ..system.workspace import STATES, Workspace, finished_result
from ..version import __version__
from .options import HealConfig
from .pair import Pair

FOLDER = "training"  # in the journal: where the Trainer keeps its states
BEST = "best"  # of a state's record: the step of the best one until then


class States:
    """The states of a training that are on disk, each there as a whole once its hash is in the journal."""

    def __init__(self, journal: Journal):
        self.journal = journal
        self.folder = journal.folder / FOLDER

    def note(self, step: int, state: Path, best: Path | None) -> None:
        """Take down that a state is whole, and only then remove those before it but the best one. A collective."""
        self.journal.processes.gather([])  # each process has written its random numbers
        if self.journal.processes.main:
            at = step if best is None else _number(best)
            with disk(state):
                self.journal.write(_name(step), {DIGEST: _digest(state), BEST: at})
            self._remove(lambda number: number not in (step, at))
            self.journal.forget(_name(number) for number in self._steps() if not self._place(number).is_dir())

    def latest(self) -> tuple[int, Path | None]:
        """The last state that is as it was written, as is the best one until then, with its step; (0, None) if there is
        none. A collective.
        """
        found: tuple[int, Path | None] = (0, None)
        for step in self.journal.processes.from_main(self._steps):
            lost = self._lost(step)
            if lost is None:
                found = (step, self._place(step))
                break
            self.journal.rescue(f"what the training had come to after step {lost} was gone or damaged")
        # What lies there of later steps would be mixed with what is saved next.
        self.journal.processes.on_main(partial(self._remove, lambda number: number > found[0]))
        return found

    def _lost(self, step: int) -> int | None:
        """Of the state of a step and the best one until then, the one that is not as it was written. A collective."""
        record = self._whole(step)
        if record is None:
            return step
        best: int = record.get(BEST, step)
        return None if self._whole(best) else best

    def _whole(self, step: int) -> dict[str, Any] | None:
        """The record of a state that is as it was written. A collective."""
        record = self.journal.read(_name(step))
        return record if record and self.journal.processes.from_main(partial(self._is, step, record[DIGEST])) else None

    def _is(self, step: int, expected: str) -> bool:
        try:
            return _digest(self._place(step)) == expected
        except OSError:
            return False

    def _remove(self, chosen: Callable[[int], bool]) -> None:
        """The states of the steps that are chosen."""
        for folder in self.folder.glob("checkpoint-*"):
            number = _number(folder)
            if number is not None and chosen(number):
                with disk(folder):
                    shutil.rmtree(folder)

    def _steps(self) -> list[int]:
        """Of the records, the latest first."""
        return _steps(self.journal.folder)[::-1]

    def _place(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"


def _steps(journal: Path) -> list[int]:
    """Of the states that are taken down in a journal, the latest last."""
    return sorted(int(path.stem.partition("-")[2]) for path in journal.glob(STATES))


def _name(step: int) -> str:
    """Of the record of a state."""
    return f"state-{step:08d}"


def _number(folder: Path) -> int | None:
    """The step of a state, by the name that the Trainer gives its folder."""
    number = folder.name.partition("-")[2]
    return int(number) if number.isdecimal() else None


def _digest(folder: Path) -> str:
    return digest(*sorted(path for path in folder.iterdir() if path.is_file()))


def left(workspace: Workspace, command: str) -> str:
    """What an unfinished healing has to show, and how to go on; empty if there is nothing."""
    if workspace.finished:
        return finished_all_the_same(workspace.output)
    steps = _steps(workspace.journal)
    what = f"what the training had come to after step {steps[-1]} is kept in {workspace.directory}" if steps else ""
    return what and f"{what}; go on with: {command}"


def texts_read(options: HealConfig) -> list[str]:
    """The texts of a healing, as they were given."""
    return [*shares(options.text), *(options.evaluate or ())]


def inputs_of(options: HealConfig, pair: Pair) -> dict[Path, bool]:
    """What is read, and that nothing may be written in it."""
    texts = [os.path.expanduser(text) for text in texts_read(options)]
    local = [Path(text) for text in texts if os.path.exists(text)]
    return dict.fromkeys([pair.student.directory, pair.teacher.directory, *pair.ancestors, *local], True)


def identity_of(pair: Pair, rewriting: Rewriting) -> dict[str, str]:
    """Hashes of what is read of both models. Raises `CheckpointError` if that cannot be read."""
    student, teacher = pair.student, pair.teacher
    found = {
        "the hash of the result's config.json": digest_of_bytes(rewriting.settings),
        "the hash of the result's tokenizer, templates and terms": rewriting.carried.digest,
        "the hash of the teacher's config.json": digest_of_bytes(content_of(teacher.directory / "config.json")),
    }
    try:
        for whose, model in (("result's", student), ("teacher's", teacher)):
            found[f"the hash of the {whose} weights"] = digest(*model.checkpoint.files)
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error
    return found


def memory_of(options: HealConfig, pair: Pair, read: Mapping[str, str]) -> dict[str, Any]:
    """What the report does not say, because it is of this machine: that of the pruning, and what was asked for.

    read: hashes of both models and the texts.
    """
    places = {"DIR": pair.student.directory, "--teacher": pair.teacher.directory}
    asked: dict[str, Any] = {name: str(directory.resolve()) for name, directory in places.items()}
    asked |= options.settings() | {"--evaluate": None if options.evaluate is None else list(options.evaluate)}
    return pair.memory | {"healing": {"llm_snp": __version__, **asked, **read}}


def finished_before(options: HealConfig, pair: Pair) -> bool:
    """Whether --resume finds the result finished. Raises `ResumeError` naming the first option that was another one.

    With --overwrite such a result is to be replaced, as is any where an unfinished training is kept.
    """
    output = options.destination.resolve()
    return (
        finished_result(output, options.resume, options.overwrite, lambda: _finished(options, pair, output)) is not None
    )


def _finished(options: HealConfig, pair: Pair, output: Path) -> bool:
    earlier = recall(output).get("healing")
    if not isinstance(earlier, dict):
        raise ResumeError(
            f"--resume: {options.destination} is a result, but no healing of this machine; give another --output, or "
            "--overwrite"
        )
    read = identity_of(pair, Rewriting(pair.student.directory)) | digests(texts_read(options))
    for name, now in memory_of(options, pair, read)["healing"].items():
        before = earlier.get(name)
        if before != now:
            raise ResumeError(
                f"--resume: {options.destination} is finished, and {name} is {now!r} now and was {before!r} there; "
                "give another --output, or --overwrite"
            )
    check_as_written(output, read_report(output))
    return True
