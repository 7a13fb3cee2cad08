"""The errors a user can meet. Each message says what was found, what was expected and what to do.

The command line prints the message as one line and exits with code 2; Python callers catch `SnpError` or a
subclass. Anything else that escapes is a bug in llm_snp and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SnpError(Exception):
    """Base of every error that has its cause outside llm_snp."""

    from_main = False  # whether it was raised on the main process, which says it, and sent to this one


class OptionError(SnpError):
    """An option has a value that cannot be used."""


class CheckpointError(SnpError):
    """The checkpoint is missing, incomplete, damaged or not what its config says."""


class UnsupportedModelError(SnpError):
    """The checkpoint is sound, but llm_snp cannot prune this kind of model."""


class CorpusError(SnpError):
    """Calibration or evaluation text is missing, unreadable or too short."""


class OutputError(SnpError):
    """The result cannot be written where it was asked for."""


class ReplacedError(OutputError):
    """A result was moved, or another one took its place, while it was measured, drawn or published."""


class DiskFullError(OutputError):
    """The disk has no room for the result, or for what is offloaded."""


class ResumeError(SnpError):
    """An interrupted run cannot be gone on with as it was asked for."""


class ProcessError(SnpError):
    """Another process of this run has ended."""


class DeviceMemoryError(SnpError):
    """The device has less memory than the run needs."""


class NumericalError(SnpError):
    """Activations or moments that no damping can rescue (overflow, NaN)."""


class HubError(SnpError):
    """The Hugging Face Hub could not be reached or refused."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a sentence on what is left and how to go on."""


class Terminated(KeyboardInterrupt):
    """A signal that asks the program to end (SIGTERM, SIGHUP): it ends as with Ctrl-C. Its number is the argument."""

    def __str__(self) -> str:
        return ""


# Once their cause is gone the same command can go on: what it had finished is kept.
RESUMABLE = (OutputError, CheckpointError, ProcessError, DeviceMemoryError)


def first_line(error: BaseException) -> str:
    """What a library says went wrong, on one line; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def at_least(value: int, least: int, what: str) -> None:
    """Raise `OptionError` if `value` is below `least`."""
    if value < least:
        raise OptionError(f"{what} is {value}; it must be at least {least}")


def choose(value: str, known: Iterable[str], what: str) -> str:
    """Return `value` if it is one of `known`; otherwise raise `OptionError` that lists them and guesses."""
    names = list(known)
    if value in names:
        return value
    close = difflib.get_close_matches(value, names, n=1)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    raise OptionError(f"{what} {value!r} is not known; choose one of {', '.join(names)}.{guess}")
