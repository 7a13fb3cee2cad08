"""Decoder blocks with rotary positions, whose heads can lose value directions, rotary pairs and single query heads.

Stock attention layers have one width for query, key and value, turn all pairs of a head, and have as many query heads
for each key/value head. Where some were lost, `NarrowHeads` has a width of its own for the values, a table of the pairs
that each key/value head still has, and one of the key/value head that each query head reads.
A pruned checkpoint carries a copy of this: it imports torch and transformers only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import Cache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .narrowing import narrow_layer

# Where there is none, its name only tells what it would have been.
CACHES = ("past_key_value", "past_key_values", "layer_past")
# Before transformers 5 a static cache takes the shape of the values from the keys.
ONE_WIDTH = int(transformers.__version__.split(".")[0]) < 5


class NarrowHeads:
    """In front of a stock attention class.

    values       width of the value heads
    pair_table   (key/value heads, pairs) long: which of the stock model's rotary pairs are left, ascending; None: all
    readers      (query heads,) long, ascending: the key/value head that each reads; None: as many read each
    eager        the family's attention in plain torch, which no attention interface knows
    norms        the modules that norm the query and key heads, where the model has them
    output       the projection back to the model's width
    """

    values: int
    pair_table: Tensor | None
    readers: Tensor | None
    eager: Any
    norms: tuple[str, ...] = ("q_norm", "k_norm")
    output = "o_proj"

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden (B, T, d) to query, key and value, each (B, T, its heads, its width)."""
        return self.by_head(*(getattr(self, f"{part}_proj")(hidden) for part in "qkv"))

    def by_head(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The heads told apart: (B, T, heads · width) to (B, T, heads, width)."""
        return _heads(query, self.score_width), _heads(key, self.score_width), _heads(value, self.values)

    def attention_options(self) -> dict[str, Any]:
        """What the family hands to attention functions besides the scaling."""
        return {}

    @property
    def score_width(self) -> int:
        """Width of the query and key heads."""
        return self.head_dim if self.pair_table is None else 2 * self.pair_table.shape[1]  # type: ignore[attr-defined,no-any-return]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        states = self.project(hidden_states)
        query, key, value = (state.transpose(1, 2) for state in states)
        if self.norms and hasattr(self, self.norms[0]):
            query, key = (getattr(self, norm)(state) for norm, state in zip(self.norms, (query, key), strict=True))
        query, key = self._rotate(query, key, *position_embeddings)
        cache, options = _cache(kwargs)
        if cache is not None:
            if ONE_WIDTH and isinstance(cache, StaticCache):
                key, value = _alike(key, value)
            key, value = cache.update(key, value, self.layer_idx, **options)  # type: ignore[attr-defined]
        if self.readers is not None:
            key, value = key[:, self.readers], value[:, self.readers]
        query, key, value = _alike(query, key, value)  # fast kernels want one width
        kind = self.config._attn_implementation  # type: ignore[attr-defined]
        attention_interface = self.eager
        # Before transformers 4.56 it asks for the weights here, which only that function gives.
        if kind != "eager" and not kwargs.get("output_attentions"):
            # vLLM reads this source, and wants one call through a variable that is assigned so.
            attention_interface = ALL_ATTENTION_FUNCTIONS[kind]
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,  # type: ignore[attr-defined]
            scaling=self.scaling,  # type: ignore[attr-defined]
            **self.attention_options(),
            **kwargs,
        )
        # Here the heads come apart, and from vLLM side by side.
        output = _heads(output.reshape(*hidden_states.shape[:-1], -1), value.shape[-1])
        output = output[..., : self.values].flatten(-2)
        return getattr(self, self.output)(output), weights

    def _rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """query, key (B, heads, T, width) turned by position; cos, sin (B, T, 2 · pairs), both halves alike."""
        pairs = cos.shape[-1] // 2
        cos, sin = cos[..., :pairs], sin[..., :pairs]
        if self.pair_table is None:
            return turn(query, cos.unsqueeze(1), sin.unsqueeze(1)), turn(key, cos.unsqueeze(1), sin.unsqueeze(1))
        cos, sin = (table[:, :, self.pair_table].transpose(1, 2) for table in (cos, sin))  # (B, heads, T, pairs left)
        readers = self.readers
        if readers is None:
            heads = torch.arange(key.shape[1], device=key.device)
            readers = heads.repeat_interleave(query.shape[1] // key.shape[1])
        of_queries = (table[:, readers] for table in (cos, sin))
        return turn(query, *of_queries), turn(key, cos, sin)


def _heads(states: Tensor, width: int) -> Tensor:
    return states.view(*states.shape[:-1], -1, width)


def turn(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + pairs) of states (..., width) by the angles whose cos and sin (..., pairs) are given.

    What lies behind the pairs stays as it is.
    """
    pairs = cos.shape[-1]
    first, second, rest = states[..., :pairs], states[..., pairs : 2 * pairs], states[..., 2 * pairs :]
    turned = (first * cos - second * sin).to(states.dtype), (second * cos + first * sin).to(states.dtype)
    return torch.cat([*turned, rest], dim=-1)


def _alike(*states: Tensor) -> list[Tensor]:
    """All of them as wide as the widest; the zeros change neither scores nor sums."""
    width = max(state.shape[-1] for state in states)
    return [F.pad(state, (0, width - state.shape[-1])) if state.shape[-1] < width else state for state in states]


def _cache(arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The cache, taken out of what a block is called with, or None; and what its update is told besides.

    What it is called has changed, and may change again: `past_key_value`, `past_key_values`, `layer_past`, `cache`.
    """
    names = [name for name, value in arguments.items() if isinstance(value, Cache) or name in CACHES]
    caches = [arguments.pop(name) for name in names]
    found = next((cache for cache in caches if cache is not None), None)
    position = arguments.pop("cache_position", None)  # until transformers 5
    return found, {} if position is None else {"cache_kwargs": {"cache_position": position}}


def lose(
    attention: Any,
    narrowed: type[NarrowHeads],
    width: int,
    heads: int,
    values: int | None = None,
    pairs: int | None = None,
    queries: int | None = None,
) -> tuple[int, int, int]:
    """Make a stock attention one of `narrowed` if its heads lose anything; its layers are the caller's to narrow.

    heads: its key/value heads, of `width` each; values, pairs, queries: what is left, None for all. The tables are
    those of the first pairs and of even shares until the weights are loaded. Returns the number of query heads and the
    widths of query and key, and of value. Raises `ValueError` for more than there are.
    """
    all_queries = heads * getattr(attention, "num_key_value_groups", 1)
    values = width if values is None else values
    pairs = width // 2 if pairs is None else pairs
    queries = all_queries if queries is None else queries
    if values > width or pairs > width // 2 or queries > all_queries:
        raise ValueError(
            f"cannot narrow {all_queries} query heads of {width} to {queries} with {values} value directions and "
            f"{pairs} rotary pairs"
        )
    fewer_pairs, fewer_queries = pairs < width // 2, queries < all_queries
    if values < width or fewer_pairs or fewer_queries:
        attention.__class__ = narrowed
        attention.values = values
        device = next(attention.parameters()).device
        if device.type == "meta":  # where a loader builds parameters on meta, buffers may still be real (vLLM)
            device = None
        table = torch.arange(pairs, device=device).repeat(heads, 1) if fewer_pairs else None
        attention.register_buffer("pair_table", table)
        readers = torch.arange(queries, device=device) * heads // queries if fewer_queries else None
        attention.register_buffer("readers", readers)
    if fewer_queries:
        attention.num_key_value_groups = 1  # for attention functions, which see keys and values as the queries do
    return queries, 2 * pairs if fewer_pairs else width, values


def narrow_grouped(attention: Any, narrowed: type[NarrowHeads], heads: int, **left: int) -> None:
    """Narrow an attention with q, k and v projections to `heads` key/value heads with the query heads that read them.

    One with a single key/value head keeps that, and `heads` query heads. left: what is left of the heads, as in `lose`.
    `scaling` and `head_dim` stay those of the dense model.
    """
    width, keys = attention.head_dim, heads
    if attention.k_proj.out_features == width:
        keys, attention.num_key_value_groups = 1, heads
    queries, scores, values = lose(attention, narrowed, width, keys, **left)
    narrow_layer(attention.q_proj, rows=queries * scores)
    narrow_layer(attention.k_proj, rows=keys * scores)
    narrow_layer(attention.v_proj, rows=keys * values)
    narrow_layer(getattr(attention, narrowed.output), columns=queries * values)


def narrow_llama_block(narrowed: type[NarrowHeads], block: Any, heads: int, neurons: int, **left: int) -> None:
    """A block with `self_attn` (grouped queries) and a gated `mlp`, as Llama and many after it have.

    left: what is left of the heads, as in `lose`.
    """
    narrow_grouped(block.self_attn, narrowed, heads, **left)
    narrow_gated(block.mlp, neurons)


def narrow_gated(mlp: Any, neurons: int) -> None:
    """A gated MLP, or an expert, with Llama's names."""
    narrow_layer(mlp.gate_proj, rows=neurons)
    narrow_layer(mlp.up_proj, rows=neurons)
    narrow_layer(mlp.down_proj, columns=neurons)
