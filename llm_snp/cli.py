"""The command line: finds the command, turns errors into one line and an exit code.

Light at the door: torch, transformers and what else takes seconds to import come when a command's `main` asks for them,
after its `check`. A command is a module with HELP, `add_arguments`, `check` and `main`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from logging import CRITICAL
from types import ModuleType
from typing import NoReturn

from . import __version__
from .errors import OptionError, SnpError, first_line
from .system.libraries import out_of_memory
from .system.plain import check_filled
from .system.progress import harmless, in_terminal, say
from .system.rank import name_of_process
from .system.signals import ended_by_signals, exit_code

BAD_INPUT = 2
PRUNE = "prune"
# What else can be done; a first argument that is none of these is a model to prune.
COMMANDS = ("heal", "push", "report", "bench", "export")
EXAMPLE = ("example: python -m llm_snp facebook/opt-1.3b --sparsity 0.3", "", "with the result:")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence like all other errors, instead of the usage and an exit."""
        raise OptionError(f"{message}; see --help")


def parser(name: str, command: ModuleType) -> argparse.ArgumentParser:
    """The parser of one command."""
    others = [f"  python -m llm_snp {other} --help" for other in COMMANDS]
    p = _Parser(
        prog="python -m llm_snp" + ("" if name == PRUNE else f" {name}"),
        description=f"{command.HELP[0].upper()}{command.HELP[1:]}.",
        epilog="\n".join([*EXAMPLE, *others]) if name == PRUNE else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--version", action="version", version=f"llm_snp {__version__}")
    command.add_arguments(p)
    return p


def parse(arguments: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """The command's module and what its flags say. Raises `OptionError` for what cannot be parsed."""
    _check_filled(arguments)
    name = arguments[0] if arguments and arguments[0] in COMMANDS else PRUNE
    command = importlib.import_module(f".commands.{name}", __package__)
    p = parser(name, command)
    args, unknown = p.parse_known_args(arguments if name == PRUNE else arguments[1:])
    flags = [text for text in unknown if text.startswith("-")]
    if flags:
        known = [flag for action in p._actions for flag in action.option_strings]
        close = difflib.get_close_matches(flags[0].split("=")[0], known, n=1)
        raise OptionError(f"there is no option {flags[0]}; " + (f"did you mean {close[0]}?" if close else "see --help"))
    if unknown:
        already = f", the model is {args.model!r}" if name == PRUNE else ""
        raise OptionError(f"{unknown[0]!r} is one argument too many{already}; see --help")
    return command, args


def _check_filled(arguments: Sequence[str]) -> None:
    """Raise `OptionError` for an empty argument, as of a variable that is not set: as a path it would be this place."""
    for before, given in zip(("", *arguments), arguments, strict=False):
        flag, sign, value = given.partition("=") if given.startswith("--") else ("", "=", given)
        if sign:
            check_filled(value, flag or (before if before.startswith("--") else "an argument"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    process = name_of_process()
    try:
        if sys.flags.optimize > 1:
            raise OptionError("python -OO (or PYTHONOPTIMIZE=2) leaves out what transformers needs; run it without")
        try:
            os.getcwd()
        except FileNotFoundError as error:
            raise OptionError("the working directory has been removed; change to another one") from error
        with ended_by_signals(), _printed():
            command, args = parse(sys.argv[1:] if arguments is None else arguments)
            command.check(args)
            _calm_libraries(getattr(args, "quiet", False) or bool(process))
            command.main(args)
    except SnpError as error:
        if not error.from_main:
            say(f"llm_snp{process}: {' '.join(str(error).split())}")
        return BAD_INPUT
    except KeyboardInterrupt as error:
        # What is left behind only the main process knows.
        say(f"llm_snp{process}: {(not process and str(error)) or 'interrupted'}")
        return exit_code(error)
    except Exception as error:
        if not out_of_memory(error):
            raise
        say(
            f"llm_snp{process}: this machine has no memory left for it ({first_line(error)}); end what else is "
            "running, or raise the limit (`ulimit -v`)"
        )
        return BAD_INPUT
    return 0


@contextmanager
def _printed() -> Iterator[None]:
    """Let out what a command prints at its end, when all is done: what becomes of it there can harm nothing.

    Without what a terminal obeys (`harmless`). A reader that is gone, as with `| head`, is left alone; any other reason
    is told.
    """
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            yield
    finally:
        try:
            if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be text
                sys.stdout.reconfigure(errors="backslashreplace")
            print(harmless(text.getvalue()), end="", flush=True)
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                say(f"llm_snp: what there was to print cannot be written ({error.strerror}); all else is done")
            # What is left in the buffer would be tried again at the end of this process.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _calm_libraries(quiet: bool) -> None:
    """No log lines of the libraries between ours; their bars only for downloads, and only in a terminal."""
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    _own_plots()
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    if not sys.warnoptions:  # nobody asked for them: beside one sentence they hide it
        warnings.simplefilter("ignore")
    bars = not (quiet or hub.are_progress_bars_disabled()) and in_terminal(sys.stderr)  # type: ignore[attr-defined]
    logging.disable_progress_bar()  # from transformers 5 on, those of the Hub as well
    # Their errors, too, which they raise as well: one quotes what a stranger's config says, ends of lines and all.
    logging.set_verbosity(CRITICAL)
    hub.logging.set_verbosity(CRITICAL)  # type: ignore[no-untyped-call]
    if bars:
        hub.enable_progress_bars()  # type: ignore[attr-defined]
    else:
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        hub.disable_progress_bars()  # type: ignore[attr-defined]


def _own_plots() -> None:
    """Plots go into files, whatever matplotlib is told to do with them.

    It reads `matplotlibrc` in the working directory, which may be a stranger's, when it is imported, and only then.
    """
    os.environ["MPLBACKEND"] = "agg"
    if os.path.lexists("matplotlibrc") and "matplotlib" not in sys.modules:
        here = os.getcwd()
        os.chdir(os.path.dirname(__file__))
        try:
            importlib.import_module("matplotlib")
        finally:
            os.chdir(here)
