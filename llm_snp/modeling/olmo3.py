# Written by `make families` from llama.py and a row of ../families/llama_like.py: change those.
"""OLMo 3 with a width of its own for every decoder block."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from transformers import Olmo3Config, Olmo3ForCausalLM, Olmo3Model
from transformers.models.olmo3.modeling_olmo3 import Olmo3Attention, eager_attention_forward

from .narrowing import Narrowed
from .rotary import NarrowHeads, narrow_llama_block


class SnpOlmo3Config(Olmo3Config):  # type: ignore[misc]
    """OLMo 3 with `block_widths`, a dict of what is left of each block: `heads` (all), `neurons` and the `values` of a
    head.

    All other fields describe the dense model.
    """

    model_type = "snp_olmo3"
    block_widths = None


class SnpOlmo3Attention(NarrowHeads, Olmo3Attention):  # type: ignore[misc]
    """`Olmo3Attention` whose heads have lost something."""

    eager = staticmethod(eager_attention_forward)
    norms = ()  # they go over all heads together, before these are told apart

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key = self.q_norm(self.q_proj(hidden)), self.k_norm(self.k_proj(hidden))
        return self.by_head(query, key, self.v_proj(hidden))

    def attention_options(self) -> dict[str, Any]:
        return {"sliding_window": self.sliding_window}


_narrow = partial(narrow_llama_block, SnpOlmo3Attention)


class SnpOlmo3Model(Narrowed, Olmo3Model):  # type: ignore[misc]
    """`Olmo3Model`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpOlmo3Config
    blocks_path = "layers"
    cut = staticmethod(_narrow)


class SnpOlmo3ForCausalLM(Narrowed, Olmo3ForCausalLM):  # type: ignore[misc]
    """`Olmo3ForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpOlmo3Config
    base_class = SnpOlmo3Model
    blocks_path = "model.layers"
    cut = staticmethod(_narrow)
