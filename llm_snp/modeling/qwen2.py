# Written by `make families` from llama.py and a row of ../families/llama_like.py: change those.
"""Qwen2 with a width of its own for every decoder block."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, eager_attention_forward

from .narrowing import Narrowed
from .rotary import NarrowHeads, narrow_llama_block


class SnpQwen2Config(Qwen2Config):  # type: ignore[misc]
    """Qwen2 with `block_widths`, a dict of what is left of each block: `heads` (of keys), `neurons`,
    the `values` and rotary `pairs` of a head, and `queries` where some went alone.

    All other fields describe the dense model.
    """

    model_type = "snp_qwen2"
    block_widths = None


class SnpQwen2Attention(NarrowHeads, Qwen2Attention):  # type: ignore[misc]
    """`Qwen2Attention` whose heads have lost something."""

    eager = staticmethod(eager_attention_forward)

    def attention_options(self) -> dict[str, Any]:
        return {"sliding_window": getattr(self, "sliding_window", None)}


_narrow = partial(narrow_llama_block, SnpQwen2Attention)


class SnpQwen2Model(Narrowed, Qwen2Model):  # type: ignore[misc]
    """`Qwen2Model`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpQwen2Config
    blocks_path = "layers"
    cut = staticmethod(_narrow)


class SnpQwen2ForCausalLM(Narrowed, Qwen2ForCausalLM):  # type: ignore[misc]
    """`Qwen2ForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpQwen2Config
    base_class = SnpQwen2Model
    blocks_path = "model.layers"
    cut = staticmethod(_narrow)
