"""OPT (Zhang et al., arXiv 2205.01068): facebook/opt-125m to opt-66b and models of the same architecture."""

from __future__ import annotations

from typing import Any

from ..modeling.opt import SnpOPTForCausalLM
from .attention import ATTENTION, FREE, Attention, Shape
from .base import Family, field
from .checks import whole_heads
from .sites import MLP, Rows, Site


def _sites(config: Any, shape: Shape) -> tuple[Site, ...]:
    # Before its first layer norm (opt-350m puts it after) the residual stream is what the attention itself reads.
    before = config.do_layer_norm_before
    return (
        Site(
            ATTENTION,
            "heads",
            shape.keys,
            shape.values,
            tuple(Rows(f"self_attn.{name}_proj", shape.values) for name in "qkv"),
            "self_attn.out_proj",
            stream="self_attn_layer_norm" if before else "self_attn.q_proj",
        ),
        Site(
            MLP,
            "neurons",
            shape.neurons,
            1,
            (Rows("fc1"),),
            "fc2",
            stream="final_layer_norm" if before else "fc1",
            nonnegative=config.activation_function == "relu",
        ),
    )


def _attention(config: Any, shape: Shape) -> Attention:
    query, key, value = (Rows(f"self_attn.{name}_proj", shape.values) for name in "qkv")
    return Attention(query, key, value, shape.keys, 1, shape.scores, shape.values, FREE, "self_attn")


OPT = Family(
    model_type="opt",
    blocks="model.decoder.layers",
    layout=_sites,
    inside=_attention,
    pruned_class=SnpOPTForCausalLM,
    stock={"neurons": field("ffn_dim")},
    # Several facebook/opt-*.bin were saved from the base model, without "model."; older conversions named the final
    # layer norm after fairseq.
    renames=((r"^decoder\.", "model.decoder."), (r"^model\.decoder\.layer_norm\.", "model.decoder.final_layer_norm.")),
    check=whole_heads("ffn_dim", "max_position_embeddings"),
)
