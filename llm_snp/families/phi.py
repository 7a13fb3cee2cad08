"""Phi (1, 1.5 and 2): attention and MLP side by side, biases everywhere."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..modeling.phi import SnpPhiForCausalLM
from .attention import WHOLE
from .base import Family, field
from .grouped import check, grouped_heads, rotary
from .sites import MLP, Rows, Site


def _sites(config: Any) -> tuple[Site, ...]:
    norm = "input_layernorm"
    return (
        grouped_heads(config, "dense", norm),
        Site(MLP, "neurons", config.intermediate_size, 1, (Rows("mlp.fc1"),), "mlp.fc2", norm),
    )


PHI = Family(
    model_type="phi",
    blocks="model.layers",
    sites=_sites,
    attention=partial(rotary, scores=WHOLE),
    pruned_class=SnpPhiForCausalLM,
    stock={"neurons": field("intermediate_size")},
    check=check,
)
