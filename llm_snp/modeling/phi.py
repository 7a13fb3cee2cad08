"""Phi (1 and 2) with a width of its own for every decoder block."""

from __future__ import annotations

from typing import Any

from transformers import PhiConfig, PhiForCausalLM, PhiModel
from transformers.models.phi.modeling_phi import PhiAttention, eager_attention_forward

from .narrowing import Narrowed, narrow_layer
from .rotary import NarrowHeads, narrow_grouped


class SnpPhiConfig(PhiConfig):  # type: ignore[misc]
    """Phi (1 and 2) with `block_widths`, a dict of what is left of each block: `heads` (of keys), `neurons`,
    the `values` of a head, and `queries` where some went alone.

    All other fields describe the dense model.
    """

    model_type = "snp_phi"
    block_widths = None


class SnpPhiAttention(NarrowHeads, PhiAttention):  # type: ignore[misc]
    """`PhiAttention` whose heads have lost something."""

    eager = staticmethod(eager_attention_forward)
    norms = ("q_layernorm", "k_layernorm")
    output = "dense"


def narrow_phi_block(block: Any, heads: int, neurons: int, **left: int) -> None:
    """Narrow a `PhiDecoderLayer` in place; left: of its heads, as in `rotary.lose`."""
    narrow_grouped(block.self_attn, SnpPhiAttention, heads, **left)
    narrow_layer(block.mlp.fc1, rows=neurons)
    narrow_layer(block.mlp.fc2, columns=neurons)


class SnpPhiModel(Narrowed, PhiModel):  # type: ignore[misc]
    """`PhiModel`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpPhiConfig
    blocks_path = "layers"
    cut = staticmethod(narrow_phi_block)
    consumers = ("self_attn.dense", "mlp.fc2")


class SnpPhiForCausalLM(Narrowed, PhiForCausalLM):  # type: ignore[misc]
    """`PhiForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpPhiConfig
    base_class = SnpPhiModel
    blocks_path = "model.layers"
    cut = staticmethod(narrow_phi_block)
    consumers = ("self_attn.dense", "mlp.fc2")
