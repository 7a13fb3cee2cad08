"""What Llama has, and the many that are built like it: grouped queries, a gated MLP, rotary positions.

Mistral, Qwen2, Qwen3, OLMo and Gemma differ in biases, norms and masks only, which pruning leaves as they are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from .attention import ATTENTION, PAIRS, WHOLE, Attention
from .base import Family, check_config, check_multiple, field
from .sites import MLP, Rows, Site


def head_width(config: Any) -> int:
    """w, also where config.json does not name it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def grouped_heads(config: Any, output: str, stream: str | None) -> Site:
    """Key/value heads with the query heads that read them; query heads, if they all read a single one."""
    of, consumer = rotary(config), f"self_attn.{output}"
    if of.heads == 1:
        rows, shared = (Rows(of.query.layer, of.head_dim),), (of.key.layer, of.value.layer)
        return Site(ATTENTION, "heads", of.queries, of.head_dim, rows, consumer, stream, shared=shared)
    parts = (of.query, of.key, of.value)
    return Site(ATTENTION, "heads", of.heads, of.queries * of.head_dim, parts, consumer, stream)


def partly_rotary(config: Any) -> bool:
    """Whether positions turn only some of a head's dimensions."""
    parameters = getattr(config, "rope_parameters", None) or {}
    share = getattr(config, "partial_rotary_factor", None) or parameters.get("partial_rotary_factor")
    return share not in (None, 1.0)


def rotary(config: Any, scores: str = PAIRS) -> Attention:
    """Where the parts of a head are; scores: `WHOLE` where more than the rotation works on query and key."""
    width, heads = head_width(config), config.num_key_value_heads
    queries = config.num_attention_heads // heads
    query, key, value = (f"self_attn.{name}_proj" for name in "qkv")
    parts = (Rows(query, queries * width), Rows(key, width), Rows(value, width))
    return Attention(*parts, heads, queries, width, WHOLE if partly_rotary(config) else scores, "self_attn")


def sites(config: Any, attention: str | None = "input_layernorm", mlp: str | None = "post_attention_layernorm") -> Any:
    """The sites of a Llama block; attention, mlp: where the residual stream is read (`Site.stream`)."""
    gated = (Rows("mlp.gate_proj"), Rows("mlp.up_proj"))
    return (
        grouped_heads(config, "o_proj", attention),
        Site(MLP, "neurons", config.intermediate_size, 1, gated, "mlp.down_proj", mlp),
    )


def check(config: Any) -> None:
    """Raise `UnsupportedModelError` for sizes that do not fit together."""
    check_config(config, "num_attention_heads", "num_key_value_heads", "intermediate_size")
    check_multiple(config, "num_attention_heads", "num_key_value_heads")


def fewer_heads(config: Any, heads: int) -> dict[str, int]:
    """For `Family.stock`, where the stock class takes any number of heads once their width is given."""
    keys = config.num_key_value_heads
    counts = (1, heads) if keys == 1 else (heads, heads * (config.num_attention_heads // keys))
    return {"num_key_value_heads": counts[0], "num_attention_heads": counts[1], "head_dim": head_width(config)}


def normed_as_one(model_type: str, pruned_class: Any) -> Family:
    """A family like Llama's in which all query heads are normed together, and all keys, and what each layer gives."""
    return like_llama(
        model_type,
        pruned_class,
        sites=partial(sites, attention=None, mlp=None),
        attention=partial(rotary, scores=WHOLE),
        whole_heads=False,
    )


def like_llama(model_type: str, pruned_class: Any, **others: Any) -> Family:
    """A family whose blocks have the layers of Llama under the same names."""
    given: dict[str, Any] = {"sites": sites, "stock": {"neurons": field("intermediate_size")}, "check": check}
    given |= {"attention": rotary, "pruned_class": pruned_class}
    return Family(model_type=model_type, blocks="model.layers", **given | others)
