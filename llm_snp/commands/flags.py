"""Flags from the fields of a command's options: name, default, help and choices stand there."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from ..config import flag_of

TYPES = {"int": int, "float": float}


def add_flags(p: argparse.ArgumentParser, options: type, metavars: dict[str, str], none: str, but: str) -> None:
    """A flag for each field of `options` (see `config.option`) `but` the one that is no flag.

    metavars: field -> what stands for its value in the help, if not its name; none: help of --no-evaluate.
    """
    for f in dataclasses.fields(options):
        flag, text, kind = flag_of(f.name), f.metadata["help"].replace("%", "%%"), str(f.type).removesuffix(" | None")
        default = None if f.default is dataclasses.MISSING else f.default
        if f.name == but:
            continue
        if kind.startswith("tuple"):
            p.add_argument(flag, action="append", metavar="TEXT", help=text)
            if f.name == "evaluate":
                p.add_argument("--no-evaluate", action="store_true", help=none)
        elif kind == "bool":
            p.add_argument(flag, action="store_true", help=text)
        else:
            shown = "" if default is None else f" (default: {default})"
            names = f": {', '.join(f.metadata['choices'])}" if f.metadata["choices"] else ""
            read = _number_or_word if kind == "float | str" else TYPES.get(kind, str)
            metavar = metavars.get(f.name, f.name.upper())
            p.add_argument(flag, type=read, default=default, metavar=metavar, help=text + names + shown)


def expanded(text: str) -> Path:
    """A path with ~ for the home directory: a shell does not see it in --output=~/page.html."""
    return Path(os.path.expanduser(text))


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def evaluated(args: argparse.Namespace) -> Any:
    """What --evaluate and --no-evaluate come to."""
    return () if args.no_evaluate else args.evaluate and tuple(args.evaluate)
