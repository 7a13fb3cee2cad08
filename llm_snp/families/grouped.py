"""Grouped queries with rotary positions, as Llama and many after it have."""

from __future__ import annotations

from typing import Any

from .attention import ATTENTION, PAIRS, WHOLE, Attention, Shape
from .base import check_config, check_multiple
from .sites import Rows, Site


def grouped_heads(config: Any, shape: Shape, output: str, stream: str | None) -> Site:
    """Key/value heads with the query heads that read them; query heads, if the dense model has a single one."""
    of, consumer = rotary(config, shape), f"self_attn.{output}"
    if config.num_key_value_heads == 1:
        rows, shared = (Rows(of.query.layer, of.head_dim),), (of.key.layer, of.value.layer)
        return Site(ATTENTION, "heads", of.queries, of.value_dim, rows, consumer, stream, shared=shared)
    parts, tables = (of.query, of.key, of.value), (of.pair_table,)
    return Site(ATTENTION, "heads", of.heads, of.queries * of.value_dim, parts, consumer, stream, tables=tables)


def partly_rotary(config: Any) -> bool:
    """Whether positions turn only some of a head's dimensions."""
    parameters = getattr(config, "rope_parameters", None) or {}
    share = getattr(config, "partial_rotary_factor", None) or parameters.get("partial_rotary_factor")
    return share not in (None, 1.0)


def rotary(config: Any, shape: Shape, scores: str = PAIRS) -> Attention:
    """Where the parts of a head are; scores: `WHOLE` where more than the rotation works on query and key."""
    query, key, value = (f"self_attn.{name}_proj" for name in "qkv")
    parts = (Rows(query, shape.queries * shape.scores), Rows(key, shape.scores), Rows(value, shape.values))
    scores = WHOLE if partly_rotary(config) else scores
    return Attention(*parts, shape.keys, shape.queries, shape.scores, shape.values, scores, "self_attn")


def check(config: Any) -> None:
    """Raise `UnsupportedModelError` for sizes that do not fit together."""
    check_config(config, "num_attention_heads", "num_key_value_heads", "intermediate_size")
    check_multiple(config, "num_attention_heads", "num_key_value_heads")
