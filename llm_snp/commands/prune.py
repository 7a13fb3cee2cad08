"""`python -m llm_snp MODEL`: prune a model. One flag per field of `PruneConfig`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from ..config import PruneConfig
from ..dense.hub import find
from ..system.rank import alone, name_of_process
from .flags import add_flags, evaluated

HELP = "prune a language model in one shot and write the smaller one as a Hugging Face checkpoint"
METAVARS = {
    "output": "DIR",
    "round_to": "N",
    "samples": "N",
    "sequence_length": "T",
    "push_to_hub": "USER/NAME",
}


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The flags, with their help from `PruneConfig`."""
    model = PruneConfig.__dataclass_fields__["model"]
    p.add_argument("model", nargs="?", metavar="MODEL", help=model.metadata["help"])
    add_flags(p, PruneConfig, METAVARS, "measure no perplexity", but="model")
    p.add_argument("--dry-run", action="store_true", help="print the plan and what the run needs; load no weights")


def options_of(args: argparse.Namespace) -> PruneConfig:
    """What the flags say."""
    values: dict[str, Any] = {f.name: getattr(args, f.name) for f in dataclasses.fields(PruneConfig)}
    values["calibration"] = args.calibration and tuple(args.calibration)
    values["evaluate"] = evaluated(args)
    return PruneConfig(**values)


def check(args: argparse.Namespace) -> None:
    """Raise `SnpError` for options that cannot be used, or a local model that is not there."""
    options = options_of(args)
    options.validate()
    if alone():  # a process that ends before it has joined the others may have them wait for it
        find(options.model)


def main(args: argparse.Namespace) -> None:
    """Prune, or tell what pruning would do, and print it. Raises `SnpError`."""
    from ..documents.summary import summary
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
