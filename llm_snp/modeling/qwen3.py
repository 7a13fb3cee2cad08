"""Qwen3 with a width of its own for every decoder block."""

from __future__ import annotations

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from .narrowing import Narrowed, narrow_llama_block


class SnpQwen3Config(Qwen3Config):  # type: ignore[misc]
    """Qwen3 with `block_widths`, a dict of what is left of each block: `heads` (of keys) and `neurons`.

    All other fields describe the dense model.
    """

    model_type = "snp_qwen3"
    block_widths = None


class SnpQwen3Model(Narrowed, Qwen3Model):  # type: ignore[misc]
    """`Qwen3Model`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpQwen3Config
    blocks_path = "layers"
    narrow = staticmethod(narrow_llama_block)


class SnpQwen3ForCausalLM(Narrowed, Qwen3ForCausalLM):  # type: ignore[misc]
    """`Qwen3ForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpQwen3Config
    base_class = SnpQwen3Model
    blocks_path = "model.layers"
    narrow = staticmethod(narrow_llama_block)
