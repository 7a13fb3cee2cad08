"""GPT-NeoX and Pythia with a width of its own for every decoder block."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXModel
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, eager_attention_forward

from .narrowing import Narrowed, convert_as, narrow_layer
from .rotary import NarrowHeads, lose


class SnpGPTNeoXConfig(GPTNeoXConfig):  # type: ignore[misc]
    """GPT-NeoX and Pythia with `block_widths`, a dict of what is left of each block: `heads`, `neurons` and the
    `values` of a head.

    All other fields describe the dense model.
    """

    model_type = "snp_gpt_neox"
    block_widths = None


class SnpGPTNeoXAttention(NarrowHeads, GPTNeoXAttention):  # type: ignore[misc]
    """`GPTNeoXAttention` whose heads have lost something."""

    eager = staticmethod(eager_attention_forward)
    output = "dense"

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width = self.head_size
        by_head = self.query_key_value(hidden).unflatten(-1, (-1, 2 * width + self.values))
        query, key, value = by_head.split((width, width, self.values), dim=-1)
        return query, key, value


def narrow_gpt_neox_block(block: Any, heads: int, neurons: int, values: int | None = None) -> None:
    """Narrow a `GPTNeoXLayer` in place, whose query, key and value are fused head by head."""
    attention = block.attention
    _, scores, values = lose(attention, SnpGPTNeoXAttention, attention.head_size, heads, values)
    narrow_layer(attention.query_key_value, rows=heads * (2 * scores + values))
    narrow_layer(attention.dense, columns=heads * values)
    narrow_layer(block.mlp.dense_h_to_4h, rows=neurons)
    narrow_layer(block.mlp.dense_4h_to_h, columns=neurons)


class SnpGPTNeoXModel(Narrowed, GPTNeoXModel):  # type: ignore[misc]
    """`GPTNeoXModel`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpGPTNeoXConfig
    blocks_path = "layers"
    cut = staticmethod(narrow_gpt_neox_block)
    consumers = ("attention.dense", "mlp.dense_4h_to_h")


class SnpGPTNeoXForCausalLM(Narrowed, GPTNeoXForCausalLM):  # type: ignore[misc]
    """`GPTNeoXForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpGPTNeoXConfig
    base_class = SnpGPTNeoXModel
    blocks_path = "gpt_neox.layers"
    cut = staticmethod(narrow_gpt_neox_block)
    consumers = ("attention.dense", "mlp.dense_4h_to_h")


# transformers 5 calls the head `lm_head`, and `embed_out` in files, by the name of the class.
convert_as(SnpGPTNeoXForCausalLM.__name__, GPTNeoXForCausalLM.__name__)
