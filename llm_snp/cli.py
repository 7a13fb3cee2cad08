"""The command line: flags made from `PruneConfig`, one-line errors, exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from . import __version__
from .allocator import give_back_freed_memory
from .config import PruneConfig
from .errors import OptionError, SnpError

BAD_INPUT = 2
INTERRUPTED = 130
TYPES = {"sparsity": float, "samples": int, "sequence_length": int, "seed": int, "round_to": int}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence like all other errors, instead of the usage and an exit."""
        raise OptionError(f"{message}; see --help")


def parser() -> argparse.ArgumentParser:
    """One flag per field of `PruneConfig`."""
    p = _Parser(
        prog="python -m llm_snp",
        description="Prune a language model in one shot and write the smaller one as a Hugging Face checkpoint.",
        epilog="example: python -m llm_snp facebook/opt-1.3b --sparsity 0.3",
        allow_abbrev=False,
    )
    p.add_argument("--version", action="version", version=f"llm_snp {__version__}")
    for f in dataclasses.fields(PruneConfig):
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"].replace("%", "%%")
        if f.name == "model":
            p.add_argument("model", nargs="?", metavar="MODEL", help=text)
        elif f.name == "evaluate":
            p.add_argument(flag, action="append", metavar="TEXT", help=text)
            p.add_argument("--no-evaluate", action="store_true", help="measure no perplexity")
        elif isinstance(f.default, bool):
            p.add_argument(flag, action="store_true", help=text)
        else:
            shown = "" if f.default is None else f" (default: {f.default})"
            names = f": {', '.join(f.metadata['choices'])}" if f.metadata["choices"] else ""
            kind = _damping if f.name == "damping" else TYPES.get(f.name, str)
            p.add_argument(flag, type=kind, default=f.default, metavar=_metavar(f.name), help=text + names + shown)
    p.add_argument("--dry-run", action="store_true", help="print the plan and what the run needs; load no weights")
    return p


def _metavar(name: str) -> str:
    return {"output": "DIR", "calibration": "TEXT", "round_to": "N", "samples": "N", "sequence_length": "T"}.get(
        name, name.upper()
    )


def _damping(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def parse(arguments: Sequence[str] | None = None) -> tuple[PruneConfig, bool]:
    """Options, and whether it is a dry run. Raises `OptionError` for what cannot be parsed."""
    p = parser()
    args, unknown = p.parse_known_args(arguments)
    if unknown and unknown[0].startswith("-"):
        flags = [flag for action in p._actions for flag in action.option_strings]
        close = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
        raise OptionError(
            f"there is no option {unknown[0]}; " + (f"did you mean {close[0]}?" if close else "see --help")
        )
    if unknown:
        raise OptionError(f"{unknown[0]!r} is one argument too many, the model is {args.model!r}; see --help")
    values: dict[str, Any] = {f.name: getattr(args, f.name) for f in dataclasses.fields(PruneConfig)}
    values["evaluate"] = () if args.no_evaluate else args.evaluate and tuple(args.evaluate)
    return PruneConfig(**values), args.dry_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        options, dry_run = parse(arguments)
        options.validate()
        _calm_libraries(options.quiet or bool(_process()))
        give_back_freed_memory()
        from .preview import preview, preview_text
        from .report import summary
        from .run import run

        if dry_run:
            if not _process():
                print(preview_text(preview(options)))
        else:
            report = run(options)
            if not _process():
                print(summary(report))
    except SnpError as error:
        if not error.from_main:
            print(f"llm_snp{_process()}: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as error:
        # What is left behind only the main process knows.
        print(f"llm_snp{_process()}: {(not _process() and str(error)) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _process() -> str:
    """Which process speaks, where it is not the main one."""
    index = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else "0"
    return "" if index == "0" else f" (process {index})"


def _calm_libraries(quiet: bool) -> None:
    """No log lines of the libraries between ours; their bars only for downloads."""
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if quiet:
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        hub.disable_progress_bars()  # type: ignore[attr-defined]
