"""What only this machine needs to know of a result: where its dense model is, and the options as they were given.

It lies in a folder of the result that the Hub's tools and git leave out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import digest_of_json, disk, write_together
from .manifest import IGNORE, MEMORY, manifest, object_in
from .plain import encodable

TASKS = "tasks"  # results of tasks that were run before all were
PLACE, RESULT = "inode", "result"  # of the directory that it is of, and of the result's weights


def remember(directory: Path, facts: Mapping[str, Any]) -> None:
    """Keep facts of a result beside what tells whose they are, to be believed by `recall` only there."""
    with disk(directory):
        itself = {PLACE: directory.stat().st_ino, RESULT: _weights(directory)}
        content = json.dumps({**facts, **itself}, indent=2) + "\n"
    write_together(directory, {IGNORE: b"*\n", MEMORY: content.encode()})


def recall(directory: Path) -> dict[str, Any]:
    """What was kept of a result on this machine; empty if it was made elsewhere, or is a copy.

    It names places and texts that are read, and those of a stranger's directory would be of his choice. So it is
    believed only in the directory in which it was written, by the number that this has in its file system, which
    nobody can know beforehand: renamed, it keeps that. And only of whoever runs this: another user of the machine knows
    the number. Nor of another result that git, say, has put there since, which leaves the memory alone.
    """
    memory = object_in(directory / MEMORY)
    try:
        mine = (directory / MEMORY).stat().st_uid == os.geteuid()
        weights = _weights(directory)
        # Earlier memories do not say of which result they are.
        itself = (memory.pop(PLACE, None), memory.pop(RESULT, weights)) == (directory.stat().st_ino, weights)
        if not (mine and itself):
            return {}
    except OSError:
        return {}
    return {name: found for name, found in memory.items() if _KINDS.get(name, lambda _: False)(found)}


def _weights(directory: Path) -> str:
    """One hash of those that a result's report has of its weights."""
    return digest_of_json({name: found for name, found in manifest(directory).items() if name.endswith(".safetensors")})


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value and encodable(value)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float)) or _is_name(value)


def _is_options(value: Any) -> bool:
    """Whether it is what a run was asked for, as JSON has it: texts, numbers, lists of texts."""
    return isinstance(value, dict) and all(
        all(map(_is_name, one)) if isinstance(one, list) else _is_plain(one) for one in value.values()
    )


def _is_measured(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(one, dict) for one in value.values())


_KINDS = {TASKS: _is_measured, "options": _is_options, "model": _is_name, "healing": _is_options, "read": _is_options}
