"""Grouped queries with rotary positions, as Llama and many after it have."""

from __future__ import annotations

from typing import Any

from .attention import ATTENTION, PAIRS, WHOLE, Attention, head_width
from .base import check_config, check_multiple
from .sites import Rows, Site


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


def check(config: Any) -> None:
    """Raise `UnsupportedModelError` for sizes that do not fit together."""
    check_config(config, "num_attention_heads", "num_key_value_heads", "intermediate_size")
    check_multiple(config, "num_attention_heads", "num_key_value_heads")
