"""What every family must keep when attention or MLP layers go as a whole, or blocks with both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Prune, load, logits
from elsewhere import elsewhere
from packaging.version import Version
from test_families import narrowed
from tiny_models import BLOCKS, KNOWN, MODELS, save_tiny, tiny_config, tiny_model

from llm_snp.dense.skeleton import empty_model, linear_blocks
from llm_snp.errors import CheckpointError
from llm_snp.families import FAMILIES, family_of, first_attentions
from llm_snp.pruning import decide
from llm_snp.pruning.session import Session

KEPT = [{}, {"heads": 0}, {"neurons": 0}]
LAYERED = [name for name in KNOWN if FAMILIES[MODELS[name][0]].mixture is None]  # of experts no layer goes as a whole


@pytest.mark.parametrize("name", LAYERED)
def test_a_layer_that_is_gone_is_its_bias(name: str, ids: torch.Tensor) -> None:
    """In float64: a model without an attention and an MLP is the dense one whose consumers there have no weight."""
    config = tiny_config(name)
    family = family_of(config)
    masked = tiny_model(name).double()
    state = {key: value.clone() for key, value in masked.state_dict().items()}
    for index, kept in enumerate(KEPT):
        for site in family.sites(config):
            if kept.get(site.unit) == 0:
                path = f"{family.blocks}.{index}."
                bias = state.get(f"{path}{site.consumer}.bias")
                for layer in site.layers:
                    state = {key: value for key, value in state.items() if not key.startswith(f"{path}{layer}.")}
                    with torch.no_grad():
                        masked.get_parameter(f"{path}{site.consumer}.weight").zero_()
                if bias is not None:
                    state[f"{path}{site.consumer}.bias"] = bias
    gone = [{"heads", "neurons"} - {site.unit for site in sites(name, i)} for i in range(BLOCKS)]
    assert gone == [set(), {"heads"}, {"neurons"}]
    expected = {key for key in state if "norm" not in key}  # such as those of the queries in an attention that is gone
    sliced = narrowed(config, KEPT, {key: state[key] for key in state if key in expected or key in names(name)})
    torch.testing.assert_close(logits(sliced, ids), logits(masked, ids), rtol=1e-9, atol=1e-9)


def pruned_config(name: str) -> object:
    config = tiny_config(name)
    family = family_of(config)
    fields = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    return family.pruned_class.config_class(**fields, block_widths=[family.widths(config, kept) for kept in KEPT])


def sites(name: str, index: int) -> tuple[object, ...]:
    return family_of(tiny_config(name)).sites(pruned_config(name), index)


def names(name: str) -> set[str]:
    return set(empty_model(pruned_config(name)).state_dict())


@pytest.mark.parametrize("name", LAYERED)
def test_the_cost_of_a_layer_is_what_leaving_it_out_removes(name: str) -> None:
    config = tiny_config(name)
    family = family_of(config)
    block = linear_blocks(empty_model(config), family.blocks)[0][1]
    for index in (1, 2):
        left = linear_blocks(empty_model(pruned_config(name)), family.blocks)[0][index]
        (site,) = (site for site in family.sites(config) if KEPT[index].get(site.unit) == 0)
        linear = [f"{layer}.{suffix}" for layer in site.layers for suffix in ("weight", "bias")]
        before, after = ({k: v.numel() for k, v in b.named_parameters() if k in linear} for b in (block, left))
        assert sum(before.values()) - sum(after.values()) == family.site_cost(block, site)


@pytest.mark.parametrize("name", KNOWN)
def test_no_stock_model_is_without_a_layer_in_every_block(name: str) -> None:
    config = tiny_config(name)
    assert FAMILIES[MODELS[name][0]].stock_fields(config, [{"neurons": 0}] * BLOCKS) is None


SOME = [
    name
    for name in ("opt", "llama-one-key", "gemma3", "gpt2", "gpt_neox", "falcon-new", "phi3", "olmo2")
    if name in KNOWN
]


@pytest.mark.parametrize("name", [*SOME, "qwen2-partly-sliding"])
def test_blocks_that_go_are_skipped(name: str, prune: Prune, tmp_path: Path, ids: torch.Tensor) -> None:
    """Without repair the rest is what it was; the stock class reads it."""
    directory = save_tiny(name, tmp_path / "dense")
    if "sliding" in name and not hasattr(tiny_config(name), "layer_types"):
        pytest.skip("this transformers tells from a block's number whether it has a window")
    report = prune(directory, tmp_path / "out", 0.33, structures="layers", format="stock", target="none")
    gone = [i for i, kept in enumerate(report["plan"]["kept"]) if kept == {"heads": 0, "neurons": 0}]
    assert len(gone) == 1
    assert not set(gone) & first_attentions(tiny_config(name))
    model, family = load(directory), FAMILIES[MODELS[name][0]]
    blocks = model.get_submodule(family.blocks)
    forward = blocks[gone[0]].forward

    def skipped(states: torch.Tensor, *args: Any, **options: Any) -> Any:
        found = forward(states, *args, **options)
        return (states, *found[1:]) if isinstance(found, tuple) else states

    blocks[gone[0]].forward = skipped
    result = load(tmp_path / "out")
    assert type(result).__module__.startswith("transformers.models.")
    assert result.num_parameters() == report["model"]["parameters_pruned"]
    torch.testing.assert_close(logits(result, ids), logits(model, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in ("gemma3", "qwen3", "olmo2", "phi-normed") if name in KNOWN])
def test_what_else_is_in_an_attention_goes_with_it(
    name: str, prune: Prune, tmp_path: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms of queries and keys."""
    directory = save_tiny(name, tmp_path / "dense")

    def losses(session: Session) -> dict[tuple[int, str], float]:
        return {(i, site.name): float(site.name == "mlp") for i in range(BLOCKS) for site in session.sites(i)}

    monkeypatch.setattr(decide, "losses_without", losses)
    report = prune(directory, tmp_path / "out", 0.2, structures="layers")
    assert sum(kept.get("heads") == 0 for kept in report["plan"]["kept"]) == 1
    result = load(tmp_path / "out")
    assert result.num_parameters() == report["model"]["parameters_pruned"]
    assert torch.isfinite(logits(result, ids)).all()


