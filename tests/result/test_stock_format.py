"""`--format stock`: a pruned model that needs no code of its own; and `--attention none`, of which it makes use.

`--format blockwise`: whole heads and neurons, of which every block has its own number.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import BLOCKS, HEADS, HIDDEN, NEURONS, Prune, Shell, load, logits
from transformers import OPTForCausalLM

ATTENTION = 4 * (HIDDEN * HIDDEN + HIDDEN)
NEURON = 2 * HIDDEN + 1  # a row and its bias, a column
MLP = NEURONS * NEURON + HIDDEN


def test_the_result_is_a_stock_checkpoint(prune: Prune, dense: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    report = prune(dense, tmp_path / "out", 0.2, format="stock")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "opt"
    assert config["architectures"] == ["OPTForCausalLM"]
    assert "auto_map" not in config
    assert not list((tmp_path / "out").glob("*.py"))
    assert report["model"]["custom_code"] is False
    assert {str(kept) for kept in report["plan"]["kept"]} == {f"{{'neurons': {config['ffn_dim']}}}"}
    assert report["sparsity"]["achieved"] == pytest.approx(0.2, abs=0.5 * NEURON / (ATTENTION + MLP))
    model = OPTForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(logits(model, ids)).all()
    assert model.model.decoder.layers[0].fc1.out_features == config["ffn_dim"] < NEURONS


def test_it_names_its_class_and_not_what_the_dense_model_names(prune: Prune, dense: Path, tmp_path: Path) -> None:
    """A place on somebody's machine, say, with which the result could not be published."""
    model = Path(shutil.copytree(dense, tmp_path / "model"))
    fields = json.loads((model / "config.json").read_text()) | {"architectures": ["/scratch/ann/project/OPT"]}
    (model / "config.json").write_text(json.dumps(fields))
    prune(model, tmp_path / "out", 0.2, format="stock")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["OPTForCausalLM"]


