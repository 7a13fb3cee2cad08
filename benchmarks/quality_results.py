"""The rows of `quality.py`, and what has been measured of them."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perplexity import write_json

from llm_snp.config import METHODS, PruneConfig, judged_attention
from llm_snp.core.orders import ORDERS
from llm_snp.errors import OptionError

Options = dict[str, Any]

UNIFORM: Options = {"allocation": "uniform", "target": "self", "attention": "heads"}
GREEDY: Options = {"order": "greedy", **UNIFORM}
RESIDUAL: Options = {**GREEDY, "target": "residual"}
DIMS: Options = {**RESIDUAL, "attention": "dims"}
LOSS: Options = {**RESIDUAL, "allocation": "loss", "sensitivity": "fisher"}
# Not an option of llm_snp: the floor that removing layers is measured against, as in ShortGPT (arXiv 2403.03853).
INFLUENCE: Options = {"method": "best", "structures": "layers", "format": "stock", "least_influence": True}

# group -> (name, options) of each row. Rows with equal choices are measured once.
ROWS: dict[str, list[tuple[str, Options]]] = {
    "no repair (uniform, heads)": [
        ("random, no repair", {**UNIFORM, "order": "random", "target": "none"}),
        ("magnitude, no repair", {**UNIFORM, "order": "saw", "target": "none"}),
        ("greedy, no repair", {**GREEDY, "target": "none"}),
    ],
    "order (uniform, target self, heads)": [
        # i-spasp scores activations that cannot be negative, which heads do not have: it ranks the neurons only.
        *((order, {**UNIFORM, "order": order}) for order in ORDERS if order != "i-spasp"),
        ("i-spasp, dims", {**UNIFORM, "order": "i-spasp", "attention": "dims"}),
        ("greedy, dims", {**GREEDY, "attention": "dims"}),
    ],
    "from greedy towards best": [
        ("greedy, uniform, self, heads", GREEDY),
        ("+ target dense", {**GREEDY, "target": "dense"}),
        ("+ target residual", RESIDUAL),
        ("+ dims", DIMS),
        ("+ loss, relative", {**DIMS, "allocation": "loss", "sensitivity": "relative"}),
        ("+ loss, scalar", {**DIMS, "allocation": "loss", "sensitivity": "scalar"}),
        ("+ loss, fisher", {**DIMS, "allocation": "loss", "sensitivity": "fisher"}),
        ("+ heads or dims per block", {**LOSS, "attention": "both"}),
    ],
    "one step aside (greedy, target residual)": [
        ("loss, fisher, neurons only", {**LOSS, "attention": "none"}),
        ("loss, fisher, heads", {**LOSS, "attention": "heads"}),
        ("loss, fisher, query heads", {**LOSS, "attention": "queries"}),
        ("loss, fisher, dims, self", {**LOSS, "attention": "dims", "target": "self"}),
        ("loss, scalar, both", {**LOSS, "attention": "both", "sensitivity": "scalar"}),
        ("fisher in the order, too, both", {**LOSS, "attention": "both", "sensitive_order": True}),
        ("variance, dims", {**DIMS, "allocation": "variance"}),
    ],
    "layers as a whole (target residual)": [
        ("whole blocks, least influence, unrepaired", {**INFLUENCE, "target": "none"}),
        ("whole blocks, least influence, repaired", INFLUENCE),
        ("whole blocks", {"method": "best", "structures": "layers", "format": "stock"}),
        ("layers", {"method": "best", "structures": "layers"}),
        ("layers and units", {"method": "best", "structures": "both"}),
    ],
    "presets": [
        *((method, {"method": method}) for method in METHODS),
        ("best, damping auto", {"method": "best", "damping": "auto"}),
        ("best, blockwise format", {"method": "best", "format": "blockwise", "attention": "heads"}),
        ("best, stock format", {"method": "best", "format": "stock"}),
        (
            "best, stock format, neurons only",
            {"method": "best", "format": "stock", "attention": "none", "allocation": "uniform"},
        ),
    ],
}
# What a row is, once its preset is filled in.
CHOICES = ("order", "allocation", "target", "attention", "sensitivity", "sensitive_order", "damping")
# What must agree before a result of an earlier run is taken for one of this run.
SAME = ("model", "calibration", "corpora", "device")


@dataclass(frozen=True)
class Row:
    """A line of the table. choices: what its options come to, once the preset is filled in.

    several: whether the calibration is of several texts, by which `--attention auto` decides.
    """

    group: str
    name: str
    options: Options
    several: bool = False

    @property
    def choices(self) -> Options:
        resolved = PruneConfig(**self.given).resolved()
        found = {name: getattr(resolved, name) for name in CHOICES}
        if found["attention"] == "auto":
            found["attention"] = judged_attention(one_kind=not self.several)
        usual = {"format": "auto", "structures": "units"}
        found |= {name: value for name in usual if (value := getattr(resolved, name)) != usual[name]}
        found |= {"method": resolved.method} if resolved.in_steps else {}
        return found | ({"least_influence": True} if self.least_influence else {})

    @property
    def given(self) -> Options:
        """What `PruneConfig` takes."""
        return {name: value for name, value in self.options.items() if name != "least_influence"}

    @property
    def least_influence(self) -> bool:
        """Whether the blocks that go are those that change the hidden states least."""
        return "least_influence" in self.options


def all_rows(several: bool = False) -> list[Row]:
    return [Row(group, name, options, several) for group, members in ROWS.items() for name, options in members]


def rows_matching(pattern: str, several: bool = False) -> list[Row]:
    """The rows whose name or group matches. Raises `OptionError` if none does."""
    try:
        rows = [row for row in all_rows(several) if re.search(pattern, row.name) or re.search(pattern, row.group)]
    except re.error as error:
        raise OptionError(f"--rows {pattern!r} is no regular expression: {error}") from error
    if not rows:
        raise OptionError(f"--rows {pattern!r} matches none of: {'; '.join(row.name for row in all_rows())}")
    return rows


class Results:
    """All that was measured, by choices and sparsity.

    `data` is what the JSON file holds; `command` and `date` in it are of the last run, `commands` all that measured.
    Raises `OptionError` if `file` holds something else, or results of another model, text, seed or device.
    """

    def __init__(self, facts: dict[str, Any], file: Path | None):
        self.data, self.file = facts | {"commands": [], "dense": None, "dense_evaluation": None, "results": []}, file
        if file is None or not file.exists():
            return
        try:
            earlier = json.loads(file.read_text(encoding="utf-8"))
            kept = {key: earlier[key] for key in (*SAME, "commands", "dense", "results")}
            kept["dense_evaluation"] = earlier.get("dense_evaluation")  # files of earlier versions have none
        except (ValueError, KeyError, TypeError) as error:
            raise OptionError(f"{file} is not a result of benchmarks/quality.py; give another --json") from error
        for key in SAME:
            if kept[key] != facts[key]:
                raise OptionError(
                    f"{file} holds results of another {key} ({_difference(kept[key], facts[key])}); "
                    "give another --json, or remove it"
                )
        self.data |= kept

    def find(self, row: Row, sparsity: float) -> dict[str, Any] | None:
        """What is known of a row at one budget."""
        same = (r for r in self.data["results"] if r["choices"] == row.choices and r["sparsity"] == sparsity)
        return next(same, None)

    def value(self, row: Row, sparsity: float, corpus: str) -> float | None:
        """Its perplexity, if there is one."""
        found = self.find(row, sparsity) or {}
        return found.get("perplexity", {}).get(corpus)

    def seconds(self, row: Row, sparsities: Sequence[float]) -> float | None:
        """The median over the budgets of the time that pruning took."""
        found = [self.find(row, sparsity) or {} for sparsity in sparsities]
        taken = [sum(result["seconds"].values()) for result in found if "seconds" in result]
        return statistics.median(taken) if taken else None

    def faster(self, row: Row, sparsities: Sequence[float]) -> float | None:
        """The median over the budgets of how many times as fast as the dense model a result is: by `bench`, or from the
        seconds on the evaluation windows.
        """
        found = [self.find(row, sparsity) or {} for sparsity in sparsities]
        if speeds := [result["speed"]["prefill"] for result in found if "speed" in result]:
            return statistics.median(speeds)
        times = [result["evaluation"] for result in found if "evaluation" in result]
        dense = self.data.get("dense_evaluation")
        return dense / statistics.median(times) if times and dense else None

    def add(self, row: Row, sparsity: float, result: dict[str, Any]) -> None:
        """Take in a result, in place of an earlier one, and write the file."""
        earlier = self.find(row, sparsity)
        self.data["results"] = [r for r in self.data["results"] if r is not earlier]
        origin = {name: self.data[name] for name in ("date", "code")}
        self.data["results"].append({"choices": row.choices, "sparsity": sparsity, **origin, **result})
        if self.data["command"] not in self.data["commands"]:
            self.data["commands"].append(self.data["command"])
        self.save()

    def save(self) -> None:
        if self.file is not None:
            write_json(self.file, self.data)


def _difference(earlier: Any, now: Any) -> str:
    """Where two facts differ first, as `seed 0, now 1`."""
    if not isinstance(earlier, dict) or not isinstance(now, dict):
        return f"{earlier}, now {now}"
    key = next(key for key in [*now, *earlier] if earlier.get(key) != now.get(key))
    return f"{key} {_difference(earlier.get(key), now.get(key))}"
