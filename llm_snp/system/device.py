"""What is computed on, and in which type."""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ..errors import OptionError

_TURN = threading.RLock()


def resolve_device(name: str, local_index: int = 0) -> torch.device:
    """`auto` and `cuda` are the CUDA device of that index, `auto` is the CPU if there is none.

    Raises `OptionError` for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_index:
        name = f"cuda:{local_index}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"--device {name!r} is no device; give auto, cpu, cuda or cuda:0") from error
    if device.type == "cpu":
        if device.index:
            raise OptionError(f"--device {name} was asked for, but there is one CPU device; use --device cpu")
        return torch.device("cpu")  # tensors on it do not say cpu:0
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if found <= (device.index or 0):
            raise OptionError(f"--device {name} was asked for, but torch sees {found} CUDA devices; use --device cpu")
    return device


def resolve_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """`auto` computes in the checkpoint's type on a GPU and in float32 on the CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" or stored == torch.float64 else stored
    return getattr(torch, name)  # type: ignore[no-any-return]


@contextmanager
def as_at_start() -> Iterator[None]:
    """A run's turn, with torch as a program finds it: gradients, no inference mode, no autocast, tensors on the CPU.

    Those are settings of the thread. Others, torch's default type and its random numbers, are the process's, and
    transformers changes them while it builds a model: so runs in several threads take turns.
    """
    with ExitStack() as stack:
        stack.enter_context(_TURN)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":  # only then: it makes every call a little slower
            stack.enter_context(torch.device("cpu"))
        yield


def device_facts(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What was computed on, and in which type."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return {"name": name, "type": device.type, "dtype": dtype_name(dtype), "threads": torch.get_num_threads()}


def dtype_name(dtype: torch.dtype) -> str:
    """Without `torch.`"""
    return str(dtype).removeprefix("torch.")
