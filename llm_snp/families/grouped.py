"""Grouped queries with rotary positions, as Llama and many after it have."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedModelError
from .attention import ATTENTION, PAIRS, WHOLE, Attention, Shape
from .checks import check_config, check_multiple
from .mixture import Mixture
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


def check_mixture(mixture: Mixture, config: Any) -> None:
    """As `check`, and for a mixture without experts, or of which more work on a token than there are."""
    check(config)
    sizes = (mixture.neurons, mixture.experts, mixture.picked, mixture.shared, mixture.dense)
    check_config(config, *(name for name in sizes if name is not None))
    if mixture.dense is not None:
        check_config(config, "decoder_sparse_step")
    experts, picked = getattr(config, mixture.experts), getattr(config, mixture.picked)
    if picked > experts:
        raise UnsupportedModelError(
            f"{mixture.picked} is {picked} in config.json, but there are {experts} experts; is it another model's?"
        )
    if not any(mixture.sparse(config, index) for index in range(config.num_hidden_layers)):
        raise UnsupportedModelError(
            "config.json describes a mixture of experts of which no block has any (decoder_sparse_step "
            f"{config.decoder_sparse_step}, {len(config.mlp_only_layers)} mlp_only_layers): give one that has some"
        )
    if getattr(config, "clip_qkv", None) is not None and getattr(config, "model_type", "").endswith("olmoe"):
        raise UnsupportedModelError(
            f"clip_qkv is {config.clip_qkv} in config.json: clipped queries, keys and values are tied to their "
            "dimensions, and its heads are normed together, so that nothing of its attention could go"
        )
