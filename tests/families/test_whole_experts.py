"""What every mixture must keep when whole experts go: the same tests over a tiny model of each family."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LENGTH, Prune, Shell, load, logits
from elsewhere import elsewhere
from pruned_models import save_pruned
from test_families import narrowed
from test_mixtures import MIXTURES, keys, opened, streamed
from tiny_models import BLOCKS, in_float64, save_tiny, tiny_config, unfused
from transformers import AutoModelForCausalLM

from llm_snp.config import PruneConfig
from llm_snp.dense.data import Windows, evaluation_windows
from llm_snp.dense.skeleton import empty_model, linear_blocks
from llm_snp.dense.tokenizer import load_tokenizer
from llm_snp.errors import CheckpointError, OptionError
from llm_snp.evaluation.perplexity import perplexity_loaded, perplexity_streamed
from llm_snp.families import EXPERTS, FAMILIES, MLP, family_of
from llm_snp.pruning.experts import tokens_between, tokens_looked_at, with_experts
from llm_snp.pruning.plan import empty_curves, trial_plan

pytestmark = pytest.mark.skipif(not MIXTURES, reason="this transformers does not have experts as they are needed")
every = pytest.mark.parametrize("name", MIXTURES)

WHOLE: dict[str, Any] = {"experts": "whole", "attention": "none"}


def routed(index: int, name: str) -> bool:
    """Whether a block has experts."""
    mixture = FAMILIES[tiny_config(name).model_type].mixture
    assert mixture is not None
    return mixture.sparse(tiny_config(name), index)


def without_in_router(model: Any, index: int, gone: list[int]) -> None:
    """Let the stock router give the experts `gone` logits of -inf: by one more input, which is always one."""
    gate = model.model.layers[index].mlp.gate
    never = torch.zeros(len(gate.weight), 1, dtype=gate.weight.dtype)
    never[gone] = -torch.inf
    gate.weight = torch.nn.Parameter(torch.cat([gate.weight.detach(), never], 1))
    gate.hidden_dim += 1

    def one_more(module: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (torch.cat([args[0], torch.ones_like(args[0][..., :1])], -1),)

    gate.register_forward_pre_hook(one_more)


@every
def test_removing_equals_masking(name: str, ids: torch.Tensor) -> None:
    """In float64, other experts in every block, and one block whole: the router is as if they had never been."""
    config = tiny_config(name)
    family, masked = family_of(config), in_float64(name)
    state, kept = {key: value.clone() for key, value in unfused(masked).state_dict().items()}, []
    for index, left in enumerate(([0, 1, 2, 3], [0, 2, 3], [1, 3])):
        site = family.sites(config, index)[-1]
        if not site.experts or len(left) == site.experts:
            kept.append({})
            continue
        without_in_router(masked, index, [expert for expert in range(site.experts) if expert not in left])
        prefix = f"{family.blocks}.{index}."
        block = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        state = {key: value for key, value in state.items() if not key.startswith(prefix)}
        state |= {prefix + key: value for key, value in with_experts(block, site, left).items()}
        kept.append({EXPERTS: len(left)})
    sliced = narrowed(config, kept, state)
    # Routers give their weights in float32, and sums of other lengths are rounded otherwise.
    torch.testing.assert_close(logits(sliced, ids), logits(masked, ids), rtol=1e-5, atol=1e-6)
    assert (logits(sliced, ids) - logits(in_float64(name), ids)).abs().max() > 1e-3


@every
def test_nothing_removed_is_the_identity(name: str, prune: Prune, tmp_path: Path, ids: torch.Tensor) -> None:
    directory = save_tiny(name, tmp_path / "dense")
    prune(directory, tmp_path / "out", 0.0, experts="whole")
    assert torch.equal(logits(load(tmp_path / "out"), ids), logits(load(directory), ids))


@every
def test_cost_of_an_expert_is_what_narrowing_removes(name: str) -> None:
    """Its layers, and beside the linear parameters its row of the router."""
    config = tiny_config(name)
    family = family_of(config)
    block = linear_blocks(empty_model(config), family.blocks)[0][0]
    options = PruneConfig(sparsity=0.3, **WHOLE).resolved()
    (curve,) = (curve for curve in empty_curves(family, config, [block], options) if curve.site == MLP)
    assert (curve.unit, curve.units, curve.kept_counts) == (EXPERTS, 4, [4, 3, 2])
    plan = trial_plan(family, config, [block], dataclasses.replace(options, sparsity=0.25))
    before = sum(p.numel() for p in block.parameters())
    family.pruned_class.narrow(block, **family.widths(config, plan.kept[0]))
    assert plan.kept[0][EXPERTS] < 4
    assert before - sum(p.numel() for p in block.parameters()) == plan.gone
    assert plan.beside == (4 - plan.kept[0][EXPERTS]) * config.hidden_size


@every
def test_pruned_and_loaded_where_llm_snp_is_not(name: str, prune: Prune, tmp_path: Path, ids: torch.Tensor) -> None:
    """Each block with a number of its own, and never fewer than work on a token; with directions of the heads gone."""
    output, directory = tmp_path / "out-1.3b", save_tiny(name, tmp_path / "dense")
    report = prune(directory, output, 0.25, experts="whole", attention="dims", samples=8)
    experts = [kept[EXPERTS] for index, kept in enumerate(report["plan"]["kept"]) if routed(index, name)]
    assert all(2 <= count <= 4 for count in experts)
    assert min(experts) < max(experts)
    assert report["model"]["custom_code"]
    found, whole = elsewhere(output, tmp_path, ids), load(output)
    assert found["llm_snp"] == "absent"
    assert torch.equal(torch.tensor(found["logits"]), logits(whole, ids))
    assert found["cached"] == found["uncached"] == found["stepwise"]
    assert found["padded"] < 1e-3
    assert found["again"]
    assert found["checkpointed"] < 1e-5
    assert whole.num_parameters() == report["model"]["parameters_pruned"]
    left = [len(layer.mlp.gate.weight) for layer in whole.model.layers if hasattr(layer.mlp, "gate")]
    assert (
        left
        == experts
        == [len(layer.mlp.experts.down_proj) for layer in whole.model.layers if hasattr(layer.mlp, "gate")]
    )
    windows = Windows(ids[:, :LENGTH], "ids", "", 3, 0)
    streamed = perplexity_streamed(opened(output), windows, lambda: None)
    assert streamed.nll == pytest.approx(perplexity_loaded(whole, windows, lambda: None).nll, rel=1e-6)


@every
def test_as_many_in_every_block_is_stock(name: str, prune: Prune, tmp_path: Path, ids: torch.Tensor) -> None:
    """Also where it was not asked for; files number the experts that are left from zero."""
    directory = save_tiny(name, tmp_path / "dense")
    report = prune(directory, tmp_path / "out", 0.3, format="stock", samples=8, experts="whole")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model).__module__.startswith("transformers.models.")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    mixture = FAMILIES[model.config.model_type].mixture
    assert mixture is not None
    (left,) = {kept[EXPERTS] for index, kept in enumerate(report["plan"]["kept"]) if routed(index, name)}
    assert getattr(model.config, mixture.experts) == left < 4
    assert keys(tmp_path / "out") < keys(directory)
    assert model.num_parameters() == report["model"]["parameters_pruned"]
    found = streamed(tmp_path / "out", ids[:, :LENGTH])
    torch.testing.assert_close(found, logits(model, ids[:, :LENGTH]), rtol=1e-4, atol=1e-4)


def save_changed(name: str, directory: Path, change: Any, **fields: Any) -> Path:
    """A tiny model with other config fields, and blocks with experts that `change` has changed."""
    save_tiny(name, directory)
    config = tiny_config(name)
    config = type(config)(**(config.to_dict() | fields))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.15 * torch.randn(parameter.shape))
        for layer in model.model.layers:
            if hasattr(layer.mlp, "gate"):
                change(layer.mlp)
    model.save_pretrained(directory)
    return directory


def all_alike(mlp: Any) -> None:
    for weight in (mlp.experts.gate_up_proj, mlp.experts.down_proj):
        weight[1:] = weight[:1].clone()


def one_in_vain(mlp: Any) -> None:
    """Logits t, -t, 2t, -2t and 0: the last expert is among the first two of no token."""
    row = mlp.gate.weight[0].clone()
    mlp.gate.weight.copy_(torch.stack([row, -row, 2 * row, -2 * row, 0 * row]))


def one_expert(name: str, experts: int) -> tuple[dict[str, Any], float]:
    """Fields of a model of so many experts whose routing weights sum to one, and one's share of the parameters."""
    config = tiny_config(name)
    count = getattr(config, "attribute_map", {}).get("num_experts", "num_experts")
    fields = {"norm_topk_prob": True, count: experts}
    config = type(config)(**(config.to_dict() | fields))
    family = family_of(config)
    blocks = linear_blocks(empty_model(config), family.blocks)[0]
    base = sum(family.linear_parameters(block, config) for block in blocks)
    return fields, (family.unit_cost(blocks[0], family.sites(config, 0)[-1].by_expert) + 1) / base


