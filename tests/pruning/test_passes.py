"""How many passes through the model a run is worth: multiplications inside blocks, over those of one dense pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, save
from test_sensitivity import session_of
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from llm_snp.dense import skeleton, stream
from llm_snp.dense.taps import Taps
from llm_snp.pruning import calibrate, score_costs, sensitivity
from llm_snp.pruning.decide import decide
from llm_snp.pruning.executor import prune_blocks

BLOCKS, WINDOWS, LENGTH = 4, 16, 32


def passes(tmp_path: Path, **options: Any) -> float:
    """Multiplications in all blocks of a run of pruning over those of its windows through the dense blocks."""
    torch.manual_seed(0)
    config = LlamaConfig(  # the proportions of SmolLM2
        hidden_size=48,
        intermediate_size=128,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_hidden_layers=BLOCKS,
        max_position_embeddings=64,
        vocab_size=VOCABULARY,
    )
    directory = save(LlamaForCausalLM(config), tmp_path / "dense")
    tokens = torch.randint(3, VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    session = session_of(directory, tokens, tmp_path, **options)

    def multiplied(run: Any) -> int:
        own, found = skeleton.run_block, [0]

        def counted(*args: Any) -> Any:
            counter = FlopCounterMode(display=False)
            try:
                with counter:
                    return own(*args)
            finally:
                found[0] += counter.get_total_flops()

        with pytest.MonkeyPatch.context() as patch:
            for module in (stream, calibrate, score_costs, sensitivity):
                patch.setattr(module, "run_block", counted)
            # As small a part of the text as in a model of thirty blocks with 128 windows of 2048.
            patch.setitem(stream.BATCH_TOKENS, "cpu", LENGTH)
            patch.setattr(sensitivity, "gradient_windows", lambda samples, blocks: 1)
            patch.setattr(score_costs, "SCORE_TOKENS", LENGTH)
            run()
        return found[0]

    def once() -> None:
        through = session.stream()
        for i, state in session.skeleton.block_states(range(BLOCKS)):
            through.advance(i, session.skeleton.load_block(i, state))

    return multiplied(lambda: prune_blocks(session, decide(session), lambda *_: None)) / multiplied(once)


def test_passes_of_the_default(tmp_path: Path) -> None:
    """One to measure and one of the dense model to follow; the pruned one goes through whole once more."""
    assert passes(tmp_path, sparsity=0.3, method="best", attention="dims") < 4.5


def test_passes_of_the_papers_method(tmp_path: Path) -> None:
    assert passes(tmp_path, sparsity=0.3, method="snp") < 2.5


def test_a_block_ends_where_everything_is_seen() -> None:
    """The later layer does not run, the body of the `with` ends, and other exceptions pass."""
    block = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    x = torch.ones(1, 2)
    with Taps(block, inputs=["1"], outputs=["0"], stop=True) as taps:
        block(x)
        pytest.fail("the block went on")
    assert torch.equal(taps.input("1"), block[0](x))
    with Taps(block, inputs=["1"], outputs=["1"], stop=False) as taps:
        whole = block(x)
    assert torch.equal(taps.output("1"), whole)
    with pytest.raises(ZeroDivisionError), Taps(block, inputs=["0"], stop=True):
        raise ZeroDivisionError
    assert not block[0]._forward_pre_hooks
    assert not block[1]._forward_hooks
