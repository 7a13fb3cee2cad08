"""Falcon with a width of its own for every decoder block."""

from __future__ import annotations

from typing import Any

from transformers import FalconConfig, FalconForCausalLM, FalconModel

from .narrowing import Narrowed, narrow_layer


class SnpFalconConfig(FalconConfig):  # type: ignore[misc]
    """Falcon with `block_widths`, a dict of what is left of each block: `heads` and `neurons`.

    All other fields describe the dense model.
    """

    model_type = "snp_falcon"
    block_widths = None


def narrow_falcon_block(block: Any, heads: int, neurons: int) -> None:
    """Narrow a `FalconDecoderLayer` in place.

    heads: key/value heads with their query heads (new architecture), query heads that share one key/value head
    (multi-query), or heads.
    """
    attention, width = block.self_attention, block.self_attention.head_dim
    queries, rows = heads, 3 * heads
    if attention.new_decoder_architecture:
        queries = heads * (attention.num_heads // attention.num_kv_heads)
        rows, attention.num_kv_heads = queries + 2 * heads, heads
    elif attention.multi_query:
        rows = heads + 2
    else:
        attention.num_kv_heads = heads
    narrow_layer(attention.query_key_value, rows=rows * width)
    narrow_layer(attention.dense, columns=queries * width)
    attention.num_heads = queries
    narrow_layer(block.mlp.dense_h_to_4h, rows=neurons)
    narrow_layer(block.mlp.dense_4h_to_h, columns=neurons)


class SnpFalconModel(Narrowed, FalconModel):  # type: ignore[misc]
    """`FalconModel`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpFalconConfig
    blocks_path = "h"
    cut = staticmethod(narrow_falcon_block)
    consumers = ("self_attention.dense", "mlp.dense_4h_to_h")


class SnpFalconForCausalLM(Narrowed, FalconForCausalLM):  # type: ignore[misc]
    """`FalconForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpFalconConfig
    base_class = SnpFalconModel
    blocks_path = "transformer.h"
    cut = staticmethod(narrow_falcon_block)
    consumers = ("self_attention.dense", "mlp.dense_4h_to_h")
