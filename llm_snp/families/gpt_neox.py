"""GPT-NeoX and Pythia: query, key and value in one layer, head by head."""

from __future__ import annotations

from typing import Any

from transformers import GPTNeoXForCausalLM

from ..modeling.gpt_neox import SnpGPTNeoXForCausalLM
from .attention import ATTENTION, WHOLE, Attention, Shape
from .base import Family, field
from .checks import whole_heads
from .sites import MLP, Rows, Site


def _sites(config: Any, shape: Shape) -> tuple[Site, ...]:
    qkv = (Rows("attention.query_key_value", 2 * shape.scores + shape.values),)
    inner = (Rows("mlp.dense_h_to_4h"),)
    nonnegative = config.hidden_act == "relu"
    # Side by side with the attention (as in Pythia) the MLP's output joins the stream that the block began with.
    stream = "input_layernorm" if config.use_parallel_residual else "post_attention_layernorm"
    return (
        Site(ATTENTION, "heads", shape.keys, shape.values, qkv, "attention.dense", "input_layernorm"),
        Site(MLP, "neurons", shape.neurons, 1, inner, "mlp.dense_4h_to_h", stream, nonnegative),
    )


def _attention(config: Any, shape: Shape) -> Attention:
    fused, scores, values = "attention.query_key_value", shape.scores, shape.values
    widths = ((scores, 0), (scores, scores), (values, 2 * scores))
    query, key, value = (Rows(fused, width, start, 2 * scores + values) for width, start in widths)
    return Attention(query, key, value, shape.keys, 1, scores, values, WHOLE, "attention")


# transformers 5 calls the head `lm_head`, but writes and reads it as `embed_out`, its name before.
RENAMED = any("lm_head" in name for name in GPTNeoXForCausalLM._tied_weights_keys or ())

GPT_NEOX = Family(
    model_type="gpt_neox",
    blocks="gpt_neox.layers",
    layout=_sites,
    inside=_attention,
    pruned_class=SnpGPTNeoXForCausalLM,
    stock={"neurons": field("intermediate_size")},
    renames=((r"^embed_out\.", "lm_head."),) if RENAMED else (),
    stored=((r"^lm_head\.", "embed_out."),) if RENAMED else (),
    check=whole_heads("intermediate_size"),
)
