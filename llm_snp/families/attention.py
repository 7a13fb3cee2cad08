"""How many heads an attention has, and where their parts are: for directions inside, and query heads that go alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from .sites import Rows

# Where an allocation counts what goes of it.
ATTENTION, SCORES = "attention", "scores"
# What query and key can lose: any directions of their common space, whole rotary pairs, or nothing.
FREE, PAIRS, WHOLE = "free", "pairs", "whole"
# How configs name the number of key/value heads; falcon has the second.
KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
# And that of neurons; where GPT-2 has none it is four times the width.
NEURONS = ("ffn_dim", "ffn_hidden_size", "n_inner", "intermediate_size")


@dataclass(frozen=True)
class Heads:
    """Query heads, key/value heads and the width of each, as in a dense or stock config."""

    queries: int
    keys: int
    width: int


def head_width(config: Any) -> int:
    """w, also where config.json does not name it, or no class of the family reads what it names."""
    named = getattr(config, "head_dim", None) if key_heads_field(config) else None
    return named or config.hidden_size // config.num_attention_heads


def key_heads_field(config: Any) -> str | None:
    """How a config names its number of key/value heads, None where it has none: a class that knows no such field does
    not read it, whatever a config.json has.
    """
    return next((name for name in KEY_HEADS if hasattr(config, name) and _knows(config.__class__, name)), None)


@cache
def _knows(kind: Any, name: str) -> bool:
    return hasattr(kind(), name)


def heads_of(config: Any) -> Heads:
    """Those of each dense block."""
    queries, name = config.num_attention_heads, key_heads_field(config)
    keys = (name and getattr(config, name)) or queries
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        keys = 1  # falcon
    return Heads(queries, keys, head_width(config))


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder block: the dense model's, or what an earlier pruning has left of it.

    keys     key/value heads; queries: query heads that read each of them
    scores   width of query and key in each head; values: that of the value
    neurons  of the MLP, or of each expert
    alone    query heads in all, where some of them went alone; None where as many read each key/value head
    experts  of a block with several MLPs, of which a router picks some for each token; 0 where there is one
    picked   how many of them
    shared   neurons of the MLP that all tokens go through beside the experts; 0 where there is none
    """

    keys: int
    queries: int
    scores: int
    values: int
    neurons: int
    alone: int | None = None
    experts: int = 0
    picked: int = 0
    shared: int = 0


def shape_of(config: Any) -> Shape:
    """That of each dense block."""
    of = heads_of(config)
    neurons = next((getattr(config, name) for name in NEURONS if getattr(config, name, None)), 4 * config.hidden_size)
    return Shape(of.keys, of.queries // of.keys, of.width, of.width, neurons)


@dataclass(frozen=True)
class Attention:
    """Where the parts of the attention are, for subspaces inside the heads.

    query, key, value  the rows of each key/value head; the query heads that read it lie side by side
    heads              key/value heads
    queries            query heads for each of them
    head_dim           w, of query and key; value_dim: of the value
    scores             what query and key can lose: `FREE`, `PAIRS` or `WHOLE`
    module             the attention itself, which has a table of the rotary pairs that are left
    """

    query: Rows
    key: Rows
    value: Rows
    heads: int
    queries: int
    head_dim: int
    value_dim: int
    scores: str
    module: str

    @property
    def pair_table(self) -> str:
        """The buffer of a pruned model that says which rotary pairs are left, a row for each key/value head."""
        return f"{self.module}.pair_table"

    @property
    def directions(self) -> dict[str, tuple[str, int]]:
        """unit -> (where an allocation counts it, how many every head has).

        `dims` are directions of the value path and between query and key, as many of one as of the other: where the
        stock attention has one width for all three. Otherwise `values` and rotary `pairs` go apart.
        """
        if self.scores == FREE:
            return {"dims": (ATTENTION, self.value_dim)}
        pairs = {"pairs": (SCORES, self.head_dim // 2)} if self.scores == PAIRS else {}
        return {"values": (ATTENTION, self.value_dim)} | pairs

    def value_rank(self, kept: Mapping[str, int]) -> int:
        """Directions that are left of each head's value path."""
        return kept.get("dims", kept.get("values", self.value_dim))

    def score_rank(self, kept: Mapping[str, int]) -> int:
        """Directions, or rotary pairs, that are left between query and key."""
        if self.scores == PAIRS:
            return kept.get("pairs", self.head_dim // 2)
        return kept.get("dims", self.head_dim)

    @property
    def score_units(self) -> int:
        """Directions, or rotary pairs, that there are between query and key."""
        return self.score_rank({})

    @property
    def projections(self) -> dict[str, tuple[str, Tensor]]:
        """`query` and `key` -> layer, and its rows (heads, w) of each query or key head; empty if nothing can go."""
        if self.scores == WHOLE:
            return {}
        parts = {"query": self.query, "key": self.key}
        return {name: (rows.layer, rows.of(self.heads).view(-1, self.head_dim)) for name, rows in parts.items()}

    def kernel_width(self, widths: Mapping[str, int]) -> int:
        """Columns of a head that an attention kernel sees: the narrower of scores and values is filled up for it."""
        scores = 2 * widths["pairs"] if "pairs" in widths else self.head_dim
        return max(scores, widths["values"]) if "values" in widths else widths.get("head_dim", self.head_dim)

    def widths(self, kept: Mapping[str, int]) -> dict[str, int]:
        """What `Family.pruned_class.narrow` is told of them."""
        if self.scores == FREE:
            return {"head_dim": self.value_rank(kept)}
        pairs = {"pairs": self.score_rank(kept)} if self.scores == PAIRS else {}
        return {"values": self.value_rank(kept)} | pairs
