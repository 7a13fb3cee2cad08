"""Options as callers have them (paths, numbers of numpy and torch, devices) as the plain types that JSON has."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import OptionError

SHOWN = 60  # characters at most that an error quotes


def check_filled(value: str, flag: str) -> None:
    """Raise `OptionError` for what is empty, as of a shell's variable that is not set."""
    if not value.strip():
        raise OptionError(f"{flag} is empty; give something, or leave it out")


def text(value: Any, flag: str) -> str:
    """A string from a string, a path, a `torch.device` or a `torch.dtype`.

    Raises `OptionError` for another type, for none at all, as of a shell's variable that is not set, and for what no
    document could name: a null character, or bytes of a file name that are no UTF-8 (which Python has as lone
    surrogates).
    """
    if type(value).__module__ == "torch" and type(value).__name__ in ("device", "dtype"):
        value = str(value).removeprefix("torch.")
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise _wrong(value, flag, "a text")
    check_filled(value, flag)
    plain = str(value)
    if not encodable(plain) or "\0" in plain:
        raise OptionError(f"{flag} is {plain!a}, which is no UTF-8 text: a result could not name it; rename it")
    return plain


def text_and_share(given: str) -> tuple[str, str | None]:
    """The parts of TEXT:SHARE; None for what has no number behind its last colon, which is part of a name then."""
    name, _, number = given.rpartition(":")
    try:
        float(number if name else "none")
    except ValueError:
        return given, None
    return name, number


def encodable(text: str) -> bool:
    """Whether a string can be written as UTF-8; lone surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def whole(value: Any, flag: str) -> int:
    """An int from anything that Python takes for an index, but no bool."""
    try:
        if not isinstance(value, bool):
            return int(operator.index(value))
    except (TypeError, ValueError, RuntimeError):  # numpy and torch have errors of their own for more than one number
        pass
    raise _wrong(value, flag, "a whole number")


def number(value: Any, flag: str) -> float:
    """A float from any real number, also of numpy, torch, `decimal` or `fractions`, but no bool and no text."""
    try:
        if not isinstance(value, (bool, str, bytes, bytearray)):
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise _wrong(value, flag, "a number")


def truth(value: Any, flag: str) -> bool:
    """A bool from what equals True or False: also 0 and 1, and numpy's."""
    try:
        if value in (True, False):
            return bool(value)
    except (TypeError, ValueError, RuntimeError):  # of what has more than one answer
        pass
    raise _wrong(value, flag, "True or False")


def texts(value: Any, flag: str) -> tuple[str, ...]:
    """A tuple of strings from several; a single one is no several."""
    if isinstance(value, (str, bytes, os.PathLike)):
        raise OptionError(f"{flag} is the one text {value!a}; give several, such as [{value!a}]")
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise _wrong(value, flag, "several texts")
    return tuple(text(one, flag) for one in value)


def _wrong(value: Any, flag: str, expected: str) -> OptionError:
    shown = " ".join(ascii(value).split())
    shown = shown if len(shown) <= SHOWN else shown[: SHOWN - 4] + " ..."
    return OptionError(f"{flag} is {shown}, of type {type(value).__name__}; it must be {expected}")
