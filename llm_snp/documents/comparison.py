"""The dense and the pruned model beside each other, from report.json alone; and numbers as a person reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))


@dataclass(frozen=True)
class Comparison:
    """A quantity of both models, as text.

    change: `-21.2%`; ratio: pruned over dense; error: standard error of the ratio's numerator, in the same unit. Empty
    or None where dense is zero (or negative), or nothing is known.
    """

    label: str
    dense: str
    pruned: str
    change: str
    ratio: float | None
    error: float | None


def comparisons(report: dict[str, Any]) -> dict[str, list[Comparison]]:
    """What is known of both models, by group; a group that has nothing is not there."""
    model, speed = report["model"], report.get("speed", {})
    size = [
        _comparison("parameters", model["parameters"], model["parameters_pruned"], scaled(model["parameters"])),
        _comparison("size on disk", model["bytes"], model["bytes_pruned"], scaled(model["bytes"], "B")),
    ]
    time = []
    if "dense" in speed:
        dense, pruned = speed["dense"], speed["pruned"]
        size.append(
            _comparison(
                "KV cache", dense["kv_cache_bytes"], pruned["kv_cache_bytes"], scaled(dense["kv_cache_bytes"], "B")
            )
        )
        for label, key in (("prefill", "prefill_seconds"), ("decode, per token", "decode_seconds_per_token")):
            time.append(_comparison(label, dense[key], pruned[key], scaled(dense[key], "s")))
    perplexity = [
        _comparison(Path(source).name, found["dense"]["perplexity"], found["pruned"]["perplexity"], "{:,.2f}".format)
        for source, found in report["evaluation"].items()
    ]
    tasks = [
        _comparison(
            f"{Path(task).name} {metric}",
            both["dense"]["value"],
            both["pruned"]["value"],
            "{:.3f}".format,
            both["pruned"]["stderr"],
        )
        for task, result in report.get("harness", {}).items()
        for metric, both in result["metrics"].items()
        if "dense" in both
    ]
    groups = {
        "size": size,
        "perplexity (less is better)": perplexity,
        "time (less is better)": time,
        "tasks": tasks,
    }
    return {group: rows for group, rows in groups.items() if rows}


def _comparison(
    label: str, dense: float, pruned: float, text: Callable[[float], str], error: float | None = None
) -> Comparison:
    if dense <= 0:
        return Comparison(label, text(dense), text(pruned), "", None, None)
    ratio = pruned / dense
    return Comparison(
        label, text(dense), text(pruned), f"{ratio - 1:+.1%}", ratio, None if error is None else error / dense
    )


def scaled(reference: float, unit: str = "") -> Callable[[float], str]:
    """How to write numbers of about the size of `reference`, all with its prefix: `1.12 M` beside `0.88 M`.

    Without a unit they are counts, of which 10⁹ are a `B`.
    """
    scale, prefix = next((entry for entry in PREFIXES if reference >= entry[0]), PREFIXES[-1])
    ending = f"{prefix}{unit}" if unit else prefix.replace("G", "B")
    return lambda value: f"{value / scale:,.2f} {ending}".rstrip()


def duration(seconds: float) -> str:
    """`0.05 s`, `12.3 s`, `4 min 05 s`, `3 h 20 min`"""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
