"""Phi (1 and 2) with a width of its own for every decoder block."""

from __future__ import annotations

from typing import Any

from transformers import PhiConfig, PhiForCausalLM, PhiModel

from .narrowing import Narrowed, narrow_grouped, narrow_layer


class SnpPhiConfig(PhiConfig):  # type: ignore[misc]
    """Phi (1 and 2) with `block_widths`, a dict of what is left of each block: `heads` (of keys) and `neurons`.

    All other fields describe the dense model.
    """

    model_type = "snp_phi"
    block_widths = None


def narrow_phi_block(block: Any, heads: int, neurons: int) -> None:
    """Narrow a `PhiDecoderLayer` in place."""
    narrow_grouped(block.self_attn, heads, output="dense")
    narrow_layer(block.mlp.fc1, rows=neurons)
    narrow_layer(block.mlp.fc2, columns=neurons)


class SnpPhiModel(Narrowed, PhiModel):  # type: ignore[misc]
    """`PhiModel`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpPhiConfig
    blocks_path = "layers"
    narrow = staticmethod(narrow_phi_block)


class SnpPhiForCausalLM(Narrowed, PhiForCausalLM):  # type: ignore[misc]
    """`PhiForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpPhiConfig
    base_class = SnpPhiModel
    blocks_path = "model.layers"
    narrow = staticmethod(narrow_phi_block)
