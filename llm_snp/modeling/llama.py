"""Llama with a width of its own for every decoder block."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from .narrowing import Narrowed, narrow_llama_block


class SnpLlamaConfig(LlamaConfig):  # type: ignore[misc]
    """Llama with `block_widths`, a dict of what is left of each block: `heads` (of keys) and `neurons`.

    All other fields describe the dense model.
    """

    model_type = "snp_llama"
    block_widths = None


class SnpLlamaModel(Narrowed, LlamaModel):  # type: ignore[misc]
    """`LlamaModel`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpLlamaConfig
    blocks_path = "layers"
    narrow = staticmethod(narrow_llama_block)


class SnpLlamaForCausalLM(Narrowed, LlamaForCausalLM):  # type: ignore[misc]
    """`LlamaForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpLlamaConfig
    base_class = SnpLlamaModel
    blocks_path = "model.layers"
    narrow = staticmethod(narrow_llama_block)
