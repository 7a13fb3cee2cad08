# Written by `make families` from llama.py and a row of ../families/llama_like.py: change those.
"""OLMo 2 with a width of its own for every decoder block."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from transformers import Olmo2Config, Olmo2ForCausalLM, Olmo2Model
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention, eager_attention_forward

from .narrowing import Narrowed
from .rotary import NarrowHeads, narrow_llama_block


class SnpOlmo2Config(Olmo2Config):  # type: ignore[misc]
    """OLMo 2 with `block_widths`, a dict of what is left of each block: `heads` (all), `neurons` and the `values` of a
    head.

    All other fields describe the dense model.
    """

    model_type = "snp_olmo2"
    block_widths = None


class SnpOlmo2Attention(NarrowHeads, Olmo2Attention):  # type: ignore[misc]
    """`Olmo2Attention` whose heads have lost something."""

    eager = staticmethod(eager_attention_forward)
    norms = ()  # they go over all heads together, before these are told apart

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key = self.q_norm(self.q_proj(hidden)), self.k_norm(self.k_proj(hidden))
        return self.by_head(query, key, self.v_proj(hidden))


_narrow = partial(narrow_llama_block, SnpOlmo2Attention)


class SnpOlmo2Model(Narrowed, Olmo2Model):  # type: ignore[misc]
    """`Olmo2Model`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpOlmo2Config
    blocks_path = "layers"
    cut = staticmethod(_narrow)


class SnpOlmo2ForCausalLM(Narrowed, Olmo2ForCausalLM):  # type: ignore[misc]
    """`Olmo2ForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpOlmo2Config
    base_class = SnpOlmo2Model
    blocks_path = "model.layers"
    cut = staticmethod(_narrow)
