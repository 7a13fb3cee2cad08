"""The report as it may be shown to others: without paths of the machine it was made on."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CORPORA = {  # Hub id, config and split of the texts that have a name: what is evaluated on
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "c4": ("allenai/c4", "en", "validation"),
}
TASKS = "harness:"  # what begins so among the texts to evaluate on lists tasks


def shareable(report: dict[str, Any]) -> dict[str, Any]:
    """A copy of the report in which local paths are reduced to their last component.

    What is no path stays: Hub ids, and the names of texts. Of texts that have the same name then, also one from the
    Hub, the second gets "(2)", and so on.
    """
    report = copy.deepcopy(report)
    model, options = report["model"], report["options"]
    kept = {value for value in (hub_id(model["name"]), options.get("push_to_hub")) if value}

    def last(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [last(one) for one in value]
        if isinstance(value, str) and value.startswith(TASKS):
            return TASKS + ",".join(last(task) for task in value.removeprefix(TASKS).split(","))
        return Path(value).name if isinstance(value, str) and "/" in value and value not in kept else value

    model["name"], report["output"] = last(model["name"]), last(report["output"])
    report["options"] = {option: last(value) for option, value in options.items()}

    def text(source: str, taken: Iterable[str] = ()) -> str:
        names = [short := last(source), *(f"{short} ({i})" for i in range(2, len(report["evaluation"]) + 3))]
        return next(name for name in names if name not in taken and (name == source or name not in CORPORA))

    taken: list[str] = []
    for one in texts_of(report["calibration"]):
        one["source"] = text(one["source"], taken)
        taken.append(one["source"])
    report["calibration"]["source"] = " and ".join(taken)
    evaluation: dict[str, Any] = {}
    for source, results in report["evaluation"].items():
        short = text(source, evaluation)
        evaluation[short] = {which: result | {"source": short} for which, result in results.items()}
    report["evaluation"] = evaluation
    if "harness" in report:
        report["harness"] = {last(task): found for task, found in report["harness"].items()}
    words = []
    for word in shlex.split(report["command"]):
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        words.append(flag + equals + last(value))
    report["command"] = shlex.join(words)
    return report


def texts_of(calibration: dict[str, Any]) -> list[dict[str, Any]]:
    """The calibration's texts; a report of an earlier version knows one, which is the whole of it."""
    texts: list[dict[str, Any]] = calibration.get("texts") or [calibration]
    return texts


def hub_id(name: str) -> str | None:
    """The name of the dense model, where it is one on the Hub."""
    is_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).exists()
    return None if is_local else name
