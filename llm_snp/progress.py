"""What is going on, on standard error: phases, a bar over blocks with the time left, a line per finished block."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


class Progress:
    """Bars and lines, unless quiet; and the seconds that each phase took, always."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, steps: int | None = None, unit: str = "block") -> Iterator[Callable[[], None]]:
        """Time a phase; gives a function to call after each of its steps."""
        start = time.perf_counter()
        bar = tqdm(
            total=steps, desc=name, unit=unit, disable=self.quiet or steps is None, leave=False, dynamic_ncols=True
        )
        if steps is None:
            self.say(f"{name} ...")
        try:
            yield lambda: bar.update() and None
        finally:
            bar.close()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def say(self, line: str) -> None:
        """A line that does not tear the bar."""
        if not self.quiet:
            tqdm.write(line, file=_stderr())


def _stderr() -> object:
    import sys

    return sys.stderr
