# Written by `make families` from llama.py and a row of ../families/llama_like.py: change those.
"""Gemma 3 (text) with a width of its own for every decoder block."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Gemma3TextModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, eager_attention_forward

from .narrowing import Narrowed
from .rotary import NarrowHeads, narrow_llama_block


class SnpGemma3TextConfig(Gemma3TextConfig):  # type: ignore[misc]
    """Gemma 3 (text) with `block_widths`, a dict of what is left of each block: `heads` (of keys), `neurons`,
    the `values` of a head, and `queries` where some went alone.

    All other fields describe the dense model.
    """

    model_type = "snp_gemma3_text"
    block_widths = None


class SnpGemma3Attention(NarrowHeads, Gemma3Attention):  # type: ignore[misc]
    """`Gemma3Attention` whose heads have lost something."""

    eager = staticmethod(eager_attention_forward)

    def attention_options(self) -> dict[str, Any]:
        return {"sliding_window": self.sliding_window}


_narrow = partial(narrow_llama_block, SnpGemma3Attention)


class SnpGemma3TextModel(Narrowed, Gemma3TextModel):  # type: ignore[misc]
    """`Gemma3TextModel`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpGemma3TextConfig
    blocks_path = "layers"
    cut = staticmethod(_narrow)


class SnpGemma3ForCausalLM(Narrowed, Gemma3ForCausalLM):  # type: ignore[misc]
    """`Gemma3ForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpGemma3TextConfig
    base_class = SnpGemma3TextModel
    blocks_path = "model.layers"
    cut = staticmethod(_narrow)
