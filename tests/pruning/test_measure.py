"""The measuring pass: what it looks at, and what it then takes of each block's attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BLOCKS, LENGTH, SAMPLES, Prune, load, save, tiny_opt
from tiny_models import save_tiny

from llm_snp.core.allocation import SiteCurve
from llm_snp.dense import stream
from llm_snp.errors import NumericalError
from llm_snp.families import ATTENTION, SCORES
from llm_snp.pruning import kinds, measure, score_costs
from llm_snp.pruning.score_costs import Sample


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


def test_scores_that_overflow_are_named(
    prune: Prune, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "score_costs", lambda *arguments: torch.tensor([0.0, torch.nan]))
    with pytest.raises(NumericalError, match="between query and key the attention of block 0 overflows"):
        prune(dense, tmp_path / "out", attention="dims")


def curve(unit: str, losses: list[float], cost: int, site: str = ATTENTION, least: int = 1) -> SiteCurve:
    """losses: of keeping 0, 1, ... units."""
    return SiteCurve(0, site, unit, len(losses) - 1, cost, loss=torch.tensor(losses, dtype=torch.float64), least=least)


def test_what_goes_of_an_attention_is_compared_at_the_same_number_of_parameters() -> None:
    heads = [curve("heads", [9.0, 4.0, 2.0, 1.0, 0.0], 60)]
    # Half of what the heads have: where 30 % of 240 parameters go, 72 of its 120 have to.
    values = [curve("values", [9.0, 6.0, 3.0, 1.5, 0.2, 0.0], 24)]
    assert kinds.least_loss(heads, 72) == pytest.approx(1.0 + 0.2 * (2.0 - 1.0))
    assert kinds.least_loss(values, 72) == pytest.approx(3.0)
    assert kinds.cheapest_kind([heads, values], 0.3) is heads
    assert kinds.cheapest_kind([heads, values], 0.1) is values  # 24 are one of its units: 0.2 against 0.4
    assert kinds.cheapest_kind([values], 0.9) is values


def test_two_kinds_of_directions_share_what_goes() -> None:
    values, pairs = [0.9, 0.5, 0.2, 0.1, 0.0], [8.0, 0.0, 0.0]
    curves = [curve("values", values, 10), curve("pairs", pairs, 20, SCORES)]
    assert kinds.least_loss(curves, 20) == pytest.approx(0.0)  # one of the pairs
    assert kinds.least_loss(curves, 40) == pytest.approx(0.2)  # and two of the values


def test_query_heads_give_only_what_leaves_one_for_each_key() -> None:
    heads = [curve("heads", [9.0, 5.0, 0.0], 60)]
    queries = [curve("queries", [9.0, 8.0, 0.2, 0.1, 0.0], 20, least=2)]
    assert kinds.cheapest_kind([heads, queries], 0.3) is queries
    assert kinds.cheapest_kind([heads, queries], 0.4) is heads  # 48 of 120, and they have only 40
    assert kinds.cheapest_kind([heads, queries], 0.9) is heads  # none can; heads give most


def test_what_is_due_of_an_attention_goes_before_what_it_loses() -> None:
    heads = [curve("heads", [9.0, 6.0, 4.0, 2.0, 0.0], 60)]
    values = [curve("values", [0.4, 0.3, 0.2, 0.1, 0.0], 30)]
    assert kinds.cheapest_kind([heads, values], 0.3, 80) is values
    assert kinds.cheapest_kind([heads, values], 0.3, 100) is heads
    assert kinds.cheapest_kind([heads, values], 0.3, 200) is heads  # none can


@pytest.mark.parametrize("cheap", ["heads", "dims"])
def test_each_attention_can_give_what_the_neurons_cannot(
    prune: Prune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cheap: str
) -> None:
    """All neurons stay here, so that half of the directions are too few, however cheap they are."""
    fields = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128}
    directory = save(tiny_opt(**fields), tmp_path / "dense")
    monkeypatch.setattr(kinds, "least_loss", lambda curves, amount: float(curves[0].unit != cheap))
    for share, units in ((0.35, "heads"), (0.2, cheap)):
        report = prune(directory, tmp_path / "out", share, attention="both", round_to=128, overwrite=True)
        assert abs(report["sparsity"]["achieved"] - share) < 0.04
        assert all(units in block for block in report["plan"]["kept"])


def test_query_heads_count_among_what_can_go(prune: Prune, tmp_path: Path) -> None:
    """Here they give more than key/value heads, of which one stays with all of its own, or directions."""
    directory = save_tiny("llama", tmp_path / "dense", num_key_value_heads=2, head_dim=8, intermediate_size=32)
    report = prune(directory, tmp_path / "out", 0.33, attention="both", round_to=32)
    assert all(0 < block["queries"] < 8 for block in report["plan"]["kept"])
    assert report["sparsity"]["achieved"] == pytest.approx(0.33, abs=0.03)
