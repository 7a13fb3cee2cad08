"""`python -m llm_snp heal DIR`: train a result on what its teacher predicts."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ..dense.hub import find
from ..healing.options import HealConfig
from ..system.manifest import expect_result
from ..system.rank import name_of_process
from .flags import add_flags, evaluated

HELP = "train a result for a short while to predict what its dense model predicts"


METAVARS = {
    "tokens": "N",
    "teacher": "MODEL",
    "output": "DIR2",
    "lora": "R",
    "learning_rate": "X",
    "batch": "N",
    "accumulate": "N",
    "sequence_length": "T",
    "text_loss": "W",
}


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The flags, with their help from `HealConfig`."""
    directory = HealConfig.__dataclass_fields__["directory"]
    p.add_argument("directory", metavar="DIR", help=directory.metadata["help"])
    add_flags(p, HealConfig, METAVARS, "measure it on held-out windows of --text only", but="directory")


def options_of(args: argparse.Namespace) -> HealConfig:
    """What the flags say. Raises `OptionError` for a value that is none of its kind."""
    values: dict[str, Any] = {name: value for name, value in vars(args).items() if name != "no_evaluate"}
    values["text"] = tuple(args.text or ())
    values["evaluate"] = evaluated(args)
    return HealConfig(**values)


def check(args: argparse.Namespace) -> None:
    """Raise `SnpError` for options that cannot be used, and for models that are not there."""
    expect_result(Path(os.path.expanduser(args.directory)))
    options_of(args).validate()
    if args.teacher is not None:
        find(args.teacher)


def main(args: argparse.Namespace) -> None:
    """Heal, and print what that came to. Raises `SnpError`."""
    from ..healing.run import heal

    lines = heal(options_of(args))
    if not name_of_process():
        print("\n".join(lines))
