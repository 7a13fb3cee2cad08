"""What is going on, on standard error: phases, a bar over blocks with the time left, a line per finished block."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from tqdm import tqdm


class Progress:
    """Bars and lines, unless quiet; and the seconds that each phase took, always."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, steps: int | None = None, title: str = "") -> Iterator[Callable[[], None]]:
        """Time a phase of `steps` blocks (None: not counted); gives a function to call after each block.

        Phases of one name add up; `title` is what the person sees instead.
        """
        start = time.perf_counter()
        hidden = self.quiet or steps is None
        bar = tqdm(total=steps, desc=title or name, unit="block", disable=hidden, leave=False, dynamic_ncols=True)
        if steps is None:
            self.say(f"{title or name} ...")
        try:
            yield partial(_advance, bar)
        finally:
            bar.close()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def say(self, line: str) -> None:
        """A line that does not tear the bar."""
        if not self.quiet:
            tqdm.write(line, file=sys.stderr)


def _advance(bar: tqdm) -> None:
    bar.update()
