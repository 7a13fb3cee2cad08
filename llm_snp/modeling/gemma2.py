"""Gemma 2 with a width of its own for every decoder block."""

from __future__ import annotations

from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model

from .narrowing import Narrowed, narrow_llama_block


class SnpGemma2Config(Gemma2Config):  # type: ignore[misc]
    """Gemma 2 with `block_widths`, a dict of what is left of each block: `heads` (of keys) and `neurons`.

    All other fields describe the dense model.
    """

    model_type = "snp_gemma2"
    block_widths = None


class SnpGemma2Model(Narrowed, Gemma2Model):  # type: ignore[misc]
    """`Gemma2Model`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpGemma2Config
    blocks_path = "layers"
    narrow = staticmethod(narrow_llama_block)


class SnpGemma2ForCausalLM(Narrowed, Gemma2ForCausalLM):  # type: ignore[misc]
    """`Gemma2ForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpGemma2Config
    base_class = SnpGemma2Model
    blocks_path = "model.layers"
    narrow = staticmethod(narrow_llama_block)