@pytest.mark.parametrize("name", SOME[:4])
def test_layers_gone_and_loaded_where_llm_snp_is_not(
    name: str, prune: Prune, tmp_path: Path, ids: torch.Tensor
) -> None:
    directory = save_tiny(name, tmp_path / "dense")
    report = prune(directory, tmp_path / "out", 0.45, structures="layers")
    kept = report["plan"]["kept"]
    assert sum(0 in block.values() for block in kept) > sum(set(block.values()) == {0} for block in kept)
    found = elsewhere(tmp_path / "out", tmp_path, ids)
    assert found["llm_snp"] == "absent"
    assert found["class"] == FAMILIES[MODELS[name][0]].pruned_class.__name__
    whole = load(tmp_path / "out")
    assert whole.num_parameters() == report["model"]["parameters_pruned"]
    assert torch.equal(torch.tensor(found["logits"]), logits(whole, ids))
    assert found["cached"] == found["uncached"] == found["stepwise"]
    assert found["again"]
    assert found["checkpointed"] < 1e-5
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6}
    dynamic = whole.generate(ids, **options)
    if Version(transformers.__version__) >= Version("4.56"):  # before, a static cache had one shape for all blocks
        assert torch.equal(whole.generate(ids, cache_implementation="static", **options), dynamic)
    again = prune(tmp_path / "out", tmp_path / "less", 0.2, attention="heads" if name != "olmo2" else "dims")
    assert [set(block) for block in again["plan"]["kept"]] == [
        {unit for unit, left in block.items() if left} for block in kept if set(block.values()) != {0}
    ]


def test_widths_that_cannot_be() -> None:
    config = pruned_config("llama")
    for index, widths, expected in (
        (0, {"heads": 0}, "0 heads, expected 1 to 4"),
        (1, {"neurons": 0}, "expected 1 to"),
    ):
        changed = json.loads(json.dumps(config.block_widths))  # type: ignore[attr-defined]
        changed[index] |= widths
        other = type(config)(**(config.to_dict() | {"block_widths": changed}))  # type: ignore[attr-defined]
        with pytest.raises(CheckpointError, match=expected):
            family_of(other)
