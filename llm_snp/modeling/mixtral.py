# Written by `make families` from llama.py and a row of ../families/llama_like.py: change those.
"""Mixtral with a width of its own for every decoder block."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import MixtralConfig, MixtralForCausalLM, MixtralModel
from transformers.models.mixtral.modeling_mixtral import MixtralAttention, eager_attention_forward

from .mixture import as_in_files, narrow_mixture_block
from .narrowing import Narrowed
from .rotary import NarrowHeads


class SnpMixtralConfig(MixtralConfig):  # type: ignore[misc]
    """Mixtral with `block_widths`, a dict of what is left of each block: `heads` (of keys), `neurons` of each
    of the `experts`,
    the `values` and rotary `pairs` of a head, and `queries` where some went alone.

    All other fields describe the dense model.
    """

    model_type = "snp_mixtral"
    block_widths = None


as_in_files(SnpMixtralConfig)


class SnpMixtralAttention(NarrowHeads, MixtralAttention):  # type: ignore[misc]
    """`MixtralAttention` whose heads have lost something."""

    eager = staticmethod(eager_attention_forward)

    def attention_options(self) -> dict[str, Any]:
        return {"sliding_window": getattr(self.config, "sliding_window", None)}


_narrow = partial(narrow_mixture_block, SnpMixtralAttention)


class SnpMixtralModel(Narrowed, MixtralModel):  # type: ignore[misc]
    """`MixtralModel`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpMixtralConfig
    blocks_path = "layers"
    cut = staticmethod(_narrow)


class SnpMixtralForCausalLM(Narrowed, MixtralForCausalLM):  # type: ignore[misc]
    """`MixtralForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpMixtralConfig
    base_class = SnpMixtralModel
    blocks_path = "model.layers"
    cut = staticmethod(_narrow)
