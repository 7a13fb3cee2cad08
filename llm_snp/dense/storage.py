"""Where the hidden states of all windows live: on a GPU where they are small beside its memory, else in host memory,
pinned for it, or in a file in --offload DIR.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..errors import OptionError
from ..system.files import disk

# Hidden states of this many bytes stay on a GPU, if they are at most this share of its memory: a run has up to three of
# them. The 128 windows of 2048 tokens of opt-1.3b are 1.07 GB; those of opt-13b, 2.7 GB, go to the host.
STAYING = 3 << 29
SHARE = 32


def stays_on(gpu: torch.device, size: int) -> bool:
    """Whether hidden states of so many bytes stay on the GPU. One that is not there is taken to be large."""
    if size > STAYING or not torch.cuda.is_available():
        return size <= STAYING
    return SHARE * size <= torch.cuda.get_device_properties(gpu).total_memory


@dataclass(frozen=True)
class Storage:
    """offload: directory for memory-mapped files, None for memory; gpu: what computes, if it is not the CPU."""

    offload: Path | None = None
    gpu: torch.device | None = None

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, on the host unless it stays on the GPU (`stays_on`).

        Raises `DiskFullError` if the offload directory has no room for it.

        The file never has a name: whatever ends the process, nothing is left behind. Its blocks are reserved first,
        because a mapping that finds the disk full later dies without an error message.
        """
        size = prod(shape) * dtype.itemsize
        if self.offload is None or not size:
            if self.gpu is not None and stays_on(self.gpu, size):
                return torch.empty(shape, dtype=dtype, device=self.gpu)
            return torch.empty(shape, dtype=dtype, pin_memory=self.gpu is not None)
        with disk(self.offload), tempfile.TemporaryFile(prefix="llm-snp-", dir=self.offload) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:  # macOS cannot reserve
                file.truncate(size)
            mapped = mmap.mmap(file.fileno(), size)  # holds the file as long as the tensor lives
        return torch.frombuffer(mapped, dtype=dtype).view(shape)


def check_offload(directory: str | None) -> Path | None:
    """The --offload directory, which must be there and writable. Raises `OptionError` otherwise."""
    if directory is None:
        return None
    path = Path(os.path.expanduser(directory))
    if not os.path.isdir(path) or not os.access(path, os.W_OK):
        raise OptionError(f"--offload {directory} is no directory that can be written to; make it first")
    return path
