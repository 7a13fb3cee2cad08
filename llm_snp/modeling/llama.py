"""Llama with a width of its own for every decoder block."""

from __future__ import annotations

from functools import partial

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

from .narrowing import Narrowed
from .rotary import NarrowHeads, narrow_llama_block


class SnpLlamaConfig(LlamaConfig):  # type: ignore[misc]
    """Llama with `block_widths`, a dict of what is left of each block: `heads` (of keys), `neurons`,
    the `values` and rotary `pairs` of a head, and `queries` where some went alone.

    All other fields describe the dense model.
    """

    model_type = "snp_llama"
    block_widths = None


class SnpLlamaAttention(NarrowHeads, LlamaAttention):  # type: ignore[misc]
    """`LlamaAttention` whose heads have lost something."""

    eager = staticmethod(eager_attention_forward)


_narrow = partial(narrow_llama_block, SnpLlamaAttention)


class SnpLlamaModel(Narrowed, LlamaModel):  # type: ignore[misc]
    """`LlamaModel`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpLlamaConfig
    blocks_path = "layers"
    cut = staticmethod(_narrow)


class SnpLlamaForCausalLM(Narrowed, LlamaForCausalLM):  # type: ignore[misc]
    """`LlamaForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpLlamaConfig
    base_class = SnpLlamaModel
    blocks_path = "model.layers"
    cut = staticmethod(_narrow)
