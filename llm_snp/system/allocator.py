"""Give the memory of freed tensors back to the system at once.

The C library of Linux learns to keep freed blocks of up to 32 MB, in case they are wanted again. Activations of every
size come and go here, and what it keeps would add half a gigabyte to the peak of a 1.3b model.
"""

from __future__ import annotations

import ctypes

# `M_MMAP_THRESHOLD` of malloc.h; setting it also ends the learning.
MMAP_THRESHOLD = -3
# Blocks of this size and more get pages of their own, which go back when they are freed.
OWN_PAGES = 4 << 20


def give_back_freed_memory() -> bool:
    """Set this process's allocator so; False where the C library has no such setting (macOS, Windows, musl)."""
    try:
        return bool(ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, OWN_PAGES))
    except (AttributeError, OSError, TypeError):
        return False
