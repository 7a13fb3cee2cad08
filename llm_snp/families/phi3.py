"""Phi-3: query, key and value in one layer, gate and up in another."""

from __future__ import annotations

from typing import Any

from ..modeling.phi3 import SnpPhi3ForCausalLM
from .base import ATTENTION, MLP, Family, Rows, Site, field
from .llama import check, head_width


def _sites(config: Any) -> tuple[Site, ...]:
    heads, width, neurons = config.num_key_value_heads, head_width(config), config.intermediate_size
    queries = config.num_attention_heads // heads
    fused, wide = "self_attn.qkv_proj", config.num_attention_heads * width
    qkv = (Rows(fused, queries * width), Rows(fused, width, wide), Rows(fused, width, wide + heads * width))
    gate_up = (Rows("mlp.gate_up_proj"), Rows("mlp.gate_up_proj", start=neurons))
    return (
        Site(ATTENTION, "heads", heads, queries * width, qkv, "self_attn.o_proj", "input_layernorm"),
        Site(MLP, "neurons", neurons, 1, gate_up, "mlp.down_proj", "post_attention_layernorm"),
    )


PHI3 = Family(
    model_type="phi3",
    blocks="model.layers",
    sites=_sites,
    pruned_class=SnpPhi3ForCausalLM,
    stock={"neurons": field("intermediate_size")},
    check=check,
)
