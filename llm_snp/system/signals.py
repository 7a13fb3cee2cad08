"""Signals that ask a program to end, as those of batch systems and closed terminals: they end it as Ctrl-C does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..errors import Terminated
from .rank import alone

ENDING = (signal.SIGTERM, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise `Terminated`, a `KeyboardInterrupt`, for SIGTERM and SIGHUP, where they would end it without a word.

    What somebody else handles or ignores (`nohup`) stays so. Of several processes torchrun ends those that wait for
    one that is gone, where no handler of Python's would be called: there the signals end them at once, and `--resume`
    goes on all the same.
    """
    able = alone() and threading.current_thread() is threading.main_thread()
    ours = [number for number in ENDING if able and signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> None:
    raise Terminated(number)


def exit_code(error: BaseException | None) -> int:
    """128 and the number of the signal, as shells have it: 130 for Ctrl-C, 143 for SIGTERM."""
    while error is not None:
        if isinstance(error, Terminated):
            return 128 + int(error.args[0])
        error = error.__cause__
    return 128 + int(signal.SIGINT)
