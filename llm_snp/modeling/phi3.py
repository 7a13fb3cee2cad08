"""Phi-3 with a width of its own for every decoder block."""

from __future__ import annotations

from typing import Any

from transformers import Phi3Config, Phi3ForCausalLM, Phi3Model

from .narrowing import ConfigView, Narrowed, narrow_layer


class SnpPhi3Config(Phi3Config):  # type: ignore[misc]
    """Phi-3 with `block_widths`, a dict of what is left of each block: `heads` (of keys) and `neurons`.

    All other fields describe the dense model.
    """

    model_type = "snp_phi3"
    block_widths = None


def narrow_phi3_block(block: Any, heads: int, neurons: int) -> None:
    """Narrow a `Phi3DecoderLayer` in place, whose projections are fused."""
    attention, width = block.self_attn, block.self_attn.head_dim
    queries = heads * attention.num_key_value_groups
    narrow_layer(attention.qkv_proj, rows=(queries + 2 * heads) * width)
    narrow_layer(attention.o_proj, columns=queries * width)
    # It splits the fused projection by these.
    attention.num_key_value_heads = heads
    attention.config = ConfigView(attention.config, num_attention_heads=queries)
    narrow_layer(block.mlp.gate_up_proj, rows=2 * neurons)
    narrow_layer(block.mlp.down_proj, columns=neurons)


class SnpPhi3Model(Narrowed, Phi3Model):  # type: ignore[misc]
    """`Phi3Model`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpPhi3Config
    blocks_path = "layers"
    narrow = staticmethod(narrow_phi3_block)


class SnpPhi3ForCausalLM(Narrowed, Phi3ForCausalLM):  # type: ignore[misc]
    """`Phi3ForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpPhi3Config
    base_class = SnpPhi3Model
    blocks_path = "model.layers"
    narrow = staticmethod(narrow_phi3_block)
