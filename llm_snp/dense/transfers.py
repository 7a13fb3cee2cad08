"""Copies between host memory and a GPU that overlap with what the GPU computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


class Transfers:
    """Brings parts of a tensor of the host to a GPU and sends results back, on a CUDA stream for each direction.

    The next part comes in, and the last result goes out, while the GPU computes on this part. The host waits for
    neither until it asks for `settle`. For the copies to overlap, host memory must be pinned; other memory will do.

    All memory on the GPU belongs to the stream that computes, and events order the copies against it: a part comes in
    when what was computed before the last part is done, a result is gone when the next one has been computed. So the
    allocator may hand out memory in the order of that one stream, as if nothing overlapped, and never more than one
    part and one result more are alive. `record_stream` would let it do that only when the host sees a copy done: a
    host that tells the GPU of all parts in advance would fill its memory with them.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda):
        """cuda: what has the streams, `torch.cuda` but in tests."""
        self._device, self._cuda = device, cuda
        self._arriving, self._leaving = cuda.Stream(device), cuda.Stream(device)
        self._sent: tuple[Tensor, Any] | None = None  # the last result, and the event of its copy

    def bring(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """Each part on the GPU, for work on the current stream; the next one is on its way meanwhile.

        What `send` writes may be a part that was brought already, not one that is still to come.
        """
        computing = self._cuda.current_stream(self._device)
        self._arriving.wait_stream(self._leaving)  # parts may be what was sent before
        waiting = iter(parts)
        following = self._begin(next(waiting, None))
        try:
            while following is not None:
                (here, arrived), following = following, self._begin(next(waiting, None))
                computing.wait_event(arrived)
                yield here
                del here
        finally:
            computing.wait_stream(self._arriving)  # one that nobody waits for any more: its memory is free now

    def _begin(self, part: Tensor | None) -> tuple[Tensor, Any] | None:
        """Let a part come in: where it will be, and the event of its being there."""
        if part is None:
            return None
        there = self._empty(part)
        self._arriving.wait_stream(self._cuda.current_stream(self._device))  # has had this memory before
        self._copy(self._arriving, there, part)
        return there, self._arriving.record_event()

    def send(self, result: Tensor, part: Tensor) -> None:
        """Copy a result of the current stream to a part of host memory; it must not be changed any more."""
        computing = self._cuda.current_stream(self._device)
        self._leaving.wait_stream(computing)
        self._copy(self._leaving, part, result)
        if self._sent is not None:
            computing.wait_event(self._sent[1])
        self._sent = result, self._leaving.record_event()  # holds the memory until then

    def settle(self) -> None:
        """Wait until the host may read and write its memory."""
        self._arriving.synchronize()
        self._leaving.synchronize()
        self._sent = None

    def _empty(self, part: Tensor) -> Tensor:
        return torch.empty_like(part, device=self._device)

    def _copy(self, stream: Any, into: Tensor, source: Tensor) -> None:
        with self._cuda.stream(stream):
            into.copy_(source, non_blocking=True)
