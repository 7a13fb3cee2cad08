"""The next block's tensors are read while the caller works on this one, and no more than these."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

from llm_snp.dense.skeleton import Skeleton


def test_the_next_block_is_read_ahead() -> None:
    read = [threading.Event() for _ in range(4)]

    def block_state(index: int) -> dict[str, int]:
        read[index].set()
        return {"block": index}

    reader: Any = SimpleNamespace(block_state=block_state)
    for here, (index, state) in enumerate(Skeleton.block_states(reader, reversed(range(4)))):
        assert index == state["block"] == 3 - here
        assert index == 0 or read[index - 1].wait(timeout=60)  # without anybody asking for it
        assert not any(event.is_set() for event in read[: max(0, index - 1)])
