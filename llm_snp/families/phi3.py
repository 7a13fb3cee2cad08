"""Phi-3: query, key and value in one layer, gate and up in another."""

from __future__ import annotations

from typing import Any

from ..modeling.phi3 import SnpPhi3ForCausalLM
from .attention import ATTENTION, PAIRS, WHOLE, Attention, Shape
from .base import Family, field
from .grouped import check, partly_rotary
from .sites import MLP, Rows, Site


def _attention(config: Any, shape: Shape) -> Attention:
    fused, keys, queries, width = "self_attn.qkv_proj", shape.keys, shape.queries, shape.scores
    wide = keys * queries * width
    parts = (Rows(fused, queries * width), Rows(fused, width, wide), Rows(fused, shape.values, wide + keys * width))
    scores = WHOLE if partly_rotary(config) else PAIRS
    return Attention(*parts, keys, queries, width, shape.values, scores, "self_attn")


def _sites(config: Any, shape: Shape) -> tuple[Site, ...]:
    neurons, of = shape.neurons, _attention(config, shape)
    parts, columns, tables = (of.query, of.key, of.value), of.queries * of.value_dim, (of.pair_table,)
    gate_up = (Rows("mlp.gate_up_proj"), Rows("mlp.gate_up_proj", start=neurons))
    return (
        Site(ATTENTION, "heads", of.heads, columns, parts, "self_attn.o_proj", "input_layernorm", tables=tables),
        Site(MLP, "neurons", neurons, 1, gate_up, "mlp.down_proj", "post_attention_layernorm"),
    )


PHI3 = Family(
    model_type="phi3",
    blocks="model.layers",
    layout=_sites,
    inside=_attention,
    pruned_class=SnpPhi3ForCausalLM,
    stock={"neurons": field("intermediate_size")},
    check=check,
)
