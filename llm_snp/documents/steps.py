"""What a report says of the steps of `--method everything`, in the words that summary, card and page share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEAD = ("step", "without a layer", "CKA", "with fewer units: CKA", "taken", "CKA with the first model", "parameters")


def steps_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Lines of a table, as `HEAD` has them; empty where there was no such candidate."""
    rows: list[tuple[str, ...]] = []
    for number, step in enumerate(report.get("steps", []), 1):
        layer, units, taken = step["layer"], step["units"], step[step["taken"]]
        rows.append(
            (
                str(number),
                f"{layer['site']} of block {layer['block']}" if layer else "",
                f"{layer['to_parent']:.4f}" if layer else "",
                f"{units['to_parent']:.4f}" if units else "",
                step["taken"],
                f"{taken['to_dense']:.4f}",
                f"{-taken['parameters']:,}",
            )
        )
    return rows


def steps_lines(report: Mapping[str, Any]) -> list[str]:
    """`7, of which 2 took a layer; CKA of the hidden states with the dense model's 0.9731`, if there are any."""
    steps = report.get("steps", [])
    layers = sum(step["taken"] == "layer" for step in steps)
    return [f"{len(steps)}, of which {layers} took a layer; {_similarity(report)}"] if steps else []


def steps_sentences(report: Mapping[str, Any]) -> str:
    """How the candidates of a step were compared, and what the last one came to."""
    return (
        "Each step chose between two candidates of one size, one without a layer and one with fewer units: the one "
        "whose hidden states behind the final norm have the higher linear CKA with those of the model before the step, "
        f"on windows that no candidate was fitted to. After the last step: {_similarity(report)}. The model itself was "
        "then fitted to all windows. The loop is that of *Pruning Everything, Everywhere, All at Once* "
        "(arXiv 2506.04513), without its training between steps."
    )


def _similarity(report: Mapping[str, Any]) -> str:
    last = report["steps"][-1]
    first = "model's before" if "parents" in report else "dense model's"
    return f"CKA of the hidden states with the {first} {last[last['taken']]['to_dense']:.4f}"
