"""Phi-3 with a width of its own for every decoder block."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM, Phi3Model
from transformers.models.phi3.modeling_phi3 import Phi3Attention, eager_attention_forward

from .narrowing import ConfigView, Narrowed, narrow_layer
from .rotary import NarrowHeads, lose


class SnpPhi3Config(Phi3Config):  # type: ignore[misc]
    """Phi-3 with `block_widths`, a dict of what is left of each block: `heads` (of keys), `neurons`,
    the `values` and rotary `pairs` of a head, and `queries` where some went alone.

    All other fields describe the dense model.
    """

    model_type = "snp_phi3"
    block_widths = None


class SnpPhi3Attention(NarrowHeads, Phi3Attention):  # type: ignore[misc]
    """`Phi3Attention` whose heads have lost something."""

    eager = staticmethod(eager_attention_forward)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, width = self.num_key_value_heads, self.score_width
        queries = heads * self.num_key_value_groups if self.readers is None else len(self.readers)
        sizes = (queries * width, heads * width, heads * self.values)
        return self.by_head(*self.qkv_proj(hidden).split(sizes, dim=-1))

    def attention_options(self) -> dict[str, Any]:
        return {"sliding_window": getattr(self.config, "sliding_window", None)}


def narrow_phi3_block(block: Any, heads: int, neurons: int, **left: int) -> None:
    """Narrow a `Phi3DecoderLayer` in place, whose projections are fused; left: of its heads, as in `rotary.lose`."""
    attention = block.self_attn
    queries, scores, values = lose(attention, SnpPhi3Attention, attention.head_dim, heads, **left)
    narrow_layer(attention.qkv_proj, rows=(queries + heads) * scores + heads * values)
    narrow_layer(attention.o_proj, columns=queries * values)
    # It splits the fused projection by these.
    attention.num_key_value_heads = heads
    attention.config = ConfigView(attention.config, num_attention_heads=queries)
    narrow_layer(block.mlp.gate_up_proj, rows=2 * neurons)
    narrow_layer(block.mlp.down_proj, columns=neurons)


class SnpPhi3Model(Narrowed, Phi3Model):  # type: ignore[misc]
    """`Phi3Model`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpPhi3Config
    blocks_path = "layers"
    cut = staticmethod(narrow_phi3_block)


class SnpPhi3ForCausalLM(Narrowed, Phi3ForCausalLM):  # type: ignore[misc]
    """`Phi3ForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpPhi3Config
    base_class = SnpPhi3Model
    blocks_path = "model.layers"
    cut = staticmethod(narrow_phi3_block)
