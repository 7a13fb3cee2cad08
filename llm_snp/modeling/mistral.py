# Written by `make families` from llama.py and a row of ../families/llama_like.py: change those.
"""Mistral with a width of its own for every decoder block."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import MistralConfig, MistralForCausalLM, MistralModel
from transformers.models.mistral.modeling_mistral import MistralAttention, eager_attention_forward

from .narrowing import Narrowed
from .rotary import NarrowHeads, narrow_llama_block


class SnpMistralConfig(MistralConfig):  # type: ignore[misc]
    """Mistral with `block_widths`, a dict of what is left of each block: `heads` (of keys), `neurons`,
    the `values` and rotary `pairs` of a head, and `queries` where some went alone.

    All other fields describe the dense model.
    """

    model_type = "snp_mistral"
    block_widths = None


class SnpMistralAttention(NarrowHeads, MistralAttention):  # type: ignore[misc]
    """`MistralAttention` whose heads have lost something."""

    eager = staticmethod(eager_attention_forward)

    def attention_options(self) -> dict[str, Any]:
        return {"sliding_window": getattr(self.config, "sliding_window", None)}


_narrow = partial(narrow_llama_block, SnpMistralAttention)


class SnpMistralModel(Narrowed, MistralModel):  # type: ignore[misc]
    """`MistralModel`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpMistralConfig
    blocks_path = "layers"
    cut = staticmethod(_narrow)


class SnpMistralForCausalLM(Narrowed, MistralForCausalLM):  # type: ignore[misc]
    """`MistralForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpMistralConfig
    base_class = SnpMistralModel
    blocks_path = "model.layers"
    cut = staticmethod(_narrow)
