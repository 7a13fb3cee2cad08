"""The report as others may see it, which is how it is written: nothing in it is of the machine it was made on."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from ..config import METHODS, PruneConfig, flag_of, judged_attention
from ..system.plain import text_and_share
from ..system.private import HUB_ID, carried_words, public_name, public_text, public_words

CORPORA = {  # Hub id, config and split of the texts that have a name: what is evaluated on
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "c4": ("allenai/c4", "en", "validation"),
}
PLACES = ("model", "output", "calibration", "evaluate")  # options that name files, directories or texts
# What a result has nothing of: whose scratch disk was used, and where its run published it, perhaps privately.
UNTOLD = {"offload": None, "push_to_hub": None, "private": False}
FACTS = ("removed", "healed")  # of a model that another one was made of, beside its name
ROOTS = ("/", "~", ".")  # with which a branch, tag or commit does not begin, and places do
FURTHEST = 1e30  # from zero that a measured number may be: what is made of several must stay finite, too
TASKS = "harness:"  # what begins so among the texts to evaluate on lists tasks


def shareable(report: dict[str, Any]) -> dict[str, Any]:
    """A copy of the report in which local paths are reduced to their last component, the command's as well.

    What is no path stays: Hub ids, and the names of corpora. Of texts that have the same name then, also one from the
    Hub, the second gets "(2)", and so on. What cannot be printed is replaced, what a card cannot have is left out.
    """
    report = printable(report)
    model, options = report["model"], report["options"]
    kept = hub_id(model)

    def last(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [last(one) for one in value]
        if isinstance(value, str) and value.startswith(TASKS):
            return TASKS + ",".join(last(task) for task in value.removeprefix(TASKS).split(","))
        local = isinstance(value, str) and ("/" in value or value.startswith("~")) and value != kept
        return public_text(value) if local else value

    def called(value: Any) -> Any:
        """What is a place or a text: its name alone may be that of a person, whose home it is."""
        if isinstance(value, (list, tuple)):
            return [called(one) for one in value]
        plain = not isinstance(value, str) or value == kept or value in CORPORA or value.startswith(TASKS)
        return last(value) if plain else public_text(value)

    model["hub"] = hub_id(model) is not None
    model["name"], report["output"] = called(model["name"]), called(report["output"])

    def asked(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [asked(one) for one in value]
        return as_typed(called(value), value)

    told = options | {name: value for name, value in UNTOLD.items() if name in options}
    report["options"] = {name: (asked if name in PLACES else last)(value) for name, value in told.items()}
    if options.get("model") is not None:
        report["options"]["model"] = model["name"]
    if kept is not None and isinstance(revision := options.get("revision"), str) and not revision.startswith(ROOTS):
        report["options"]["revision"] = revision  # refs/pr/3 or release/v1 of a repository, of which 3 or v1 is another
    if "parents" in report:
        report["parents"] = [_named(one) | {name: one.get(name, 0) for name in FACTS} for one in report["parents"]]
    for step in report.get("healing", []):
        step["teacher"] |= _named(step["teacher"])
        step["command"] = _of_healing(step["command"])
    model["card"] = carried_words(model.get("card") or {})

    def texts(sources: Sequence[str]) -> list[str]:
        return told_apart(map(called, sources), sources)

    calibration = texts_of(report["calibration"])
    names = texts([one["source"] for one in calibration])
    for one, name in zip(calibration, names, strict=True):
        one["source"] = name
    report["calibration"]["source"] = " and ".join(names)
    report["evaluation"] = {
        name: {which: result | {"source": name} for which, result in results.items()}
        for name, results in zip(texts([*report["evaluation"]]), report["evaluation"].values(), strict=True)
    }
    if "harness" in report:
        tasks = dict(zip(report["harness"], told_apart(map(last, report["harness"])), strict=True))
        report["harness"] = {tasks[task]: found for task, found in report["harness"].items()}
        for found in report["harness"].values():
            if "subtasks" in found:
                found["subtasks"] = [tasks.get(task, last(task)) for task in found["subtasks"]]
    device = report["device"]
    report["command"] = command_line(report["options"], device.get("processes", 1), device.get("nodes", 1))
    models = [report["model"], *report.get("parents", []), *(step["teacher"] for step in report.get("healing", []))]
    without: dict[str, Any] = _without_places(
        report, {one["name"] for one in models if one["hub"] and "/" in one["name"]}
    )
    return without


def as_typed(public: Any, given: Any) -> Any:
    """What a text is called as an option's value, where it was `given`: one's own is not the Hub's of that name."""
    own = isinstance(public, str) and public != given and text_and_share(public)[0] in CORPORA
    return f"./{public}" if own else public


def told_apart(names: Iterable[str], given: Iterable[str] | None = None) -> list[str]:
    """Names of which no two are alike: the second of one gets "(2)", and so on.

    given: what each was called before, if it was; the name of a corpus is only that of what was called so.
    """
    names = list(names)
    taken: dict[str, None] = {}  # in order
    numbers: dict[str, Iterator[int]] = defaultdict(lambda: count(2))
    for name, before in zip(names, names if given is None else given, strict=True):
        own = name
        while own in taken or (own in CORPORA and own != before):
            own = f"{name} ({next(numbers[name])})"
        taken[own] = None
    return list(taken)


