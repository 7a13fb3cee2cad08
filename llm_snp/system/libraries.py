"""What libraries raise on files and settings that are not what they expect, as one sentence with its cause."""

from __future__ import annotations

import errno
import importlib
import json
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import SnpError

REASON = 200  # characters at most that an error quotes
NO_MEMORY = os.strerror(errno.ENOMEM)
# Libraries keep some settings for the whole process: transformers sets torch's default type while it builds a model,
# torch's random numbers are one sequence, which warnings are shown is one list. Whoever changes one holds this.
ONE_AT_A_TIME = threading.RLock()


@contextmanager
def explained(sentence: Callable[[str], SnpError], computing: bool = False) -> Iterator[None]:
    """Turn what a library raises inside into `sentence` of its reason, but for an `SnpError`, a GPU that is full, and
    a file that there is no memory left to map.

    For calls that read what strangers wrote or run their code, and for the documents of a finished result, which
    nothing may harm; for nothing else: a fault of ours in there would look like one of theirs. Which errors come out
    changes with a library's version, and tokenizers raises bare `Exception`.

    computing: whether memory that is missing is this machine's, and not what a file claims to need.
    """
    try:
        yield
    except SnpError:
        raise
    except BaseException as error:
        # torch's, which takes a second to import; and a library of Rust that panics, which is no Exception.
        name = type(error).__name__
        full = name == "OutOfMemoryError" or _unmapped(error) or (computing and out_of_memory(error))
        if full or not (isinstance(error, Exception) or name == "PanicException"):
            raise
        raise sentence(reason(error)) from error


@contextmanager
def silent(quiet: bool) -> Iterator[None]:
    """Without bars and warnings of transformers and the Hub's client, if `quiet`; afterwards they are as they were."""
    if not quiet:
        yield
        return
    from transformers.utils import logging

    bars = importlib.import_module("huggingface_hub.utils.tqdm")  # `from ... import` gives the class of that name
    level, shown, groups = logging.get_verbosity(), logging.is_progress_bar_enabled(), dict(bars.progress_bar_states)
    logging.set_verbosity_error()
    with warnings.catch_warnings():  # of a variable of the environment that says otherwise
        warnings.simplefilter("ignore")
        logging.disable_progress_bar()  # from transformers 5 on, those of the Hub as well
        bars.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
        bars.progress_bar_states.clear()
        bars.progress_bar_states.update(groups)


def out_of_memory(error: BaseException) -> bool:
    """Whether that is why it was raised, by Python, the system or torch: on the CPU as a RuntimeError like others."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, see `explained`
        return True
    said = NO_MEMORY in str(error) or "can't allocate memory" in str(error)
    return isinstance(error, (RuntimeError, OSError)) and said


def _unmapped(error: BaseException) -> bool:
    """Whether the system had no memory to map a file; for a tensor's size, which may only be claimed, torch asks."""
    mapped = isinstance(error, (MemoryError, OSError)) or "unable to mmap" in str(error)
    return mapped and NO_MEMORY in str(error)


def reason(error: BaseException) -> str:
    """What a library says, on one line and not at length; its kind where it says nothing, or only a value."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if isinstance(error, RecursionError):
        text = "it is nested too deeply"
    elif isinstance(error, (KeyError, AssertionError, MemoryError, ZeroDivisionError)) and str(error):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= REASON else text[: REASON - 4] + " ..."


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says. Raises `ValueError` for all that is none, also if it is nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
