"""Mistral with a width of its own for every decoder block."""

from __future__ import annotations

from transformers import MistralConfig, MistralForCausalLM, MistralModel

from .narrowing import Narrowed, narrow_llama_block


class SnpMistralConfig(MistralConfig):  # type: ignore[misc]
    """Mistral with `block_widths`, a dict of what is left of each block: `heads` (of keys) and `neurons`.

    All other fields describe the dense model.
    """

    model_type = "snp_mistral"
    block_widths = None


class SnpMistralModel(Narrowed, MistralModel):  # type: ignore[misc]
    """`MistralModel`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpMistralConfig
    blocks_path = "layers"
    narrow = staticmethod(narrow_llama_block)


class SnpMistralForCausalLM(Narrowed, MistralForCausalLM):  # type: ignore[misc]
    """`MistralForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpMistralConfig
    base_class = SnpMistralModel
    blocks_path = "model.layers"
    narrow = staticmethod(narrow_llama_block)