def test_it_repairs_no_worse_than_it_must(prune: Prune, dense: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    reference = logits(load(dense), ids)
    error = {}
    for target in ("residual", "none"):
        prune(dense, tmp_path / target, 0.25, format="stock", target=target)
        error[target] = (logits(load(tmp_path / target), ids) - reference).square().mean().item()
    assert error["residual"] < 0.7 * error["none"]


def test_the_attention_is_left_as_it_is(prune: Prune, dense: Path, tmp_path: Path) -> None:
    report = prune(dense, tmp_path / "out", 0.2, attention="none")
    before, after = load(dense).state_dict(), load(tmp_path / "out").state_dict()
    for name, tensor in before.items():
        if "self_attn" in name or "norm" in name or "embed" in name:
            assert torch.equal(after[name], tensor), name
    assert [set(block) for block in report["blocks"]] == [{"block", "mlp"}] * BLOCKS
    assert len({kept["neurons"] for kept in report["plan"]["kept"]}) > 1  # `loss` gives every block its own width
    assert report["model"]["custom_code"] is True
    assert report["sparsity"]["achieved"] == pytest.approx(0.2, abs=NEURON / (BLOCKS * (ATTENTION + MLP)))


def test_auto_writes_a_stock_checkpoint_where_that_can_express_it(prune: Prune, dense: Path, tmp_path: Path) -> None:
    sparsity = 16 * NEURON / (ATTENTION + MLP)
    report = prune(dense, tmp_path / "out", sparsity, attention="none", allocation="uniform")
    assert report["options"]["format"] == "auto"
    assert report["model"]["custom_code"] is False
    assert json.loads((tmp_path / "out" / "config.json").read_text())["ffn_dim"] == NEURONS - 16


def test_what_is_printed_asks_for_no_trust(shell: Shell, dense: Path) -> None:
    code, out, err = shell.prune(dense, "--format", "stock", "--sparsity", "0.2", "--round-to", "8")
    assert code == 0, err
    assert f"load it  AutoModelForCausalLM.from_pretrained('{shell.output}')\n" in out
    assert json.loads((shell.output / "config.json").read_text())["ffn_dim"] % 8 == 0
    assert "trust_remote_code" not in (shell.output / "README.md").read_text()


def test_the_plan_is_known_without_weights(shell: Shell, dense: Path) -> None:
    code, out, _ = shell.run(dense, "--dry-run", "--format", "stock", "--sparsity", "0.2")
    assert code == 0
    assert "allocation uniform, target residual, attention none" in out
    assert "measuring pass" not in out
    blocks = [line.split(None, 2)[2] for line in out.splitlines() if line.startswith("block")]
    assert len(blocks) == BLOCKS
    assert len(set(blocks)) == 1


@pytest.mark.parametrize("mode", ["heads", "dims", "both"])
def test_smaller_attention_is_refused(shell: Shell, dense: Path, mode: str) -> None:
    message = shell.refused(dense, "--format", "stock", "--attention", mode)
    assert message.startswith(f"--format stock and --attention {mode} exclude each other: the stock class of")
    assert message.endswith("leave one of them out, or give --attention none")


def test_widths_by_measured_loss_are_refused(shell: Shell, dense: Path) -> None:
    message = shell.refused(dense, "--format", "stock", "--allocation", "loss")
    assert "--format stock and --allocation loss exclude each other" in message


@pytest.mark.parametrize(
    ("flags", "named"), [(("--format", "stock"), "--format stock"), (("--attention", "none"), "--attention none")]
)
def test_more_than_the_neurons_can_give_is_refused_early(
    shell: Shell, dense: Path, flags: tuple[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_snp.running.run._Run._read_text", None)  # is not reached
    most = (NEURONS - 1) * NEURON / (ATTENTION + MLP)
    message = shell.refused(dense, *flags, "--sparsity", "0.9")
    assert f"at most {int(1000 * most) / 1000:g} can be removed from this model with {named}" in message


def test_with_the_papers_method(prune: Prune, dense: Path, tmp_path: Path) -> None:
    report = prune(dense, tmp_path / "out", 0.1, method="snp", format="stock")
    assert report["options"]["order"] == "zca"
    assert report["options"]["target"] == "self"
    assert not report["model"]["custom_code"]


def test_nothing_to_remove(prune: Prune, dense: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    report = prune(dense, tmp_path / "out", 0.0, format="stock")
    assert report["plan"]["kept"] == [{"neurons": NEURONS}] * BLOCKS
    assert torch.equal(logits(load(tmp_path / "out"), ids), logits(load(dense), ids))
    assert load(tmp_path / "out").config.num_attention_heads == HEADS


def test_blockwise_removes_whole_heads_and_neurons(prune: Prune, dense: Path, tmp_path: Path) -> None:
    report = prune(dense, tmp_path / "out", 0.4, format="blockwise")
    assert {name: report["options"][name] for name in ("allocation", "attention")} == {
        "allocation": "loss",
        "attention": "heads",
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for kept, widths in zip(report["plan"]["kept"], config["block_widths"], strict=True):
        assert set(kept) == {"heads", "neurons"}
        assert widths["head_dim"] == HIDDEN // HEADS
    assert len({str(kept) for kept in report["plan"]["kept"]}) > 1
    odd = any(kept["neurons"] % 32 for kept in report["plan"]["kept"])
    assert any("--round-to 32" in note for note in report["notes"]) == odd


def test_round_blockwise_widths_need_no_advice(prune: Prune, dense: Path, tmp_path: Path) -> None:
    report = prune(dense, tmp_path / "out", 0.4, format="blockwise", round_to=32)
    assert not any(kept["neurons"] % 32 for kept in report["plan"]["kept"])
    assert not any("llama.cpp" in note for note in report["notes"])


@pytest.mark.parametrize("mode", ["dims", "both", "queries"])
def test_parts_of_heads_are_refused_blockwise(shell: Shell, dense: Path, mode: str) -> None:
    message = shell.refused(dense, "--format", "blockwise", "--attention", mode)
    assert message == (
        f"--format blockwise and --attention {mode} exclude each other: engines for blocks of different widths know "
        "whole heads only; leave one of them out, or give --attention heads or none"
    )


def test_blockwise_is_known_without_weights(shell: Shell, dense: Path) -> None:
    code, out, _ = shell.run(dense, "--dry-run", "--format", "blockwise", "--sparsity", "0.2")
    assert code == 0
    assert "allocation loss, target residual, attention heads" in out
