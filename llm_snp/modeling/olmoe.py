# Written by `make families` from llama.py and a row of ../families/llama_like.py: change those.
"""OLMoE with a width of its own for every decoder block."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM, OlmoeModel
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention, eager_attention_forward

from .mixture import as_in_files, narrow_mixture_block
from .narrowing import Narrowed
from .rotary import NarrowHeads


class SnpOlmoeConfig(OlmoeConfig):  # type: ignore[misc]
    """OLMoE with `block_widths`, a dict of what is left of each block: `heads` (all), `neurons` of each
    of the `experts` and the `values` of a
    head.

    All other fields describe the dense model.
    """

    model_type = "snp_olmoe"
    block_widths = None


as_in_files(SnpOlmoeConfig)


class SnpOlmoeAttention(NarrowHeads, OlmoeAttention):  # type: ignore[misc]
    """`OlmoeAttention` whose heads have lost something."""

    eager = staticmethod(eager_attention_forward)
    norms = ()  # they go over all heads together, before these are told apart

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key = self.q_norm(self.q_proj(hidden)), self.k_norm(self.k_proj(hidden))
        return self.by_head(query, key, self.v_proj(hidden))


_narrow = partial(narrow_mixture_block, SnpOlmoeAttention)


class SnpOlmoeModel(Narrowed, OlmoeModel):  # type: ignore[misc]
    """`OlmoeModel`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpOlmoeConfig
    blocks_path = "layers"
    cut = staticmethod(_narrow)


class SnpOlmoeForCausalLM(Narrowed, OlmoeForCausalLM):  # type: ignore[misc]
    """`OlmoeForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpOlmoeConfig
    base_class = SnpOlmoeModel
    blocks_path = "model.layers"
    cut = staticmethod(_narrow)
