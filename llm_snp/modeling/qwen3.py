# Written by `make families` from llama.py and a row of ../families/llama_like.py: change those.
"""Qwen3 with a width of its own for every decoder block."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, eager_attention_forward

from .narrowing import Narrowed
from .rotary import NarrowHeads, narrow_llama_block


class SnpQwen3Config(Qwen3Config):  # type: ignore[misc]
    """Qwen3 with `block_widths`, a dict of what is left of each block: `heads` (of keys), `neurons`,
    the `values` of a head, and `queries` where some went alone.

    All other fields describe the dense model.
    """

    model_type = "snp_qwen3"
    block_widths = None


class SnpQwen3Attention(NarrowHeads, Qwen3Attention):  # type: ignore[misc]
    """`Qwen3Attention` whose heads have lost something."""

    eager = staticmethod(eager_attention_forward)

    def attention_options(self) -> dict[str, Any]:
        return {"sliding_window": self.sliding_window}


_narrow = partial(narrow_llama_block, SnpQwen3Attention)


class SnpQwen3Model(Narrowed, Qwen3Model):  # type: ignore[misc]
    """`Qwen3Model`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpQwen3Config
    blocks_path = "layers"
    cut = staticmethod(_narrow)


class SnpQwen3ForCausalLM(Narrowed, Qwen3ForCausalLM):  # type: ignore[misc]
    """`Qwen3ForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpQwen3Config
    base_class = SnpQwen3Model
    blocks_path = "model.layers"
    cut = staticmethod(_narrow)
