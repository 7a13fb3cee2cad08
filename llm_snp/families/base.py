"""The vocabulary in which a model family is described.

A *unit* is a neuron or an attention head. Its *producers* are the layers whose rows make it, its *consumer* is the
linear layer that reads it. A *site* is one consumer with its producers in one decoder block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..errors import UnsupportedModelError

ATTENTION, SCORES, MLP = "attention", "scores", "mlp"
# What query and key can lose: any directions of their common space, whole rotary pairs, or nothing.
FREE, PAIRS, WHOLE = "free", "pairs", "whole"


@dataclass(frozen=True)
class Rows:
    """Rows of a linear layer that make units: unit i has `per_unit` of them from `start + i * stride` on.

    stride: `per_unit`, if it is not given. Rows that belong to no unit stay. A fused layer (gate and up, or query, key
    and value in one) has several of these.
    """

    layer: str
    per_unit: int = 1
    start: int = 0
    stride: int | None = None

    def of(self, units: int) -> Tensor:
        """(units, per_unit) long: the rows of each unit."""
        stride = self.per_unit if self.stride is None else self.stride
        return self.start + stride * torch.arange(units).unsqueeze(1) + torch.arange(self.per_unit)


@dataclass(frozen=True)
class Site:
    """One consumer with its producers; module names are relative to the decoder block.

    name         `attention` or `mlp`
    unit         what is counted: `heads` or `neurons`. With grouped queries a head is a key/value head with the query
                 heads that read it
    units        how many there are in the dense model
    group        g, columns of the consumer per unit
    producers    the rows that make the units; consumer: the linear layer that reads them
    stream       the module whose input is the residual stream that the consumer's output is added to, as it is; None
                 where a norm lies between
    nonnegative  whether the consumer's input is ≥ 0 by construction
    shared       linear layers that all units have in common, which stay whole
    """

    name: str
    unit: str
    units: int
    group: int
    producers: tuple[Rows, ...]
    consumer: str
    stream: str | None
    nonnegative: bool = False
    shared: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """Every linear layer of the site once: the producers, what they share, then the consumer."""
        return (*dict.fromkeys(rows.layer for rows in self.producers), *self.shared, self.consumer)

    def rows_left(self, layer: str, count: int, columns: Tensor) -> Tensor:
        """Of `count` rows of a producer those that stay, ascending, if of the consumer's `columns` (k·g,) are left."""
        gone = torch.ones(self.units, dtype=torch.bool)
        gone[columns // self.group] = False
        stays = torch.ones(count, dtype=torch.bool)
        for rows in self.producers:
            if rows.layer == layer:
                stays[rows.of(self.units)[gone]] = False
        return stays.nonzero().squeeze(1)


@dataclass(frozen=True)
class Attention:
    """Where the parts of the attention are, for subspaces inside the heads.

    query, key, value  the rows of each key/value head; the query heads that read it lie side by side
    heads              key/value heads
    queries            query heads for each of them
    head_dim           w, of query, key and value
    scores             what query and key can lose: `FREE`, `PAIRS` or `WHOLE`
    module             the attention itself, which has a table of the rotary pairs that are left
    """

    query: Rows
    key: Rows
    value: Rows
    heads: int
    queries: int
    head_dim: int
    scores: str
    module: str

    @property
    def directions(self) -> dict[str, tuple[str, int]]:
        """unit -> (where an allocation counts it, how many every head has).

        `dims` are directions of the value path and between query and key, as many of one as of the other: where the
        stock attention has one width for all three. Otherwise `values` and rotary `pairs` go apart.
        """
        if self.scores == FREE:
            return {"dims": (ATTENTION, self.head_dim)}
        pairs = {"pairs": (SCORES, self.head_dim // 2)} if self.scores == PAIRS else {}
        return {"values": (ATTENTION, self.head_dim)} | pairs

    def value_rank(self, kept: Mapping[str, int]) -> int:
        """Directions that are left of each head's value path."""
        return kept.get("dims", kept.get("values", self.head_dim))

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
        """Columns of a head that an attention kernel sees: `narrowing` fills up the narrower of scores and values."""
        scores = 2 * widths["pairs"] if "pairs" in widths else self.head_dim
        return max(scores, widths["values"]) if "values" in widths else widths.get("head_dim", self.head_dim)

    def widths(self, kept: Mapping[str, int]) -> dict[str, int]:
        """What `Family.pruned_class.narrow` is told of them."""
        if self.scores == FREE:
            return {"head_dim": self.value_rank(kept)}
        pairs = {"pairs": self.score_rank(kept)} if self.scores == PAIRS else {}
        return {"values": self.value_rank(kept)} | pairs


def check_config(config: Any, *sizes: str) -> None:
    """Raise `UnsupportedModelError` if one of the fields `sizes` is no size, or the activation none that is known."""
    for name in ("hidden_size", "num_hidden_layers", "vocab_size", *sizes):
        if getattr(config, name) < 1:
            raise UnsupportedModelError(f"{name} is {getattr(config, name)} in config.json; it must be at least 1")
    for name in ("activation_function", "hidden_act", "hidden_activation", "activation"):
        function = getattr(config, name, None)
        if function is not None and function not in ACT2FN:
            raise UnsupportedModelError(f"{name} {function!r} in config.json is none that transformers has")


def whole_heads(*sizes: str) -> Callable[[Any], None]:
    """For `Family.check`: heads that share the model's width, and the fields `sizes`."""

    def check(config: Any) -> None:
        check_config(config, "num_attention_heads", *sizes)
        check_multiple(config, "hidden_size", "num_attention_heads")

    return check


def check_multiple(config: Any, whole: str, part: str) -> None:
    """Raise `UnsupportedModelError` unless one field is a multiple of another."""
    if getattr(config, whole) % getattr(config, part):
        raise UnsupportedModelError(
            f"{whole} {getattr(config, whole)} is not a multiple of {part} {getattr(config, part)}"
        )


def field(name: str) -> Callable[[Any, int], dict[str, int]]:
    """For `Family.stock`: one config field that counts the units."""
    return lambda config, count: {name: count}


def no_directions(config: Any) -> None:
    """For `Family.attention`: heads can go as a whole only."""
    return None


@dataclass(frozen=True)
class Family:
    """A model family as data.

    model_type   of the dense config
    blocks       path of the decoder blocks in the causal-LM model
    sites        config -> the sites of a block, in the order in which they are pruned
    attention    config -> where the parts of the heads are, or None where heads can only go as a whole
    pruned_class of `llm_snp.modeling`: its `config_class` has the widths, its `base_class` is the model without the
                 head, its `narrow` narrows a live block in place
    stock        unit -> (config, count) -> the config fields with which the stock class has as many of them
    renames      (regular expression, replacement) pairs from other key spellings to the model's own, applied in order
    check        raises `UnsupportedModelError` for a config that would be pruned wrongly
    """

    model_type: str
    blocks: str
    sites: Callable[[Any], tuple[Site, ...]]
    pruned_class: Any
    stock: Mapping[str, Callable[[Any, int], dict[str, int]]]
    check: Callable[[Any], None]
    attention: Callable[[Any], Attention | None] = no_directions
    renames: tuple[tuple[str, str], ...] = ()

    @property
    def pruned_model_type(self) -> str:
        return str(self.pruned_class.config_class.model_type)

    def prunable(self, config: Any, attention: str | None) -> tuple[Site, ...]:
        """The sites of a block that `--attention` lets be pruned: all, or all but the attention's."""
        return tuple(site for site in self.sites(config) if attention != "none" or site.name != ATTENTION)

    def widths(self, config: Any, kept: dict[str, int]) -> dict[str, int]:
        """Keyword arguments of `pruned_class.narrow`, an entry of `block_widths`: `kept`, and the rest as it was."""
        attention = self.attention(config)
        whole = {site.unit: site.units for site in self.sites(config)}
        directions = {} if attention is None else attention.widths(kept)
        return {unit: kept.get(unit, units) for unit, units in whole.items()} | directions

    def stock_fields(self, config: Any, kept: Sequence[dict[str, int]]) -> dict[str, int] | None:
        """The config fields with which the stock class has the units that are `kept` in each block, or None.

        A stock config has one number for all blocks.
        """
        whole = self.widths(config, {})
        found = [self.widths(config, block) for block in kept]
        changed = {name for widths in found for name in widths if widths[name] != whole[name]}
        if any(widths != found[0] for widths in found) or not changed <= set(self.stock):
            return None
        fields: dict[str, int] = {}
        for unit in changed or ("neurons",):
            fields |= self.stock[unit](config, found[0][unit])
        return fields

    def linear_parameters(self, block: nn.Module, config: Any) -> int:
        """Parameters of the linear layers of one block, the base of `--sparsity` (METHOD, section 6)."""
        names = {name for site in self.sites(config) for name in site.layers}
        return sum(p.numel() for name in names for p in linear(block, name).parameters())

    def unit_cost(self, block: nn.Module, site: Site) -> int:
        """Parameters that go with one unit: its rows (and biases) of each producer, g columns of the consumer."""
        producers = sum(_row_cost(block, rows.layer) * rows.per_unit for rows in site.producers)
        return producers + linear(block, site.consumer).out_features * site.group

    def direction_cost(self, block: nn.Module, site: Site, attention: Attention, unit: str) -> int:
        """Parameters that go with one of `Attention.directions` in all heads of a block, whose attention is `site`."""
        query, key, value = (_row_cost(block, part.layer) for part in (attention.query, attention.key, attention.value))
        scores = attention.heads * (attention.queries * query + key)
        columns = linear(block, site.consumer).out_features * attention.heads * attention.queries
        values = attention.heads * value + columns
        return {"dims": scores + values, "values": values, "pairs": 2 * scores}[unit]


def _row_cost(block: nn.Module, name: str) -> int:
    """Parameters of one row of a linear layer."""
    return sum(p.numel() // p.shape[0] for p in linear(block, name).parameters())


def linear(block: nn.Module, name: str) -> nn.Linear:
    """The linear layer of that name in a block. Raises `UnsupportedModelError` if it is something else."""
    layer = block.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise UnsupportedModelError(f"{name} is a {type(layer).__name__}, expected a linear layer")
    return layer
