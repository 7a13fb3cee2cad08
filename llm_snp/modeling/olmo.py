# Written by `make families` from llama.py and a row of ../families/llama_like.py: change those.
"""OLMo with a width of its own for every decoder block."""

from __future__ import annotations

from functools import partial

from transformers import OlmoConfig, OlmoForCausalLM, OlmoModel
from transformers.models.olmo.modeling_olmo import OlmoAttention, eager_attention_forward

from .narrowing import Narrowed
from .rotary import NarrowHeads, narrow_llama_block


class SnpOlmoConfig(OlmoConfig):  # type: ignore[misc]
    """OLMo with `block_widths`, a dict of what is left of each block: `heads` (of keys), `neurons`,
    the `values` and rotary `pairs` of a head, and `queries` where some went alone.

    All other fields describe the dense model.
    """

    model_type = "snp_olmo"
    block_widths = None


class SnpOlmoAttention(NarrowHeads, OlmoAttention):  # type: ignore[misc]
    """`OlmoAttention` whose heads have lost something."""

    eager = staticmethod(eager_attention_forward)


_narrow = partial(narrow_llama_block, SnpOlmoAttention)


class SnpOlmoModel(Narrowed, OlmoModel):  # type: ignore[misc]
    """`OlmoModel`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpOlmoConfig
    blocks_path = "layers"
    cut = staticmethod(_narrow)


class SnpOlmoForCausalLM(Narrowed, OlmoForCausalLM):  # type: ignore[misc]
    """`OlmoForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpOlmoConfig
    base_class = SnpOlmoModel
    blocks_path = "model.layers"
    cut = staticmethod(_narrow)
