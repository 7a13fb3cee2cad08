"""Budgets count real parameters, and heads and directions are compared at equal cost."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from llm_snp.config import PruneConfig
from llm_snp.dense.hub import load_config
from llm_snp.dense.skeleton import empty_model
from llm_snp.errors import OptionError
from llm_snp.families import family_of
from llm_snp.pruning.job import open_job
from llm_snp.pruning.plan import check_order, empty_curves, make_plan


def parameters(block: object) -> int:
    return sum(p.numel() for p in block.parameters())  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["heads", "dims"])
def test_cost_of_a_unit_is_what_narrowing_removes(dense: Path, mode: str) -> None:
    config = load_config(dense)
    family = family_of(config)
    block = empty_model(config).get_submodule(family.blocks)[0]
    for curve in empty_curves(family, config, [block], PruneConfig(attention=mode)):
        for left in (1, curve.units - 1):
            narrowed = copy.deepcopy(block)
            family.pruned_class.narrow(narrowed, **family.widths(config, {curve.unit: left}))
            assert parameters(block) - parameters(narrowed) == (curve.units - left) * curve.cost


def test_heads_and_directions_have_the_same_total(dense: Path) -> None:
    config = load_config(dense)
    family = family_of(config)
    block = empty_model(config).get_submodule(family.blocks)[0]
    heads, dims = (empty_curves(family, config, [block], PruneConfig(attention=mode))[0] for mode in ("heads", "dims"))
    assert (heads.unit, dims.unit) == ("heads", "dims")
    assert heads.units * heads.cost == dims.units * dims.cost
    assert heads.units * heads.cost + empty_curves(family, config, [block], PruneConfig())[1].cost * config.ffn_dim == (
        # Only the biases of the consumers, which no unit owns, are outside the units' costs.
        family.linear_parameters(block, config) - 2 * config.hidden_size
    )


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.3, 0.55, 0.8])
@pytest.mark.parametrize("mode", ["heads", "dims"])
def test_plan_meets_the_budget(dense: Path, sparsity: float, mode: str) -> None:
    config = load_config(dense)
    family = family_of(config)
    blocks = list(empty_model(config).get_submodule(family.blocks))
    options = PruneConfig(sparsity=sparsity, attention=mode)
    plan = make_plan(family, config, blocks, options, empty_curves(family, config, blocks, options), "uniform")
    neuron = min(curve.cost for curve in plan.curves)
    assert abs(plan.removed - plan.asked) <= neuron / 2
    assert plan.why


def test_round_to_gives_multiples(dense: Path) -> None:
    config = load_config(dense)
    family = family_of(config)
    blocks = list(empty_model(config).get_submodule(family.blocks))
    options = PruneConfig(sparsity=0.3, attention="dims", round_to=16)
    plan = make_plan(family, config, blocks, options, empty_curves(family, config, blocks, options), "uniform")
    assert all(kept["neurons"] % 16 == 0 and kept["dims"] % 8 == 0 for kept in plan.kept)


def test_a_revision_of_a_local_directory_is_refused(dense: Path) -> None:
    with pytest.raises(OptionError, match="--revision is for models on the Hub"):
        open_job(PruneConfig(model=str(dense), revision="main"), weights=False)


def test_an_order_that_cannot_rank_the_units_is_refused_early(dense: Path) -> None:
    config = load_config(dense)
    family = family_of(config)
    check_order(family, config, PruneConfig(order="i-spasp", attention="dims"))
    with pytest.raises(OptionError, match="--attention dims"):
        check_order(family, config, PruneConfig(order="i-spasp", attention="heads"))
