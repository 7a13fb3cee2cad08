"""A run whose hidden states come and go beside the computation has the results of one that has them in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, save, tiny_opt
from simulated_streams import Machine, Simulated
from test_sensitivity import session_of
from torch import Tensor

from llm_snp.dense import stream
from llm_snp.dense.data import Windows
from llm_snp.evaluation.perplexity import perplexity_streamed
from llm_snp.pruning.decide import decide
from llm_snp.pruning.executor import prune_blocks


def results(directory: Path, folder: Path, moves: Callable[[Tensor, torch.device], Any]) -> dict[Any, Tensor]:
    """Everything that streams hidden states, with batches of two windows."""
    folder.mkdir()
    tokens = torch.randint(3, VOCABULARY, (9, 16), generator=torch.Generator().manual_seed(0))
    saved: dict[Any, Tensor] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "transfers", moves)
        patch.setitem(stream.BATCH_TOKENS, "cpu", 32)
        session = session_of(directory, tokens, folder, sparsity=0.4, method="best", damping="auto")
        prune_blocks(
            session, decide(session), lambda i, state, _: saved.update({f"{i}.{k}": v for k, v in state.items()})
        )
        windows = Windows(tokens, "text", "hash", len(tokens), tokens.numel())
        saved["perplexity"] = torch.tensor(perplexity_streamed(session.skeleton, windows, lambda: None).nll)
    return saved


@pytest.mark.parametrize("seed", range(3))
def test_a_run_has_the_same_results(tmp_path: Path, seed: int) -> None:
    directory = save(tiny_opt(), tmp_path / "dense")
    made: list[Simulated] = []

    def simulated(states: Tensor, device: torch.device) -> Simulated:
        made.append(Simulated(Machine(seed, at_once=True), own=False))
        return made[-1]

    expected = results(directory, tmp_path / "direct", lambda states, device: None)
    found = results(directory, tmp_path / "moved", simulated)
    assert len(made) == 4  # gradients, curves, pruning, perplexity
    assert all(transfers.sent > 0 for transfers in made)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