@every
@pytest.mark.parametrize(("change", "experts"), [(all_alike, 4), (one_in_vain, 5)])
def test_what_goes_without_loss(
    name: str, change: Any, experts: int, prune: Prune, tmp_path: Path, ids: torch.Tensor
) -> None:
    """Where routing weights sum to one: experts that no token is routed to, and any of those that are all the same.

    Of twins among others none can go for nothing: the router gives to the others what the one has had.
    """
    fields, share = one_expert(name, experts)
    directory = save_changed(name, tmp_path / "parent", change, **fields)
    for mode in ("whole", "both"):
        report = prune(directory, tmp_path / mode, share, experts=mode, attention="none", target="none")
        before, after = logits(load(directory), ids), logits(load(tmp_path / mode), ids)
        gone = [experts - kept.get(EXPERTS, experts) for kept in report["plan"]["kept"]]
        assert sum(gone) == 1
        assert (after - before).square().mean() < 1e-9 * before.square().mean()


@every
def test_the_repair_helps(name: str, prune: Prune, tmp_path: Path, held_out: Path) -> None:
    directory = save_tiny(name, tmp_path / "parent")
    ids = evaluation_windows(str(held_out), load_tokenizer(directory), LENGTH).tokens
    reference, errors = logits(load(directory), ids), {}
    for target in ("residual", "self", "dense", "none"):
        prune(directory, tmp_path / target, 0.3, **WHOLE, target=target, allocation="uniform", samples=48)
        errors[target] = (logits(load(tmp_path / target), ids) - reference).square().mean().item()
    assert max(errors[target] for target in ("residual", "self", "dense")) < errors["none"]


