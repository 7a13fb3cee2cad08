# Written by `make families` from llama.py and a row of ../families/llama_like.py: change those.
"""Gemma with a width of its own for every decoder block."""

from __future__ import annotations

from functools import partial

from transformers import GemmaConfig, GemmaForCausalLM, GemmaModel
from transformers.models.gemma.modeling_gemma import GemmaAttention, eager_attention_forward

from .narrowing import Narrowed
from .rotary import NarrowHeads, narrow_llama_block


class SnpGemmaConfig(GemmaConfig):  # type: ignore[misc]
    """Gemma with `block_widths`, a dict of what is left of each block: `heads` (of keys), `neurons`,
    the `values` and rotary `pairs` of a head, and `queries` where some went alone.

    All other fields describe the dense model.
    """

    model_type = "snp_gemma"
    block_widths = None


class SnpGemmaAttention(NarrowHeads, GemmaAttention):  # type: ignore[misc]
    """`GemmaAttention` whose heads have lost something."""

    eager = staticmethod(eager_attention_forward)


_narrow = partial(narrow_llama_block, SnpGemmaAttention)


class SnpGemmaModel(Narrowed, GemmaModel):  # type: ignore[misc]
    """`GemmaModel`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpGemmaConfig
    blocks_path = "layers"
    cut = staticmethod(_narrow)


class SnpGemmaForCausalLM(Narrowed, GemmaForCausalLM):  # type: ignore[misc]
    """`GemmaForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpGemmaConfig
    base_class = SnpGemmaModel
    blocks_path = "model.layers"
    cut = staticmethod(_narrow)
