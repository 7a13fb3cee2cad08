"""What a device is told in each phase of a run, what it is asked, and for which share of the time it has nothing to do.

Phases are those of `llm_snp.core.stopwatch`, with `elimination` for the part of `order` that removes units one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import patch

from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import profile, record_function, supported_activities
from torch.utils._python_dispatch import TorchDispatchMode

from llm_snp.core import elimination
from llm_snp.core.stopwatch import Stopwatch, timed

# Operations whose result the host has to know before it goes on.
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_linalg_check_errors")
ELIMINATION = "elimination"
# What is in no phase.
REST = "rest"
PHASE = "phase: "
# Work of a device that is no computation.
COPIES = ("Memcpy", "Memset")


def is_read(func: Any) -> bool:
    """Whether the host has to know the result of an operation."""
    return func._schema.name.removeprefix("aten::") in READS


def is_view(func: Any) -> bool:
    """Whether an operation only looks at a tensor in another way, and launches nothing."""
    return any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)


class Launches(TorchDispatchMode, Stopwatch):
    """Kernels, values read back and eliminated units of each phase, while `with` is open; seconds are not to be used.

    Every operation of torch that makes or changes a tensor is taken for one kernel; what only looks at a tensor in
    another way is none. What Triton launches is not seen: on a GPU `Busy` counts all that runs.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        Stopwatch.__init__(self)
        self.kernels: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.units = 0

    def __enter__(self) -> Launches:
        self._eliminations = patch.object(elimination, "_eliminate", self._counted(elimination._eliminate))
        self._eliminations.start()
        Stopwatch.__enter__(self)
        TorchDispatchMode.__enter__(self)
        return self

    def __exit__(self, *error: Any) -> None:
        TorchDispatchMode.__exit__(self, *error)
        Stopwatch.__exit__(self, *error)
        self._eliminations.stop()

    def _counted(self, eliminate: Any) -> Any:
        def counted(*args: Any) -> Any:
            with timed(ELIMINATION):
                removed, increments = eliminate(*args)
            self.units += removed.numel()
            return removed, increments

        return counted

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        phase = self._stack[-1] if self._stack else REST
        if is_read(func):
            self.reads[phase] += 1
        elif not is_view(func):
            self.kernels[phase] += 1
        return func(*args, **(kwargs or {}))

    @property
    def found(self) -> dict[str, Any]:
        return {"kernels": dict(self.kernels), "reads": dict(self.reads), "units": self.units}


class Busy(Stopwatch):
    """Seconds of each phase, its kernels, and for how long at least one of them ran, by `torch.profiler`."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with super().phase(name), record_function(PHASE + name):
            yield

    def __enter__(self) -> Busy:
        self._profile = profile(activities=supported_activities())
        self._profile.__enter__()
        self._whole = record_function(PHASE + REST)
        self._whole.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._whole.__exit__(*error)
        self._profile.__exit__(*error)
        self.found = busy(*ranges(self._profile.events()))


Range = tuple[float, float]


def ranges(events: Iterable[Any]) -> tuple[list[tuple[str, Range]], list[Range]]:
    """The phases, and the kernels on a device, of a profiler's events: start and end in µs."""
    phases, kernels = [], []
    for event in events:
        when = (event.time_range.start, event.time_range.end)
        if event.name.startswith(PHASE):  # a device has it, too, from its first kernel to its last
            if event.device_type == DeviceType.CPU:
                phases.append((event.name.removeprefix(PHASE), when))
        elif event.device_type != DeviceType.CPU and not event.name.startswith(COPIES):
            kernels.append(when)
    return phases, kernels


def busy(phases: Sequence[tuple[str, Range]], kernels: Iterable[Range]) -> dict[str, dict[str, float]]:
    """Per phase: seconds, without those of phases within it; kernels that began in it; seconds with one running; idle.

    phases are nested or apart. Kernels at the same time count once. idle: the share of the seconds without any.
    """
    edges = sorted({edge for _, when in phases for edge in when})
    # Between two edges the phase that began last is on, and of those that began together the one that ends first.
    order = sorted(phases, key=lambda phase: (phase[1][0], -phase[1][1]))
    found: dict[str, dict[str, float]] = {}
    waiting = sorted(kernels)
    at, upto = 0, float("-inf")
    open_phases: list[tuple[str, Range]] = []
    coming = iter(order)
    following = next(coming, None)
    for start, end in pairwise(edges):
        while following is not None and following[1][0] <= start:
            open_phases.append(following)
            following = next(coming, None)
        open_phases = [phase for phase in open_phases if phase[1][1] > start]
        running, count = max(0.0, min(upto, end) - start), 0
        while at < len(waiting) and waiting[at][0] < end:
            began, ended = waiting[at]
            running += max(0.0, min(ended, end) - max(began, upto, start))
            count += began >= start
            upto, at = max(upto, ended), at + 1
        if not open_phases:
            continue
        here = found.setdefault(open_phases[-1][0], {"seconds": 0.0, "kernels": 0, "running": 0.0})
        here["seconds"] += (end - start) / 1e6
        here["running"] += running / 1e6
        here["kernels"] += count
    for here in found.values():
        here["idle"] = 1.0 - here["running"] / here["seconds"]
    return found
