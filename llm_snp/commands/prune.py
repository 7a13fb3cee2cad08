"""`python -m llm_snp MODEL`: prune a model. One flag per field of `PruneConfig`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from ..config import PruneConfig
from ..dense.hub import find
from ..system.rank import alone, name_of_process

HELP = "prune a language model in one shot and write the smaller one as a Hugging Face checkpoint"
TYPES = {"sparsity": float, "samples": int, "sequence_length": int, "seed": int, "round_to": int}
METAVARS = {
    "output": "DIR",
    "round_to": "N",
    "samples": "N",
    "sequence_length": "T",
    "push_to_hub": "USER/NAME",
}


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The flags, with their help from `PruneConfig`."""
    for f in dataclasses.fields(PruneConfig):
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"].replace("%", "%%")
        if f.name == "model":
            p.add_argument("model", nargs="?", metavar="MODEL", help=text)
        elif f.name in ("calibration", "evaluate"):
            p.add_argument(flag, action="append", metavar="TEXT", help=text)
            if f.name == "evaluate":
                p.add_argument("--no-evaluate", action="store_true", help="measure no perplexity")
        elif isinstance(f.default, bool):
            p.add_argument(flag, action="store_true", help=text)
        else:
            shown = "" if f.default is None else f" (default: {f.default})"
            names = f": {', '.join(f.metadata['choices'])}" if f.metadata["choices"] else ""
            kind = _damping if f.name == "damping" else TYPES.get(f.name, str)
            metavar = METAVARS.get(f.name, f.name.upper())
            p.add_argument(flag, type=kind, default=f.default, metavar=metavar, help=text + names + shown)
    p.add_argument("--dry-run", action="store_true", help="print the plan and what the run needs; load no weights")


def _damping(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def options_of(args: argparse.Namespace) -> PruneConfig:
    """What the flags say."""
    values: dict[str, Any] = {f.name: getattr(args, f.name) for f in dataclasses.fields(PruneConfig)}
    values["calibration"] = args.calibration and tuple(args.calibration)
    values["evaluate"] = () if args.no_evaluate else args.evaluate and tuple(args.evaluate)
    return PruneConfig(**values)


def check(args: argparse.Namespace) -> None:
    """Raise `SnpError` for options that cannot be used, or a local model that is not there."""
    options = options_of(args)
    options.validate()
    if alone():  # a process that ends before it has joined the others may have them wait for it
        find(options.model)


def main(args: argparse.Namespace) -> None:
    """Prune, or tell what pruning would do, and print it. Raises `SnpError`."""
    from ..documents.report import summary
    from ..running.preview import preview, preview_text
    from ..running.run import run
    from ..system.allocator import give_back_freed_memory

    options = options_of(args)
    give_back_freed_memory()
    if args.dry_run:
        if not name_of_process():
            print(preview_text(preview(options)))
        return
    report = run(options)
    if not name_of_process():
        print(summary(report))
