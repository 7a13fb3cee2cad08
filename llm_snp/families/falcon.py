"""Falcon: query, key and value in one layer, in three layouts; attention and MLP side by side or not."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedModelError
from ..modeling.falcon import SnpFalconForCausalLM
from .attention import ATTENTION, Shape
from .base import Family, field
from .checks import check_multiple, whole_heads
from .sites import MLP, Rows, Site

FUSED = "self_attention.query_key_value"


def _sites(config: Any, shape: Shape) -> tuple[Site, ...]:
    heads, group = shape.keys, shape.queries * shape.values
    per_unit = group + 2 * shape.values
    if config.multi_query and not config.new_decoder_architecture:  # one key/value head, which stays
        heads, group, per_unit = shape.queries, shape.values, shape.values
    attention = mlp = "input_layernorm"
    if config.new_decoder_architecture and getattr(config, "num_ln_in_parallel_attn", None) != 1:
        attention, mlp = "ln_attn", "ln_mlp"
    elif not config.new_decoder_architecture and not config.parallel_attn:
        mlp = "post_attention_layernorm"
    inner, down = (Rows("mlp.dense_h_to_4h"),), "mlp.dense_4h_to_h"
    return (
        Site(ATTENTION, "heads", heads, group, (Rows(FUSED, per_unit),), "self_attention.dense", attention),
        Site(MLP, "neurons", shape.neurons, 1, inner, down, mlp, config.activation == "relu"),
    )


def _check(config: Any) -> None:
    whole_heads("ffn_hidden_size", *["num_kv_heads"] * config.new_decoder_architecture)(config)
    if config.new_decoder_architecture:
        check_multiple(config, "num_attention_heads", "num_kv_heads")
    if config.alibi:
        raise UnsupportedModelError("Falcon with alibi cannot be pruned: its position biases are made for all heads")


FALCON = Family(
    model_type="falcon",
    blocks="transformer.h",
    layout=_sites,
    pruned_class=SnpFalconForCausalLM,
    stock={"neurons": field("ffn_hidden_size")},
    check=_check,
)
