"""GPT-NeoX and Pythia: query, key and value in one layer, head by head."""

from __future__ import annotations

from typing import Any

from transformers import GPTNeoXForCausalLM

from ..modeling.gpt_neox import SnpGPTNeoXForCausalLM
from .attention import ATTENTION, WHOLE, Attention
from .base import Family, field, whole_heads
from .sites import MLP, Rows, Site


def _sites(config: Any) -> tuple[Site, ...]:
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    qkv = (Rows("attention.query_key_value", 3 * width),)
    inner = (Rows("mlp.dense_h_to_4h"),)
    nonnegative = config.hidden_act == "relu"
    # Side by side with the attention (as in Pythia) the MLP's output joins the stream that the block began with.
    stream = "input_layernorm" if config.use_parallel_residual else "post_attention_layernorm"
    return (
        Site(ATTENTION, "heads", heads, width, qkv, "attention.dense", "input_layernorm"),
        Site(MLP, "neurons", config.intermediate_size, 1, inner, "mlp.dense_4h_to_h", stream, nonnegative),
    )


def _attention(config: Any) -> Attention:
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    query, key, value = (Rows("attention.query_key_value", width, part * width, 3 * width) for part in range(3))
    return Attention(query, key, value, heads, 1, width, WHOLE, "attention")


# transformers 5 calls the head `lm_head`, but writes and reads it as `embed_out`, its name before.
RENAMED = any("lm_head" in name for name in GPTNeoXForCausalLM._tied_weights_keys or ())

GPT_NEOX = Family(
    model_type="gpt_neox",
    blocks="gpt_neox.layers",
    sites=_sites,
    attention=_attention,
    pruned_class=SnpGPTNeoXForCausalLM,
    stock={"neurons": field("intermediate_size")},
    renames=((r"^embed_out\.", "lm_head."),) if RENAMED else (),
    check=whole_heads("intermediate_size"),
)
