"""What a GPU would have to be told, and when it would have to answer: operations and values that are read back."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, save
from launches import is_read, is_view
from test_sensitivity import session_of
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from llm_snp.core import elimination
from llm_snp.dense import stream
from llm_snp.pruning.decide import decide
from llm_snp.pruning.executor import prune_blocks

BLOCKS, LENGTH = 2, 16
ELIMINATION, ENTERING = "elimination", "entering"


class Counted(TorchDispatchMode):
    """Kernels and values read back by part of the run; what only looks at a tensor in another way is neither."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.part = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_read(func):
            self.reads[self.part] += 1
        elif not is_view(func):
            self.kernels[self.part] += 1
        return func(*args, **(kwargs or {}))

    def within(self, part: str, call: Any) -> Any:
        """`call`, whose operations are counted as those of `part`."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.part = part
            try:
                return call(*args, **kwargs)
            finally:
                self.part = ""

        return counted


def tiny_llama(neurons: int, heads: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=neurons,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_hidden_layers=BLOCKS,
        max_position_embeddings=64,
        vocab_size=VOCABULARY,
    )
    return LlamaForCausalLM(config)


def counted(model: Any, folder: Path, windows: int) -> Counted:
    """A run of the decision and the pruning, with two windows at a time."""
    folder.mkdir()
    directory = save(model, folder / "dense")
    tokens = torch.randint(3, VOCABULARY, (windows, LENGTH), generator=torch.Generator().manual_seed(0))
    session = session_of(directory, tokens, folder, sparsity=0.4, method="best")
    counts = Counted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(stream.BATCH_TOKENS, "cpu", 2 * LENGTH)
        patch.setattr(elimination, "_eliminate", counts.within(ELIMINATION, elimination._eliminate))
        patch.setattr(stream.Stream, "__init__", counts.within(ENTERING, stream.Stream.__init__))
        with counts:
            prune_blocks(session, decide(session), lambda *_: None)
    return counts


def test_a_device_is_asked_per_site_and_told_per_batch(tmp_path: Path) -> None:
    """Reads do not grow with windows, neurons or heads; kernels outside the elimination grow with batches alone.

    transformers looks at the masks of every batch when a stream is made, and so do we: once for all blocks.
    """
    few = counted(tiny_llama(48, 4), tmp_path / "few", 8)
    windows = counted(tiny_llama(48, 4), tmp_path / "windows", 24)
    units = counted(tiny_llama(96, 4), tmp_path / "units", 8)
    heads = counted(tiny_llama(48, 8), tmp_path / "heads", 8)
    for more in (windows, units, heads):
        assert more.reads[""] <= few.reads[""] + 8  # whether a block loses anything differs
    assert few.reads[""] <= BLOCKS * 80
    assert few.reads[ELIMINATION] == 0
    assert (windows.reads[ENTERING] - few.reads[ENTERING]) / (2 * 8) < 8  # two passes, eight batches more
    per_batch = (windows.kernels[""] - few.kernels[""]) / (8 * BLOCKS)
    assert per_batch < 750  # eight times through a block, and its moments
    assert (few.kernels[""] - 4 * BLOCKS * per_batch) / BLOCKS < 1700
    assert units.kernels[""] < 1.1 * few.kernels[""]
