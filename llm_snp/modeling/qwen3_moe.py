# Written by `make families` from llama.py and a row of ../families/llama_like.py: change those.
"""Qwen3-MoE with a width of its own for every decoder block."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3MoeModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention, eager_attention_forward

from .mixture import as_in_files, narrow_mixture_block
from .narrowing import Narrowed
from .rotary import NarrowHeads


class SnpQwen3MoeConfig(Qwen3MoeConfig):  # type: ignore[misc]
    """Qwen3-MoE with `block_widths`, a dict of what is left of each block: `heads` (of keys), `neurons` of each
    of the `experts`,
    the `values` of a head, and `queries` where some went alone.

    All other fields describe the dense model.
    """

    model_type = "snp_qwen3_moe"
    block_widths = None


as_in_files(SnpQwen3MoeConfig)


class SnpQwen3MoeAttention(NarrowHeads, Qwen3MoeAttention):  # type: ignore[misc]
    """`Qwen3MoeAttention` whose heads have lost something."""

    eager = staticmethod(eager_attention_forward)

    def attention_options(self) -> dict[str, Any]:
        return {"sliding_window": self.sliding_window}


_narrow = partial(narrow_mixture_block, SnpQwen3MoeAttention)


class SnpQwen3MoeModel(Narrowed, Qwen3MoeModel):  # type: ignore[misc]
    """`Qwen3MoeModel`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpQwen3MoeConfig
    blocks_path = "layers"
    cut = staticmethod(_narrow)


class SnpQwen3MoeForCausalLM(Narrowed, Qwen3MoeForCausalLM):  # type: ignore[misc]
    """`Qwen3MoeForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpQwen3MoeConfig
    base_class = SnpQwen3MoeModel
    blocks_path = "model.layers"
    cut = staticmethod(_narrow)
