"""Llama, and the many that are built like it: grouped queries, a gated MLP, rotary positions.

Mistral, Qwen2, Qwen3, OLMo and Gemma differ in biases, norms and masks only, which pruning leaves as they are.
"""

from __future__ import annotations

from typing import Any

from ..modeling.llama import SnpLlamaForCausalLM
from .base import ATTENTION, MLP, Family, Rows, Site, check_config, check_multiple, field


def head_width(config: Any) -> int:
    """w, also where config.json does not name it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def grouped_heads(config: Any, output: str, stream: str | None) -> Site:
    """Key/value heads with the query heads that read them, of separate projections."""
    heads, width = config.num_key_value_heads, head_width(config)
    queries = config.num_attention_heads // heads
    producers = (Rows("self_attn.q_proj", queries * width), *(Rows(f"self_attn.{n}_proj", width) for n in "kv"))
    return Site(ATTENTION, "heads", heads, queries * width, producers, f"self_attn.{output}", stream)


def sites(config: Any, attention: str | None = "input_layernorm", mlp: str | None = "post_attention_layernorm") -> Any:
    """The sites of a Llama block; attention, mlp: where the residual stream is read (`Site.stream`)."""
    neurons = config.intermediate_size
    gated = (Rows("mlp.gate_proj"), Rows("mlp.up_proj"))
    return (
        grouped_heads(config, "o_proj", attention),
        Site(MLP, "neurons", neurons, 1, gated, "mlp.down_proj", mlp),
    )


def check(config: Any) -> None:
    """Raise `UnsupportedModelError` for sizes that do not fit together."""
    check_config(config, "num_attention_heads", "num_key_value_heads", "intermediate_size")
    check_multiple(config, "num_attention_heads", "num_key_value_heads")


def fewer_heads(config: Any, heads: int) -> dict[str, int]:
    """For `Family.stock`, where the stock class takes any number of heads once their width is given."""
    queries = config.num_attention_heads // config.num_key_value_heads
    return {"num_key_value_heads": heads, "num_attention_heads": heads * queries, "head_dim": head_width(config)}


def like_llama(model_type: str, pruned_class: Any, **others: Any) -> Family:
    """A family whose blocks have the layers of Llama under the same names."""
    given: dict[str, Any] = {"sites": sites, "stock": {"neurons": field("intermediate_size")}, "check": check}
    return Family(model_type=model_type, blocks="model.layers", pruned_class=pruned_class, **given | others)


LLAMA = like_llama("llama", SnpLlamaForCausalLM)
