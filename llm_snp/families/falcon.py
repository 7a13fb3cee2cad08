"""Falcon: query, key and value in one layer, in three layouts; attention and MLP side by side or not."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedModelError
from ..modeling.falcon import SnpFalconForCausalLM
from .attention import ATTENTION
from .base import Family, check_multiple, field, whole_heads
from .sites import MLP, Rows, Site

FUSED = "self_attention.query_key_value"


def _sites(config: Any) -> tuple[Site, ...]:
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    group, per_unit = width, 3 * width
    if config.new_decoder_architecture:
        queries = heads // config.num_kv_heads
        heads, group, per_unit = config.num_kv_heads, queries * width, (queries + 2) * width
    elif config.multi_query:  # one key/value head, which stays
        per_unit = width
    attention = mlp = "input_layernorm"
    if config.new_decoder_architecture and getattr(config, "num_ln_in_parallel_attn", None) != 1:
        attention, mlp = "ln_attn", "ln_mlp"
    elif not config.new_decoder_architecture and not config.parallel_attn:
        mlp = "post_attention_layernorm"
    inner, down = (Rows("mlp.dense_h_to_4h"),), "mlp.dense_4h_to_h"
    return (
        Site(ATTENTION, "heads", heads, group, (Rows(FUSED, per_unit),), "self_attention.dense", attention),
        Site(MLP, "neurons", config.ffn_hidden_size, 1, inner, down, mlp, config.activation == "relu"),
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
    sites=_sites,
    pruned_class=SnpFalconForCausalLM,
    stock={"neurons": field("ffn_hidden_size")},
    check=_check,
)