def _without_places(content: Any, kept: Collection[str]) -> Any:
    """A copy in which places, of whose texts there are none here by now, are reduced to their last component, too.

    A report may be a stranger's, of an earlier version, or edited: other texts in it may name some. kept: the names of
    models on the Hub.
    """
    if isinstance(content, str):
        return public_words(content, kept)
    if isinstance(content, Mapping):
        names = told_apart(public_words(name, kept) for name in content)
        return dict(zip(names, (_without_places(value, kept) for value in content.values()), strict=True))
    return [_without_places(one, kept) for one in content] if isinstance(content, (list, tuple)) else content


def printable(content: Any) -> Any:
    """A copy of something JSON-ready without characters that a page, a plot or a card cannot have.

    Each text is one line: more would be headings and lists of their own in a card. Numbers are as large as a report may
    have them at most: the perplexity of a model that was ruined, or of a task with long words, may be 1e100. Nor is one
    that is not zero nearer to it than the inverse of that.
    """
    if isinstance(content, float) and math.isfinite(content):
        size = max(1 / FURTHEST, min(FURTHEST, abs(content)))
        return math.copysign(size, content) if content else content
    if isinstance(content, str):
        return "".join(one if one.isprintable() else " " if one.isspace() else "\ufffd" for one in content)
    if isinstance(content, Mapping):
        copied: dict[str, Any] = {}
        for name, value in content.items():
            key = printable(name)
            while key in copied:
                key += "\ufffd"
            copied[key] = printable(value)
        return copied
    return [printable(one) for one in content] if isinstance(content, (list, tuple)) else content


def _named(model: Mapping[str, Any]) -> dict[str, Any]:
    """Name and origin of another model: what cannot be an id on the Hub is a place."""
    on_hub = hub_id(model) is not None
    return {"name": model["name"] if on_hub else public_name(Path(model["name"])), "hub": on_hub}


def texts_of(calibration: dict[str, Any]) -> list[dict[str, Any]]:
    """The calibration's texts; a report of an earlier version knows one, which is the whole of it."""
    texts: list[dict[str, Any]] = calibration.get("texts") or [calibration]
    return texts


def before(report: Mapping[str, Any]) -> str:
    """What the model is called that a result is compared with: it need not be dense."""
    return "before" if "parents" in report else "dense"


def hub_id(model: Mapping[str, Any]) -> str | None:
    """The id of a model, if it was one on the Hub; a report of an earlier version does not say so."""
    return model["name"] if model.get("hub") and HUB_ID.fullmatch(model["name"]) else None


def launcher(processes: int, nodes: int) -> list[str]:
    """How a command begins that so many processes run, on so many machines."""
    several = ["--nnodes", str(nodes)] if nodes > 1 else []
    return ["torchrun", *several, "--nproc-per-node", str(processes // nodes)] if processes > 1 else ["python"]


def _of_healing(command: str) -> str:
    """The command of a healing, whose words a shell takes for words: a report may be a stranger's."""
    plain = "python -m llm_snp heal"
    try:
        words = shlex.join(shlex.split(command))
    except ValueError:  # a quotation that does not end
        return plain
    launched = re.match(r"(python|torchrun( --nnodes \d+)? --nproc-per-node \d+) -m llm_snp heal ", words)
    return words if launched else plain


def words_of(name: str, value: Any) -> list[str]:
    """A field and its value as one types them: several values as a flag each, True as the flag alone."""
    flag = flag_of(name)
    if value is True:
        return [flag]
    if name == "evaluate" and not value:
        return ["--no-evaluate"]
    each = value if isinstance(value, (tuple, list)) else (value,)
    return [word for one in each for word in ([f"{flag}={one}"] if str(one).startswith("-") else [flag, str(one)])]


def command_line(options: Mapping[str, Any], processes: int = 1, nodes: int = 1) -> str:
    """The command that `options` (fields of `PruneConfig`, some perhaps missing) come to, whoever called.

    What the program that called was given for itself does not get here.
    """
    plain: dict[str, Any] = {}
    for name, value in options.items():
        plain[name] = tuple(value) if isinstance(value, list) else value
    method = plain.get("method")
    default = PruneConfig(plain.get("model"), method=method if method in METHODS else PruneConfig.method).resolved()
    usual = dataclasses.asdict(default) | {"method": PruneConfig.method}
    if usual["attention"] == "auto":
        usual["attention"] = judged_attention(PruneConfig(calibration=plain.get("calibration")).one_kind)
    words = [*launcher(processes, nodes), "-m", "llm_snp", *([plain["model"]] if plain.get("model") else [])]
    for field in dataclasses.fields(PruneConfig):
        name, value = field.name, plain.get(field.name)
        if name != "model" and value is not None and (name == "sparsity" or value != usual[name]):
            words += words_of(name, value)
    return shlex.join(words)