def test_those_that_are_left_are_those_of_the_order(prune: Prune, tmp_path: Path) -> None:
    """Without a repair they are what they were, under new numbers, with their rows of the router."""
    directory = save_tiny("mixtral", tmp_path / "dense")
    for order in ("greedy", "reap", "random"):
        prune(directory, tmp_path / order, 0.4, **WHOLE, order=order, target="none", allocation="uniform", samples=8)
        dense, pruned = (opened(path).block_state(0) for path in (directory, tmp_path / order))
        left = [
            next(
                e
                for e in range(4)
                if torch.equal(pruned[f"mlp.experts.{i}.{layer}"], dense[f"mlp.experts.{e}.{layer}"])
            )
            for layer in ("gate_proj.weight", "down_proj.weight")
            for i in range(2)
        ]
        assert left[:2] == left[2:] == sorted(left[:2])
        assert torch.equal(pruned["mlp.gate.weight"], dense["mlp.gate.weight"][left[:2]])


@every
@pytest.mark.parametrize("format", ["auto", "stock"])
def test_experts_and_neurons_of_the_others(
    name: str, format: str, prune: Prune, tmp_path: Path, ids: torch.Tensor
) -> None:
    """In the same blocks; as many of both in every block is stock."""
    fields, share = one_expert(name, 5)
    directory = save_changed(name, tmp_path / "dense", one_in_vain, **fields)
    share *= sum(routed(index, name) for index in range(BLOCKS))
    report = prune(directory, tmp_path / "out", share + 0.15, format=format, attention="none", samples=8)
    assert report["options"]["experts"] == "both"
    kept = [kept for index, kept in enumerate(report["plan"]["kept"]) if routed(index, name)]
    assert all(2 <= block[EXPERTS] < 5 for block in kept)
    assert all(block["neurons"] % 8 == 0 for block in kept)
    assert any(block["neurons"] < 96 for block in kept)
    assert len({str(block) for block in kept}) == 1 or format == "auto"
    gone = sum(5 - block[EXPERTS] for block in kept)
    why = f"{gone} whole experts go, of all numbers the one that loses least, and units go in order of loss"
    assert report["plan"]["why"].startswith(
        why if format == "auto" else "of all plans that are the same in every block"
    )
    model = load(tmp_path / "out")
    assert type(model).__module__.startswith("transformers.models.") or format == "auto"
    assert model.num_parameters() == report["model"]["parameters_pruned"]
    assert torch.isfinite(logits(model, ids)).all()
    told = [block for block in report["blocks"] if EXPERTS in block]
    assert all(block[EXPERTS]["lost"] is None and block["mlp"]["lost"] > 0 for block in told)
    assert len(told) == len(kept)


