"""GPT-NeoX and Pythia with a width of its own for every decoder block."""

from __future__ import annotations

from typing import Any

from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXModel

from .narrowing import Narrowed, narrow_layer


class SnpGPTNeoXConfig(GPTNeoXConfig):  # type: ignore[misc]
    """GPT-NeoX and Pythia with `block_widths`, a dict of what is left of each block: `heads` and `neurons`.

    All other fields describe the dense model.
    """

    model_type = "snp_gpt_neox"
    block_widths = None


def narrow_gpt_neox_block(block: Any, heads: int, neurons: int) -> None:
    """Narrow a `GPTNeoXLayer` in place, whose query, key and value are fused head by head."""
    attention = block.attention
    narrow_layer(attention.query_key_value, rows=3 * heads * attention.head_size)
    narrow_layer(attention.dense, columns=heads * attention.head_size)
    narrow_layer(block.mlp.dense_h_to_4h, rows=neurons)
    narrow_layer(block.mlp.dense_4h_to_h, columns=neurons)


class SnpGPTNeoXModel(Narrowed, GPTNeoXModel):  # type: ignore[misc]
    """`GPTNeoXModel`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpGPTNeoXConfig
    blocks_path = "layers"
    narrow = staticmethod(narrow_gpt_neox_block)


class SnpGPTNeoXForCausalLM(Narrowed, GPTNeoXForCausalLM):  # type: ignore[misc]
    """`GPTNeoXForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpGPTNeoXConfig
    base_class = SnpGPTNeoXModel
    blocks_path = "gpt_neox.layers"
    narrow = staticmethod(narrow_gpt_neox_block)
