"""Gemma with a width of its own for every decoder block."""

from __future__ import annotations

from transformers import GemmaConfig, GemmaForCausalLM, GemmaModel

from .narrowing import Narrowed, narrow_llama_block


class SnpGemmaConfig(GemmaConfig):  # type: ignore[misc]
    """Gemma with `block_widths`, a dict of what is left of each block: `heads` (of keys) and `neurons`.

    All other fields describe the dense model.
    """

    model_type = "snp_gemma"
    block_widths = None


class SnpGemmaModel(Narrowed, GemmaModel):  # type: ignore[misc]
    """`GemmaModel`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpGemmaConfig
    blocks_path = "layers"
    narrow = staticmethod(narrow_llama_block)


class SnpGemmaForCausalLM(Narrowed, GemmaForCausalLM):  # type: ignore[misc]
    """`GemmaForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpGemmaConfig
    base_class = SnpGemmaModel
    blocks_path = "model.layers"
    narrow = staticmethod(narrow_llama_block)
