"""Phi-3: query, key and value in one layer, gate and up in another."""

from __future__ import annotations

from typing import Any

from ..modeling.phi3 import SnpPhi3ForCausalLM
from .attention import ATTENTION, PAIRS, WHOLE, Attention, head_width
from .base import Family, field
from .grouped import check, partly_rotary
from .sites import MLP, Rows, Site


def _attention(config: Any) -> Attention:
    heads, width = config.num_key_value_heads, head_width(config)
    fused, wide = "self_attn.qkv_proj", config.num_attention_heads * width
    queries = config.num_attention_heads // heads
    parts = (Rows(fused, queries * width), Rows(fused, width, wide), Rows(fused, width, wide + heads * width))
    return Attention(*parts, heads, queries, width, WHOLE if partly_rotary(config) else PAIRS, "self_attn")


def _sites(config: Any) -> tuple[Site, ...]:
    neurons, of = config.intermediate_size, _attention(config)
    parts, columns = (of.query, of.key, of.value), of.queries * of.head_dim
    gate_up = (Rows("mlp.gate_up_proj"), Rows("mlp.gate_up_proj", start=neurons))
    return (
        Site(ATTENTION, "heads", of.heads, columns, parts, "self_attn.o_proj", "input_layernorm"),
        Site(MLP, "neurons", neurons, 1, gate_up, "mlp.down_proj", "post_attention_layernorm"),
    )


PHI3 = Family(
    model_type="phi3",
    blocks="model.layers",
    sites=_sites,
    attention=_attention,
    pruned_class=SnpPhi3ForCausalLM,
    stock={"neurons": field("intermediate_size")},
    check=check,
)
