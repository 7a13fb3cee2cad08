"""What is going on, on standard error: phases, finished blocks, the time left.

A terminal has a bar. A log file or a pipe, where a bar would leave thousands of carriage returns, has a plain line for
every phase and every finished block.
"""

from __future__ import annotations

import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

LINES = 100  # of a phase in a log at most; with more blocks not all of them are told
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # not tabs and ends of lines
RECENT = 8  # steps whose mean the time left goes by: the first ones of a resumed run take no time


def harmless(text: str) -> str:
    """A text without what a terminal obeys: a name or a report may be a stranger's."""
    return CONTROL.sub("\ufffd", text)


def one_line(text: str) -> str:
    """The same on one line: what stands on others would look like words of ours."""
    return harmless(re.sub(r"[\n\u2028\u2029]", " ", text))


def say(line: str) -> None:
    """One line on standard error. Nothing depends on it: if nobody can read it, it is lost."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(one_line(line), file=sys.stderr, flush=True)


def in_terminal(stream: TextIO | None) -> bool:
    """Whether `stream` is a terminal; None is one that was closed from the beginning."""
    return stream is not None and stream.isatty()


class Progress:
    """Bars and lines, unless quiet; and the seconds that each phase took, always."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.seconds: dict[str, float] = {}
        self._steps: _Steps | None = None

    @contextmanager
    def phase(
        self, name: str, steps: int | None = None, title: str = "", unit: str = "block"
    ) -> Iterator[Callable[[], None]]:
        """Time a phase of `steps` blocks (None: not counted); gives a function to call after each block.

        Phases of one name add up; `title` is what the person sees instead, and `unit` what else is counted.
        """
        start, title = time.perf_counter(), one_line(title or name)
        try:
            with self._counted(steps, title, unit) as step:
                yield step
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def _counted(self, steps: int | None, title: str, unit: str) -> Iterator[Callable[[], None]]:
        if steps is not None and not self.quiet and in_terminal(sys.stderr):
            from tqdm import tqdm

            with tqdm(total=steps, desc=title, unit=unit, leave=False, dynamic_ncols=True) as bar:
                yield partial(_advance, bar)
            return
        self.say(f"{title} ...")
        if steps is None or self.quiet:
            yield _nothing
            return
        self._steps = _Steps(title, steps, unit)
        try:
            yield partial(self._step, self._steps)
        finally:
            self._steps = None

    def say(self, line: str) -> None:
        """A line that does not tear the bar."""
        if self.quiet:
            return
        if in_terminal(sys.stderr):
            from tqdm import tqdm

            with suppress(OSError):  # the terminal is gone
                tqdm.write(one_line(line), file=sys.stderr)
        else:
            say(line)

    def finished(self, line: str) -> None:
        """A line about the block that is about to be counted; where there is no bar it is the only one about it."""
        if self._steps is not None:
            self._steps.told = True
            line += self._steps.left()
        self.say(line)

    def _step(self, steps: _Steps) -> None:
        """Where there is no bar: count a step, and say so unless that was done."""
        if not steps.told and steps.telling:
            self.say(f"{steps.title}: {steps.unit} {steps.done + 1}/{steps.count}{steps.left()}")
        steps.next()


def _advance(bar: tqdm) -> None:
    bar.update()


def _nothing() -> None:
    pass


class _Steps:
    """Where a counted phase is."""

    def __init__(self, title: str, count: int, unit: str):
        self.title, self.count, self.unit = title, count, unit
        self.done, self.told = 0, False
        self._since = time.perf_counter()
        self._seconds: deque[float] = deque(maxlen=RECENT)

    @property
    def telling(self) -> bool:
        """Whether the step that is ending now is one of the `LINES` that are told."""
        return (self.done + 1) * LINES // self.count > self.done * LINES // self.count

    def left(self) -> str:
        """The time left after the step that is ending now, as it is said at the end of a line."""
        seconds = fmean([*self._seconds, time.perf_counter() - self._since])
        remaining = self.count - self.done - 1
        return f"  ({timedelta(seconds=round(seconds * remaining))} left)" if remaining > 0 else ""

    def next(self) -> None:
        now = time.perf_counter()
        self._seconds.append(now - self._since)
        self._since, self.told = now, False
        self.done += 1
