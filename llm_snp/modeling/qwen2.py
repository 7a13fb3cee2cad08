"""Qwen2 with a width of its own for every decoder block."""

from __future__ import annotations

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from .narrowing import Narrowed, narrow_llama_block


class SnpQwen2Config(Qwen2Config):  # type: ignore[misc]
    """Qwen2 with `block_widths`, a dict of what is left of each block: `heads` (of keys) and `neurons`.

    All other fields describe the dense model.
    """

    model_type = "snp_qwen2"
    block_widths = None


class SnpQwen2Model(Narrowed, Qwen2Model):  # type: ignore[misc]
    """`Qwen2Model`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpQwen2Config
    blocks_path = "layers"
    narrow = staticmethod(narrow_llama_block)


class SnpQwen2ForCausalLM(Narrowed, Qwen2ForCausalLM):  # type: ignore[misc]
    """`Qwen2ForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpQwen2Config
    base_class = SnpQwen2Model
    blocks_path = "model.layers"
    narrow = staticmethod(narrow_llama_block)
