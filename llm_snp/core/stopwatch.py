"""Where the time of a run goes, for whoever wants to know: nothing is measured unless a `Stopwatch` is running."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType

import torch

_running: ContextVar[Stopwatch | None] = ContextVar("stopwatch", default=None)


class Stopwatch:
    """Seconds per phase while `with Stopwatch() as watch` is open; a phase within another counts for itself only.

    A GPU works on while Python goes ahead: with CUDA every boundary waits for it, which costs a little time itself.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stack: list[str] = []
        self._since = 0.0

    def __enter__(self) -> Stopwatch:
        self._token = _running.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        _running.reset(self._token)

    def _turn(self) -> None:
        """Give the time since the last boundary to the phase that was on."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] = self.seconds.get(self._stack[-1], 0.0) + now - self._since
        self._since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._turn()
        self._stack.append(name)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()


@contextmanager
def timed(phase: str) -> Iterator[None]:
    """Mark what happens inside, as a context or a decorator, as a phase for the stopwatch that is running, if any."""
    watch = _running.get()
    if watch is None:
        yield
    else:
        with watch.phase(phase):
            yield
