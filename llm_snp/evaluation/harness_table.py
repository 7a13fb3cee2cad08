"""Results of tasks of the dense and the pruned model side by side: for the report, and as rows for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def compare(dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> dict[str, Any]:
    """Results of `evaluate_harness` joined, for the report: a metric is {"dense", "pruned", "higher_is_better"}.

    "dense" (missing if it was not measured) and "pruned" are {"value", "stderr"}.
    """
    joined = {}
    for task, found in pruned.items():
        before = dense.get(task, {}).get("metrics", {})
        metrics: dict[str, Any] = {}
        for name, after in found["metrics"].items():
            measured = {"dense": before.get(name), "pruned": after}
            metrics[name] = {
                which: {"value": result["value"], "stderr": result["stderr"]}
                for which, result in measured.items()
                if result
            }
            metrics[name]["higher_is_better"] = after["higher_is_better"]
        joined[task] = found | {"metrics": metrics}
    return joined


def harness_rows(harness: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Task and metric, dense, pruned, change, of what `compare` gave. Of a group only its own row.

    Shares (accuracy) change by points, all else by percent.
    """
    inner = {task for found in harness.values() for task in found.get("subtasks", ())}
    rows = []
    for task, found in harness.items():
        for metric, both in found["metrics"].items() if task not in inner else ():
            dense, pruned, change = both.get("dense"), both["pruned"], ""
            if dense:
                before, after = dense["value"], pruned["value"]
                if both["higher_is_better"] and 0 <= min(before, after) <= max(before, after) <= 1:
                    change = f"{100 * (after - before):+.1f} points"
                elif before:
                    change = f"{after / before - 1:+.1%}"
            rows.append((f"{task} {metric}", _shown(dense) if dense else "", _shown(pruned), change))
    return rows


def _shown(measured: Mapping[str, Any]) -> str:
    style = ".4f" if abs(measured["value"]) <= 1 else ",.2f"
    error = "" if measured["stderr"] is None else f" ± {measured['stderr']:{style}}"
    return f"{measured['value']:{style}}{error}"
