"""Tasks for lm-evaluation-harness: the names, files and directories a person gives, and loading them with their data.

A task is named as the harness names it (a task, a group or a tag), or is local: a .yaml file in the harness's format,
or a directory of them. Relative paths in a file (`data_files`) begin beside the file; where nothing is there they
begin in the working directory, as they always do for the harness alone.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..errors import CorpusError, HubError, OptionError, SnpError
from ..system.files import scratch

PREFIX = "harness:"
ENDINGS = (".yaml", ".yml")
EXAMPLE = f"{PREFIX}./my_tasks/choice.yaml"
REASON = 200  # characters at most that an error quotes


def tasks_of(evaluate: Sequence[str]) -> tuple[str, ...]:
    """The tasks in a list of what to evaluate: those after `harness:`, separated by commas, each once."""
    entries = [entry.removeprefix(PREFIX) for entry in evaluate if entry.startswith(PREFIX)]
    return tuple(dict.fromkeys(task.strip() for entry in entries for task in entry.split(",")))


def texts_of(evaluate: Sequence[str]) -> tuple[str, ...]:
    """The texts in a list of what to evaluate: all that does not begin with `harness:`, each once."""
    return tuple(dict.fromkeys(entry for entry in evaluate if not entry.startswith(PREFIX)))


@dataclass(frozen=True)
class Request:
    """What a person named, and what it stands for.

    tasks: names or files, which `manager` (lm_eval's) loads, with the directories of the local ones; defined: names of
    tasks and groups, each with the place that defines it.
    """

    name: str
    manager: Any
    tasks: Mapping[str, Path | None]
    defined: Sequence[tuple[str, str]]

    @property
    def local(self) -> bool:
        return any(self.tasks.values())

    def load(self) -> dict[str, Any]:
        """Its tasks with their data, as lm_eval's `evaluate` takes them. Raises `SnpError` if they cannot be had."""
        merged: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        try:
            for task, directory in self.tasks.items():
                for kind, found in self._load(task, directory).items():
                    merged[kind] |= found
        except Exception as error:  # a task may bring code, which raises anything, as do lm_eval and the Hub's client
            raise self._refusal(error) from error
        return merged

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """Its place to be loaded and run: beside a local task, and nowhere for one of the harness.

        datasets and evaluate prefer what has the name of a task's data, or of a metric, in the working directory, which
        may be a stranger's, and run a script in it: datasets before version 4, evaluate always, and often not before
        the task is run.
        """
        with _working_directory(next(filter(None, self.tasks.values()), None)):
            yield

    def _load(self, task: str, directory: Path | None) -> Mapping[str, Any]:
        if not self.local:
            with self.at_home():
                return self.manager.load([task])
        if directory:
            with suppress(FileNotFoundError), _working_directory(directory):
                return self.manager.load([task])
        with _metrics_of_elsewhere():
            return self.manager.load([task])

    def _refusal(self, error: Exception) -> SnpError:
        why = reason(error)
        if isinstance(error, ImportError):
            return OptionError(f"task {self.name} needs a module that is not installed ({why})")
        if not self.local or isinstance(error, ConnectionError):
            return HubError(
                f"task {self.name} or its data could not be had ({why}); check the network, or give a local task, as "
                f"in {EXAMPLE}"
            )
        if isinstance(error, FileNotFoundError):
            return CorpusError(
                f"the data of task {self.name} was not found ({why}); expected it beside the .yaml file or in the "
                "working directory"
            )
        return OptionError(f"lm-evaluation-harness cannot load task {self.name} ({why}); correct its files")


def find_tasks(tasks: Sequence[str]) -> list[Request]:
    """What each task stands for; reads no data. Raises `OptionError` for what is no task, or if lm_eval is missing."""
    if not all(tasks):
        raise OptionError(f"{PREFIX} must be followed by tasks, as in {PREFIX}piqa,arc_easy or {EXAMPLE}")
    try:
        import lm_eval.evaluator
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise OptionError(
            f"{PREFIX}{','.join(tasks)} needs lm-evaluation-harness ({reason(error)}); pip install 'lm_eval>=0.4.12'"
        ) from error
    requests = [_local(task) if _is_local(task) else _known(task) for task in dict.fromkeys(tasks)]
    places: dict[str, str] = {}
    for name, place in (definition for request in requests for definition in request.defined):
        if places.setdefault(name, place) != place:
            raise OptionError(f"task {name} is defined in {places[name]} and in {place}; rename one")
    return requests


@cache
def _manager(include: Path | None = None) -> Any:
    """The tasks of the harness, and those in a directory; made once, as it takes 8 seconds and 80 MB."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include)


def _is_local(task: str) -> bool:
    if os.path.isdir(os.path.expanduser(task)):
        return bool(os.path.dirname(task)) or task not in _manager().all_tasks  # results are often in ./piqa
    return task.endswith(ENDINGS)


def _known(task: str) -> Request:
    names = _manager().all_tasks
    if task not in names:
        close = difflib.get_close_matches(task, names, n=1)
        raise OptionError(
            f"lm-evaluation-harness has no task, group or tag {task!r}, and it is no .yaml file or directory either; "
            + (f"did you mean {close[0]!r}?" if close else "`lm-eval ls tasks` lists them")
        )
    return Request(task, _manager(), {task: None}, [(task, "lm-evaluation-harness")])


def _local(task: str) -> Request:
    """A task of one's own, or all in a directory; those that are in a group there are run as part of it."""
    from lm_eval.tasks import TaskManager

    path = Path(os.path.realpath(os.path.expanduser(task)))
    files = sorted(path.rglob("*.yaml")) if path.is_dir() else [path]
    configs = {file: _read(file) for file in files}
    named = ((file, config.get("group", config.get("task"))) for file, config in configs.items())
    names = {file: name for file, name in named if isinstance(name, str)}  # others are templates
    if not names:
        raise OptionError(f'{task} has no task; expected a .yaml file with "task: NAME" for lm-evaluation-harness')
    defined = [(name, str(file)) for file, name in names.items()]
    groups = [config for config in configs.values() if "group" in config]
    if not groups:
        alone = TaskManager(include_defaults=False)
        return Request(task, alone, {str(file): file.parent for file in names}, defined)
    # The harness finds the tasks of a group by name, in a list of all tasks in a directory.
    folder = path if path.is_dir() else path.parent
    manager = TaskManager(include_path=folder, include_defaults=False)
    members = {member for group in groups for member in _members(group)}
    if not members <= {*manager.all_tasks}:  # a group of one's own may have tasks of the harness in it
        manager = _manager(folder)
    defined += [(name, str(manager.task_index[name].yaml_path)) for name in names.values()]
    return Request(task, manager, {name: file.parent for file, name in names.items() if name not in members}, defined)


def _members(group: Mapping[str, Any]) -> Iterator[str]:
    """Names of the tasks and groups in a group."""
    inside = group.get("task")
    for member in inside if isinstance(inside, list) else [inside]:
        if isinstance(member, Mapping):
            yield from [member["group"]] if "group" in member else []
            yield from _members(member)
        elif isinstance(member, str):
            yield member


class _Loader(yaml.SafeLoader):
    """Reads the functions that a task names (`!function utils.process`) as text."""


_Loader.add_constructor("!function", lambda loader, node: node.value)


def _read(file: Path) -> dict[str, Any]:
    """A task file, with what it includes. Raises `OptionError`."""
    try:
        if file.exists() and not file.is_file():
            raise ValueError("it is a pipe, a device or a directory")
        config = yaml.load(file.read_text(encoding="utf-8"), _Loader)
        if not isinstance(config, dict):
            raise ValueError("it has no keys")
        included = config.pop("include", ())
        base: dict[str, Any] = {}
        for other in [included] if isinstance(included, str) else included:
            base |= _read(file.parent / other)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise OptionError(f"{file} cannot be read as a task of lm-evaluation-harness ({reason(error)})") from error
    return base | config


@contextmanager
def _working_directory(directory: Path | None) -> Iterator[None]:
    """Be in a directory, or in an empty one, as with contextlib.chdir of Python 3.11."""
    before = Path.cwd()
    with nullcontext(directory) if directory else scratch() as place:
        os.chdir(place)
        try:
            yield
        finally:
            os.chdir(before)


@contextmanager
def _metrics_of_elsewhere() -> Iterator[None]:
    """Load no metric from the working directory, though data may be there."""
    try:
        import evaluate
    except ImportError:  # then nothing asks it for one
        yield
        return
    load = evaluate.load

    def elsewhere(*args: Any, **options: Any) -> Any:
        with _working_directory(None):
            return load(*args, **options)

    evaluate.load = elsewhere
    try:
        yield
    finally:
        evaluate.load = load


def reason(error: BaseException) -> str:
    """What went wrong first, on one line and not at length."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = " ".join(str(error).split())
    text = said if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: {said}"
    return text if len(text) <= REASON else text[: REASON - 4] + " ..."
