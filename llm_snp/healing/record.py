"""What the report of a result says once it was healed: a section more, and nothing that is not true any more."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..documents.report import nodes, peak_host_bytes, versions
from ..documents.shareable import as_typed, told_apart
from ..evaluation.perplexity import Perplexity, perplexity_of
from ..system.device import device_facts
from ..system.private import public_name, public_text
from .options import HealConfig, command_line
from .pair import Pair
from .text import Material

# What else a report may have of the weights as they were before, and what that is.
STALE = {"overfit": "the over-fit to the calibration text", "harness": "tasks of lm-evaluation-harness"}
# What is known of a text: of the teacher, the student before, and the student after.
Measured = Mapping[str, Mapping[str, Perplexity]]


def healed(
    options: HealConfig,
    pair: Pair,
    material: Material,
    curve: list[dict[str, float]],
    after: dict[str, float],
    trained: dict[str, Any],
    measured: Measured,
    device: torch.device,
    processes: int,
) -> dict[str, Any]:
    """The section of one healing, with the last component of paths only.

    curve: of the held-out windows, from step 0 on; after: the same of the weights as they are written; trained: how
    much was, in how many steps and seconds.
    """
    public = _public(options, pair)
    count, length = material.train.tokens.shape
    return {
        "versions": versions(),
        "command": command_line(public, processes, nodes()),
        "options": public | {"learning_rate": options.rate(pair.student.config.get_text_config().hidden_size)},
        "device": device_facts(device, torch.float32) | {"processes": processes, "nodes": nodes()},
        "teacher": {"name": pair.teacher.name, "hub": pair.teacher.hub, "its_own": pair.its_own},
        "text": {
            "source": " and ".join(labels(part.source for part in material.train.parts or (material.train,))),
            "sha256": material.train.sha256,
            "windows": count,
            "held_out": len(material.held_out.tokens),
            "sequence_length": length,
            "passes": material.passes,
            "text_tokens": material.train.text_tokens,
        },
        **trained,
        "tokens": count * length * trained["steps"] // trained["steps_planned"],
        "held_out": {
            "before": _held_out(curve[0]),
            "after": _held_out(after),
            "teacher_perplexity": perplexity_of(curve[0]["teacher_nll"]),
        },
        "curve": [_held_out(entry) for entry in curve],
        "evaluation": {
            name: {which: found.perplexity for which, found in results.items()}
            for name, results in zip(labels(measured), measured.values(), strict=True)
        },
        "peak_memory": {
            "host_bytes": peak_host_bytes(),
            "device_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        },
    }


def with_healing(
    report: dict[str, Any], section: dict[str, Any], measured: Measured, missing: list[str], output: Path
) -> dict[str, Any]:
    """A report of a result, as that of the healed one: its own perplexities, and none of what it was before.

    missing: texts that the earlier report has and that were not measured again.
    """
    own, earlier = section["teacher"]["its_own"], report["evaluation"]
    evaluation: dict[str, Any] = {}
    for (source, results), name in zip(measured.items(), labels(measured), strict=True):
        after = dataclasses.asdict(results["after"])
        dense = dataclasses.asdict(results["teacher"]) if own else earlier.get(name, {}).get("dense")
        # Of the same tokens in the same windows; another text may have that name by now.
        if dense and all(dense.get(name) == after[name] for name in ("sha256", "windows", "sequence_length")):
            evaluation[source] = {"dense": dense, "pruned": after}
    gone = [f"perplexity on {name}" for name in missing] + [STALE[name] for name in STALE if report.get(name)]
    notes = [f"measured before the healing only, and left out: {', '.join(gone)}"] if gone else []
    return {name: value for name, value in report.items() if name not in STALE} | {
        "healing": [*report.get("healing", []), section],
        "evaluation": evaluation,
        "notes": [*report["notes"], *notes],
        "output": str(output),
    }


def label(source: str) -> str:
    """A text as others may see it: a corpus by its name, a file by the last component of its path."""
    return public_text(source)


def labels(sources: Iterable[str]) -> list[str]:
    """The same for several, of which no two are called alike, nor a file as a corpus of the Hub is."""
    sources = list(sources)
    return told_apart(map(label, sources), sources)


def _held_out(entry: Mapping[str, float]) -> dict[str, float]:
    values = {name: entry[name] for name in ("loss", "kl", "nll")}
    return {"step": int(entry["step"]), **values, "perplexity": perplexity_of(entry["nll"])}


def _public(options: HealConfig, pair: Pair) -> dict[str, Any]:
    """The options without places on this machine."""
    names = {"directory": pair.student.name, "output": public_name(options.destination)}
    texts = {"text": options.text, "evaluate": options.evaluate}
    found = dataclasses.asdict(options) | names | {"teacher": options.teacher and pair.teacher.name}
    typed = {name: value and [as_typed(label(one), one) for one in value] for name, value in texts.items()}
    return found | typed
