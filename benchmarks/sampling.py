"""What Python is doing in each phase of a run: the stack of the main thread, looked at every few milliseconds."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType

from launches import REST

import llm_snp
from llm_snp.core.stopwatch import Stopwatch

PERIOD = 0.005  # seconds
OURS = str(Path(llm_snp.__file__).parent)


def place(frame: FrameType | None) -> str:
    """The innermost function of llm_snp that a stack is in, and what it called outside, if anything."""
    called = ""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(OURS):
            own = f"{Path(code.co_filename).relative_to(OURS)}:{code.co_name}"
            return f"{own} > {called}" if called else own
        called = getattr(code, "co_qualname", code.co_name)  # from Python 3.11 on with its class
        frame = frame.f_back
    return "outside"


class Sampling(Stopwatch):
    """Seconds of each place in each phase while `with` is open.

    Work of a GPU counts where Python waits for it; with CUDA_LAUNCH_BLOCKING=1 in the environment that is where it was
    asked for.
    """

    def __enter__(self) -> Sampling:
        self.found: Counter[tuple[str, str]] = Counter()
        self._ended = threading.Event()
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[arg-type]
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        before = time.perf_counter()
        while not self._ended.wait(PERIOD):
            now = time.perf_counter()
            phase = self._stack[-1:] or [REST]
            self.found[phase[0], place(sys._current_frames().get(self._main))] += now - before  # type: ignore[assignment]
            before = now
