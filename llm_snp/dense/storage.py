"""Where the hidden states of all windows live: host memory, pinned for a GPU, or a file in --offload DIR."""

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


@dataclass(frozen=True)
class Storage:
    """offload: directory for memory-mapped files, None for memory; pinned: page-locked, for copies to a GPU."""

    offload: Path | None = None
    pinned: bool = False

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised host tensor. Raises `DiskFullError` if the offload directory has no room for it.

        The file never has a name: whatever ends the process, nothing is left behind. Its blocks are reserved first,
        because a mapping that finds the disk full later dies without an error message.
        """
        size = prod(shape) * dtype.itemsize
        if self.offload is None or not size:
            return torch.empty(shape, dtype=dtype, pin_memory=self.pinned)
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
