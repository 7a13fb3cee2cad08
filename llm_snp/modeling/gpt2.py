"""GPT-2 with a width of its own for every decoder block."""

from __future__ import annotations

from typing import Any

from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from .narrowing import Narrowed, narrow_layer


class SnpGPT2Config(GPT2Config):  # type: ignore[misc]
    """GPT-2 with `block_widths`, a dict of what is left of each block: `heads` and `neurons`.

    All other fields describe the dense model.
    """

    model_type = "snp_gpt2"
    block_widths = None


def narrow_gpt2_block(block: Any, heads: int, neurons: int) -> None:
    """Narrow a `GPT2Block` in place, whose query, key and value are fused, one after the other."""
    attention = block.attn
    width = heads * attention.head_dim
    narrow_layer(attention.c_attn, rows=3 * width)
    narrow_layer(attention.c_proj, columns=width)
    attention.num_heads, attention.split_size = heads, width
    narrow_layer(block.mlp.c_fc, rows=neurons)
    narrow_layer(block.mlp.c_proj, columns=neurons)


class SnpGPT2Model(Narrowed, GPT2Model):  # type: ignore[misc]
    """`GPT2Model`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpGPT2Config
    blocks_path = "h"
    cut = staticmethod(narrow_gpt2_block)
    consumers = ("attn.c_proj", "mlp.c_proj")


class SnpGPT2LMHeadModel(Narrowed, GPT2LMHeadModel):  # type: ignore[misc]
    """`GPT2LMHeadModel` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpGPT2Config
    base_class = SnpGPT2Model
    blocks_path = "transformer.h"
    cut = staticmethod(narrow_gpt2_block)
    consumers = ("attn.c_proj", "mlp.c_proj")
