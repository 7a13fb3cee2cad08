# Written by `make families` from llama.py and a row of ../families/llama_like.py: change those.
"""Qwen2-MoE with a width of its own for every decoder block."""

from __future__ import annotations

from functools import partial

from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen2MoeModel
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeAttention, eager_attention_forward

from .mixture import as_in_files, narrow_mixture_block
from .narrowing import Narrowed
from .rotary import NarrowHeads


class SnpQwen2MoeConfig(Qwen2MoeConfig):  # type: ignore[misc]
    """Qwen2-MoE with `block_widths`, a dict of what is left of each block: `heads` (of keys), `neurons` of each
    of the `experts`, `shared` ones,
    the `values` and rotary `pairs` of a head, and `queries` where some went alone.

    All other fields describe the dense model.
    """

    model_type = "snp_qwen2_moe"
    block_widths = None


as_in_files(SnpQwen2MoeConfig)


class SnpQwen2MoeAttention(NarrowHeads, Qwen2MoeAttention):  # type: ignore[misc]
    """`Qwen2MoeAttention` whose heads have lost something."""

    eager = staticmethod(eager_attention_forward)


_narrow = partial(narrow_mixture_block, SnpQwen2MoeAttention)


class SnpQwen2MoeModel(Narrowed, Qwen2MoeModel):  # type: ignore[misc]
    """`Qwen2MoeModel`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpQwen2MoeConfig
    blocks_path = "layers"
    cut = staticmethod(_narrow)


class SnpQwen2MoeForCausalLM(Narrowed, Qwen2MoeForCausalLM):  # type: ignore[misc]
    """`Qwen2MoeForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpQwen2MoeConfig
    base_class = SnpQwen2MoeModel
    blocks_path = "model.layers"
    cut = staticmethod(_narrow)
