# Written by `make families` from llama.py and a row of ../families/llama_like.py: change those.
"""Gemma 2 with a width of its own for every decoder block."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, eager_attention_forward

from .narrowing import Narrowed
from .rotary import NarrowHeads, narrow_llama_block


class SnpGemma2Config(Gemma2Config):  # type: ignore[misc]
    """Gemma 2 with `block_widths`, a dict of what is left of each block: `heads` (of keys), `neurons`,
    the `values` and rotary `pairs` of a head, and `queries` where some went alone.

    All other fields describe the dense model.
    """

    model_type = "snp_gemma2"
    block_widths = None


class SnpGemma2Attention(NarrowHeads, Gemma2Attention):  # type: ignore[misc]
    """`Gemma2Attention` whose heads have lost something."""

    eager = staticmethod(eager_attention_forward)

    def attention_options(self) -> dict[str, Any]:
        return {"sliding_window": self.sliding_window, "softcap": self.attn_logit_softcapping}


_narrow = partial(narrow_llama_block, SnpGemma2Attention)


class SnpGemma2Model(Narrowed, Gemma2Model):  # type: ignore[misc]
    """`Gemma2Model`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpGemma2Config
    blocks_path = "layers"
    cut = staticmethod(_narrow)


class SnpGemma2ForCausalLM(Narrowed, Gemma2ForCausalLM):  # type: ignore[misc]
    """`Gemma2ForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpGemma2Config
    base_class = SnpGemma2Model
    blocks_path = "model.layers"
    cut = staticmethod(_narrow)
