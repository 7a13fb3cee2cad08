"""benchmarks/peers.py: the search of a ratio, what is set once the package has cut, and a run with one made up."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peers
import pytest
import torch
from tiny_models import BLOCKS, NEURONS, save_tiny, tiny_model
from torch import nn

pytestmark = pytest.mark.cpu

TOKENS = torch.arange(3, 3 + peers.TRACED)[None]


def cut(layer: nn.Module, rows: Any = slice(None), columns: Any = slice(None)) -> None:
    """Keep these rows and columns."""
    layer.weight = nn.Parameter(layer.weight[rows][:, columns])
    layer.out_features, layer.in_features = layer.weight.shape


class Pruner:
    """What is asked of Torch-Pruning's, which takes the first units of each kind in place of the least important."""

    def __init__(self, model: Any, **options: Any):
        assert options["output_transform"](model(options["example_inputs"])).shape[:2] == (1, peers.TRACED)
        self.model, self.options = model, options

    def step(self) -> None:
        model, options = self.model, self.options

        def kept(width: int) -> slice:
            left = int(width * (1 - options["pruning_ratio"]))
            return slice(width - left + left % options["round_to"], None)

        whole = model.model.embed_tokens not in options["ignored_layers"]
        stream = kept(model.config.hidden_size) if whole else slice(None)
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            assert (attention in options["ignored_layers"]) != whole
            assert (mlp.up_proj.weight.grad is not None) == (options["importance"] == "Taylor")
            queries = slice(None)
            if whole:
                # One query head of each key head, whatever the ratio is.
                wide, keys = attention.q_proj.out_features, options["num_heads"][attention.k_proj]
                size = wide // options["num_heads"][attention.q_proj]
                queries = torch.arange(wide).view(keys, -1, size)[:, 1:].flatten()
            neurons = kept(mlp.up_proj.out_features)
            for layer, *at in (
                (attention.q_proj, queries, stream),
                (attention.k_proj, slice(None), stream),
                (attention.v_proj, slice(None), stream),
                (attention.o_proj, stream, queries),
                (mlp.gate_proj, neurons, stream),
                (mlp.up_proj, neurons, stream),
                (mlp.down_proj, stream, neurons),
            ):
                cut(layer, *at)
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight = nn.Parameter(norm.weight[stream])
        for outer in (model.model.embed_tokens, model.lm_head, model.model.norm):
            outer.weight = nn.Parameter(outer.weight[..., stream])


PACKAGE = SimpleNamespace(
    pruner=SimpleNamespace(BasePruner=Pruner),
    importance=SimpleNamespace(
        GroupMagnitudeImportance=lambda p, group_reduction: "magnitude", GroupTaylorImportance=lambda: "Taylor"
    ),
)


def test_the_nearest_share_is_found_where_it_has_steps() -> None:
    """On either side of what is asked, in a step as narrow as a neuron of 1536, and where it begins above that."""
    calls = []

    def steps(of: int, first: float = 0.0) -> Any:
        def removed(ratio: float) -> float:
            calls.append(ratio)
            return first + (1 - first) * int(of * ratio) / of

        return removed

    assert peers.nearest(steps(10), 0.32)[1] == pytest.approx(0.3)
    assert peers.nearest(steps(10), 0.38)[1] == pytest.approx(0.4)
    ratio, share = peers.nearest(steps(1536), 0.3)
    assert share == pytest.approx(461 / 1536)
    assert 461 <= 1536 * ratio < 462
    assert peers.nearest(steps(1536, first=0.4), 0.3)[1] == pytest.approx(0.4)
    assert len(calls) == 4 * 11
    assert not {0.0, 1.0} & set(calls)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_what_was_cut_can_be_run_and_the_model_stays_as_it_is(name: str, peer: peers.Peer) -> None:
    model = tiny_model(name, attn_implementation="eager")
    if peer.gradients:
        peers.take_gradients(model, TOKENS.expand(2, -1))
    before, base = model(TOKENS).logits, peers.linear_parameters(model)
    result = peers.pruned(PACKAGE, model, peer, 0.25, TOKENS)
    assert result(TOKENS).logits.shape == before.shape
    assert torch.equal(model(TOKENS).logits, before)
    assert peers.linear_parameters(model) == base
    config, tied = result.config, model.config.tie_word_embeddings
    assert config.intermediate_size == NEURONS * 3 // 4
    assert (config.num_attention_heads, config.hidden_size) == ((8, 32) if peer.neurons else (4, 24))
    assert (result.lm_head.weight is result.model.embed_tokens.weight) == tied
    if peer.neurons:
        size = model.config.hidden_size * NEURONS // 4
        assert base - peers.linear_parameters(result) == 3 * BLOCKS * size


def test_a_run_measures_every_row(
    text: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny("llama-tied", tmp_path / "model")
    save_tiny("opt", tmp_path / "opt")
    monkeypatch.setitem(sys.modules, "torch_pruning", PACKAGE)
    monkeypatch.setattr(peers, "version", lambda name: f"the {name} of the test")
    file, markdown = tmp_path / "peers.json", tmp_path / "peers.md"
    texts = ["--calibration", str(text), "--evaluate", str(held_out), "--device", "cpu"]
    more = ["--samples", "4", "--sequence-length", "32", "--own-text", "2", "--max-windows", "2", "--quiet"]
    files = ["--json", str(file), "--markdown", str(markdown)]
    assert peers.main([str(tmp_path / "model"), *texts, *more, *files]) == 0
    data = json.loads(file.read_text())
    assert data["versions"]["torch-pruning"] == "the torch-pruning of the test"
    assert set(data["dense"]) == {"calibration windows", "other windows of that text", held_out.name}
    assert list(data["rows"]) == [peer.name for peer in peers.PEERS]
    for row in data["rows"].values():
        assert row["achieved"] == pytest.approx(0.3, abs=0.06)
        assert set(row["perplexity"]) == set(data["dense"])
        assert f"| {row['achieved']:.1%} | {row['achieved_whole']:.1%} |" in markdown.read_text()
    assert "it repairs nothing" in capsys.readouterr().out
    for wrong, reason in (
        ([str(tmp_path / "model"), *texts, *more, "--sparsity", "1.5"], "--sparsity is 1.5"),
        ([str(tmp_path / "opt"), *texts, *more], "does not have the layers of Llama"),
    ):
        assert peers.main(wrong) == 2
        assert reason in capsys.readouterr().err


def test_without_the_package_one_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    assert peers.main(["model", "--calibration", "c4", "--evaluate", "c4"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("peers: Torch-Pruning cannot be imported (")
    assert captured.err.endswith("pip install --no-deps torch-pruning==1.6.1\n")
