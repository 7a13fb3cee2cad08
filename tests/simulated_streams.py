"""CUDA streams without a device: queues that run in any order that the events allow."""

from __future__ import annotations

import random
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llm_snp.dense.transfers import Transfers

SIZE = 3  # numbers of a part of the machine's own memory


class Event:
    def __init__(self, line: Line | None = None):
        self.line, self.done = line, line is None


class Line:
    """A stream: what it was told, and has not done yet."""

    def __init__(self, machine: Machine, name: str):
        self.machine, self.name = machine, name
        self.todo: deque[Event | tuple[Event] | Callable[[], Any]] = deque()

    def tell(self, what: Any) -> None:
        self.todo.append(what)
        self.machine.some()

    def record_event(self) -> Event:
        event = Event(self)
        self.tell(event)
        return event

    def wait_event(self, event: Event) -> None:
        if f"{self.name} waits for event of {event.line.name if event.line else ''}" != self.machine.ignored:
            self.tell((event,))

    def wait_stream(self, other: Line) -> None:
        if f"{self.name} waits for {other.name}" != self.machine.ignored:
            self.tell((other.record_event(),))

    def synchronize(self) -> None:
        if f"host waits for {self.name}" != self.machine.ignored:
            while self.todo:
                self.machine.step()

    @property
    def ready(self) -> bool:
        return bool(self.todo) and not (isinstance(self.todo[0], tuple) and not self.todo[0][0].done)

    def step(self) -> None:
        first = self.todo.popleft()
        if isinstance(first, Event):
            first.done = True
        elif not isinstance(first, tuple):
            first()


class AtOnce(Line):
    """The stream that computes where torch itself computes, at once: what it waits for happens before."""

    def record_event(self) -> Event:
        return Event()

    def wait_event(self, event: Event) -> None:
        while not event.done:
            self.machine.step()


class Machine:
    """What `Transfers` asks of `torch.cuda`; memory that is free is handed out again at once, full of NaN before.

    ignored: a wait that does not take place.
    """

    def __init__(self, seed: int, ignored: str = "", at_once: bool = False):
        self.random, self.ignored = random.Random(seed), ignored
        self.computing = AtOnce(self, "compute") if at_once else Line(self, "compute")
        self.lines, self.free = [self.computing], list[Tensor]()

    def Stream(self, device: torch.device) -> Line:
        self.lines.append(Line(self, ("arriving", "leaving")[len(self.lines) % 2 - 1]))
        return self.lines[-1]

    def current_stream(self, device: torch.device) -> Line:
        return self.computing

    def step(self) -> None:
        self.random.choice([line for line in self.lines if line.ready]).step()

    def some(self) -> None:
        for _ in range(self.random.choice((0, 0, 0, 1, 5))):
            if any(line.ready for line in self.lines):
                self.step()

    def empty(self) -> Tensor:
        memory = self.free.pop() if self.free else torch.full((SIZE,), torch.nan)
        given = memory.detach()
        weakref.finalize(given, self.free.append, memory)
        return given

    def compute(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """function(x), in two steps with something in between that is free again when it has been told."""
        between, result = self.empty(), self.empty()
        a, b, c = x.detach(), between.detach(), result.detach()
        self.computing.tell(lambda: b.copy_(function(a)))
        self.computing.tell(lambda: c.copy_(b))
        self.computing.tell(lambda: b.fill_(torch.nan))
        return result


class Simulated(Transfers):
    """Transfers of a machine, whose copies are told to its lines; `own` memory is the machine's."""

    def __init__(self, machine: Machine, own: bool = True):
        super().__init__(torch.device("cpu"), machine)
        self.machine, self.own, self.sent = machine, own, 0

    def _empty(self, part: Tensor) -> Tensor:
        return self.machine.empty() if self.own else torch.full_like(part, torch.nan)

    def _copy(self, line: Line, into: Tensor, source: Tensor) -> None:
        a, b = into.detach(), source.detach()
        line.tell(lambda: a.copy_(b))
        self.sent += line.name == "leaving"
