"""Seconds that something takes, on a device that may still work when Python has gone ahead."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def timed(action: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What `action` returns, and its seconds: CUDA events around it on a GPU, the wall clock elsewhere."""
    if device.type != "cuda":
        begin = time.perf_counter()
        result = action()
        return result, time.perf_counter() - begin
    with torch.cuda.device(device):  # events are recorded on the stream of the current device
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        start.record()
        result = action()
        end.record()
        torch.cuda.synchronize()
    return result, start.elapsed_time(end) / 1e3
