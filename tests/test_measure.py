"""The measuring pass: what it looks at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BLOCKS, LENGTH, SAMPLES, Prune, load

from llm_snp import measure, score_costs, stream
from llm_snp.score_costs import Sample


@pytest.mark.parametrize("batch", [1, 5, SAMPLES])
@pytest.mark.parametrize("tokens", [3 * LENGTH, 7 * LENGTH, 1_000_000])
def test_scores_are_measured_on_the_input_of_their_own_block(
    prune: Prune, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, tokens: int
) -> None:
    """And on the same windows, however many of them the device takes at once."""
    monkeypatch.setitem(stream.BATCH_TOKENS, "cpu", batch * LENGTH)
    monkeypatch.setattr(score_costs, "SCORE_TOKENS", tokens)
    seen: list[torch.Tensor] = []
    windows: list[torch.Tensor] = []
    of_stream, costs = Sample.of_stream, score_costs.score_costs

    def keep_windows(stream: Any, index: int) -> Any:
        windows.append(stream.windows)
        return of_stream(stream, index)

    def keep_sample(*arguments: Any) -> torch.Tensor:
        sample = arguments[-2]
        parts = [hidden.flatten(0, 1)[:inside] for hidden, inside, _ in sample.batches]
        seen.append(torch.cat(parts))
        assert seen[-1].shape[0] == sample.of
        return costs(*arguments)

    monkeypatch.setattr(Sample, "of_stream", keep_windows)
    monkeypatch.setattr(measure, "score_costs", keep_sample)
    prune(dense, tmp_path / "out", attention="dims")
    expected = min(SAMPLES, tokens // LENGTH)
    with torch.no_grad():
        hidden = load(dense)(input_ids=windows[0][:expected], output_hidden_states=True).hidden_states
    assert len(seen) == BLOCKS
    for found, wanted in zip(seen, hidden[:BLOCKS], strict=True):
        torch.testing.assert_close(found, wanted.flatten(0, 1), rtol=1e-5, atol=1e-5)
