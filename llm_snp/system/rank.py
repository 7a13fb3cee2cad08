"""Which process of a run this is, as its environment says: known before it has joined the others, and without torch."""

from __future__ import annotations

import os


def alone() -> bool:
    """Whether this is the only process of its run."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def name_of_process() -> str:
    """Which process this is where it is not the main one, empty for that."""
    index = "0" if alone() else os.environ.get("RANK", "0")
    return "" if index == "0" else f" (process {index})"