@every
@pytest.mark.parametrize("then", ["whole", "neurons"])
def test_pruned_again(name: str, then: str, prune: Prune, tmp_path: Path, ids: torch.Tensor) -> None:
    """What has lost experts can lose more, and neurons; each counts those of the dense model."""
    left = ((3, 48), (4, 48), (4, 40))
    kept = [{EXPERTS: left[i][0], "neurons": left[i][1]} if routed(i, name) else {} for i in range(BLOCKS)]
    save_pruned(name, kept, tmp_path / "parent")
    report = prune(tmp_path / "parent", tmp_path / "out", 0.2, experts=then, attention="none", samples=8)
    widths = json.loads((tmp_path / "out" / "config.json").read_text())["block_widths"]
    for index, block in enumerate(widths):
        if routed(index, name):
            assert block == {**block, **kept[index], **report["plan"]["kept"][index]}
    unit = EXPERTS if then == "whole" else "neurons"
    some = [index for index in range(BLOCKS) if routed(index, name)]
    assert sum(widths[index][unit] for index in some) < sum(kept[index][unit] for index in some)
    model = load(tmp_path / "out")
    assert model.num_parameters() == report["model"]["parameters_pruned"]
    assert torch.isfinite(logits(model, ids)).all()


def test_how_many_tokens_are_looked_at(prune: Prune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of few, and otherwise some that are spread evenly, of many experts the fewer."""
    assert [tokens_between(8, count) for count in (24_576, 32_768, 262_144)] == [1, 1, 8]
    assert [tokens_looked_at(count, 262_144) for count in (8, 64, 128, 256)] == [32_768, 32_768, 8192, 2048]
    assert tokens_looked_at(99_999, 100) == 1
    monkeypatch.setattr("llm_snp.pruning.experts.ROUTING_TOKENS", 50)
    report = prune(save_tiny("mixtral", tmp_path / "dense"), tmp_path / "out", 0.3, **WHOLE, samples=8)
    assert report["sparsity"]["achieved"] == pytest.approx(0.3, abs=0.04)


def test_what_is_refused(prune: Prune, shell: Shell, dense: Path, tmp_path: Path) -> None:
    directory = save_tiny("mixtral", tmp_path / "dense")
    for given, said in (
        ({"experts": "whole", "method": "snp"}, "--order zca ranks what a single layer reads, and an expert is three"),
        ({"order": "reap"}, "--order reap ranks whole experts only, .* --experts whole and --attention none"),
        ({"order": "reap", "experts": "whole"}, "--order reap ranks whole experts only"),
        ({"sparsity": 0.6, **WHOLE}, "with one unit left everywhere, of experts as many as work on a token, at most"),
    ):
        with pytest.raises(OptionError, match=said):
            prune(directory, tmp_path / "out", **given)
    save_pruned("mixtral", [{}, {EXPERTS: 2}, {}], tmp_path / "parent")
    file = tmp_path / "parent" / "config.json"
    fields = json.loads(file.read_text())
    fields["block_widths"][1][EXPERTS] = 1
    file.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"block_widths of block 1 in .* has 1 experts, expected 2 to 4"):
        prune(tmp_path / "parent", tmp_path / "out")
    said = shell.refused(dense, "--experts", "whole")
    assert said.startswith("--experts whole is for mixtures of experts, and models of type 'opt' are none")


def test_an_order_of_experts_alone_where_other_neurons_would_go(shell: Shell, tmp_path: Path) -> None:
    """Those of an MLP beside the experts, or of a block without any, which need not be the first."""
    for name, fields, where in (
        ("qwen2_moe", {"mlp_only_layers": []}, "the MLP beside the experts"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "the mlp of blocks without experts"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "the mlp of blocks without experts"),
    ):
        directory = save_tiny(name, tmp_path / where.replace(" ", "-"), **fields)
        said = shell.refused(directory, "--order", "reap", "--experts", "whole", "--attention", "none")
        assert said.startswith(f"--order reap ranks whole experts only, and {where} of this model would lose neurons")


def test_a_loss_that_balances_experts_is_not_asked_for(prune: Prune, tmp_path: Path, ids: torch.Tensor) -> None:
    """It sums over the blocks of one number of experts; with a stock result that is the number there is."""
    directory = save_changed("mixtral", tmp_path / "dense", lambda mlp: None, output_router_logits=True)
    for format, share in (("auto", 0.15), ("stock", 0.3)):
        report = prune(directory, tmp_path / format, share, format=format, **WHOLE, samples=8)
        assert report["model"]["custom_code"] == (format == "auto")
        model = load(tmp_path / format)
        assert model.config.output_router_logits == (format == "stock")
        assert torch.isfinite(model(input_ids=ids, labels=ids).loss)
