"""Which layers go as a whole: by what they lose for each parameter, beside units or alone."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config

from llm_snp.config import PruneConfig
from llm_snp.core.allocation import SiteCurve, allocate
from llm_snp.dense.skeleton import empty_model, linear_blocks
from llm_snp.errors import OptionError
from llm_snp.families import first_attentions
from llm_snp.pruning.job import check_structures
from llm_snp.pruning.layers import allocate_both, allocate_layers, layer_curves, removable


def site(block: int, name: str, total: float, units: int = 4, cost: int = 10, steep: float = 1.0) -> SiteCurve:
    """With a loss that falls from `total` with the units, the faster, the larger `steep` is."""
    loss = total * (1 - torch.arange(units + 1) / units).double() ** steep
    unit = "heads" if name == "attention" else "neurons"
    return SiteCurve(block, name, unit, units, cost, loss=loss, total=total)


def layer(curve: SiteCurve, stays: bool = False, more: int = 0) -> SiteCurve:
    loss = torch.linspace(curve.total or 0.0, 0.0, curve.units + 1, dtype=torch.float64)
    only = (curve.units,) if stays else (curve.units, 0)
    whole = curve.units * curve.cost + more
    return SiteCurve(
        curve.block, curve.site, curve.unit, curve.units, 0, loss=loss, only=only, whole=whole, total=curve.total
    )


def test_a_layer_goes_or_stays() -> None:
    curves = [site(0, "attention", 0.1), site(0, "mlp", 3.0), site(1, "attention", 1.0), site(1, "mlp", 2.0)]
    layers = [layer(curve, stays=curve is curves[0]) for curve in curves]
    assert allocate_layers("loss", layers, 40, two_by_two=False) == [4, 4, 0, 4]
    assert allocate_layers("loss", layers, 80, two_by_two=False) == [4, 4, 0, 0]
    assert allocate_layers("loss", layers, 80, two_by_two=True) == [4, 4, 0, 0]
    assert (removable(layers, two_by_two=False), removable(layers, two_by_two=True)) == (120, 80)
    with pytest.raises(OptionError):
        allocate_layers("loss", layers, 121, two_by_two=False)


def test_what_goes_with_the_last_unit_counts() -> None:
    """An attention whose keys and values all its query heads share is worth more as a whole than its heads."""
    curve = site(1, "attention", 1.0)
    assert [layer(curve, more=25).gone(kept) for kept in (4, 0)] == [0, 65]
    with_rest = SiteCurve(1, "attention", "heads", 4, 10, loss=curve.loss, only=(4, 3, 2, 1, 0), whole=65)
    assert [with_rest.gone(kept) for kept in (4, 1, 0)] == [0, 30, 65]
    assert with_rest.removable == 65
    assert allocate("loss", [with_rest], 60) == [0]
    assert allocate("loss", [with_rest], 25) == [2]


def test_of_layers_and_units_what_loses_least() -> None:
    """Units of both lose little while there are many; one layer is worth nothing."""
    curves = [site(0, "mlp", 8.0, 8, steep=3.0), site(1, "attention", 0.01, 4), site(1, "mlp", 8.0, 8, steep=3.0)]
    layers = [layer(curve) for curve in curves]
    plan, kept = allocate_both(curves, layers, 80)
    assert [(curve.block, curve.site) for curve in plan] == [(0, "mlp"), (1, "mlp"), (1, "attention")]
    assert kept == [6, 6, 0]
    plan, kept = allocate_both([curves[0], curves[2]], [layer(curves[0]), layer(curves[2])], 80)
    assert (plan, kept) == ([curves[0], curves[2]], [4, 4])  # what is left of both loses 1, and one of them 8


@pytest.mark.parametrize("name", ["llama-one-key", "gemma3", "opt"])
def test_the_layers_of_a_model(name: str) -> None:
    config = tiny_config(name)
    from llm_snp.families import family_of

    family = family_of(config)
    blocks = linear_blocks(empty_model(config), family.blocks)[0]
    layers = layer_curves(family, config, blocks, PruneConfig(attention="heads", structures="layers"), {})
    first = first_attentions(config)
    assert [0 in (curve.only or ()) for curve in layers] == [
        not (curve.site == "attention" and curve.block in first) for curve in layers
    ]
    biases = sum(p.numel() for n, p in blocks[0].named_parameters() if n.endswith(("out_proj.bias", "fc2.bias")))
    assert layers[0].gone(0) + layers[1].gone(0) == family.linear_parameters(blocks[0], config) - biases


def test_windows_that_go_by_the_number_of_a_block() -> None:
    """As transformers had it before `layer_types`: a block with another number would get, or lose, its window."""
    config = tiny_config("qwen2-partly-sliding")
    check_structures(PruneConfig(structures="layers").resolved(), config)
    config.layer_types = None
    for given in ({"structures": "layers"}, {"structures": "both"}, {"method": "everything"}):
        with pytest.raises(OptionError, match=r"^--\w+ \w+: this transformers tells from a block's number"):
            check_structures(PruneConfig(**given).resolved(), config)


def test_scores_that_go_by_the_number_of_a_block() -> None:
    config = tiny_config("gpt2")
    for given in ({"structures": "layers"}, {"structures": "both"}, {"method": "everything"}):
        config.scale_attn_by_inverse_layer_idx = False
        check_structures(PruneConfig(**given).resolved(), config)
        config.scale_attn_by_inverse_layer_idx = True
        with pytest.raises(OptionError, match=r"^--\w+ \w+ is not possible where an attention's scores are divided by"):
            check_structures(PruneConfig(**given).resolved(), config)
    check_structures(PruneConfig().resolved(), config)


def test_layers_of_experts() -> None:
    config = tiny_config("mixtral")
    for given in ({"structures": "layers"}, {"method": "everything"}):
        flag = " ".join(("--" + next(iter(given)), *given.values()))
        with pytest.raises(OptionError, match=f"^{flag} is not possible for mixtures of experts"):
            check_structures(PruneConfig(**given).resolved(), config)
