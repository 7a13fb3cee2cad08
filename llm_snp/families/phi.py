"""Phi (1, 1.5 and 2): attention and MLP side by side, biases everywhere."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..modeling.phi import SnpPhiForCausalLM
from .attention import WHOLE, Shape
from .base import Family, field
from .grouped import check, grouped_heads, rotary
from .sites import MLP, Rows, Site


def _sites(config: Any, shape: Shape) -> tuple[Site, ...]:
    norm = "input_layernorm"
    return (
        grouped_heads(config, shape, "dense", norm),
        Site(MLP, "neurons", shape.neurons, 1, (Rows("mlp.fc1"),), "mlp.fc2", norm),
    )


PHI = Family(
    model_type="phi",
    blocks="model.layers",
    layout=_sites,
    inside=partial(rotary, scores=WHOLE),
    pruned_class=SnpPhiForCausalLM,
    stock={"neurons": field("intermediate_size")},
    check=check,
)
