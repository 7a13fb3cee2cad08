"""A model family as data, and the checks that the descriptions share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers.activations import ACT2FN

from ..errors import UnsupportedModelError
from .attention import ATTENTION, KEY_HEADS, Attention, heads_of
from .sites import Rows, Site, linear


def check_config(config: Any, *sizes: str) -> None:
    """Raise `UnsupportedModelError` if one of the fields `sizes` is no size, or the activation none that is known."""
    for name in ("hidden_size", "num_hidden_layers", "vocab_size", *sizes):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise UnsupportedModelError(f"{name} is {value!r} in config.json; it must be a whole number of at least 1")
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


# The config fields with which a stock class has so many units, or None if it cannot have them.
Counted = Callable[[Any, int], dict[str, int] | None]


def field(name: str) -> Counted:
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
    whole_heads  whether heads can go as a whole
    pruned_class of `llm_snp.modeling`: its `config_class` has the widths, its `base_class` is the model without the
                 head, its `narrow` narrows a live block in place
    stock        unit -> (config, count) -> the config fields with which the stock class has as many of them, or None
    renames      (regular expression, replacement) pairs from other key spellings to the model's own, applied in order
    check        raises `UnsupportedModelError` for a config that would be pruned wrongly
    """

    model_type: str
    blocks: str
    sites: Callable[[Any], tuple[Site, ...]]
    pruned_class: Any
    stock: Mapping[str, Counted]
    check: Callable[[Any], None]
    attention: Callable[[Any], Attention | None] = no_directions
    whole_heads: bool = True
    renames: tuple[tuple[str, str], ...] = ()

    @property
    def pruned_model_type(self) -> str:
        return str(self.pruned_class.config_class.model_type)

    def prunable(self, config: Any, attention: str | None) -> tuple[Site, ...]:
        """The sites of a block that `--attention` lets be pruned; `queries` counts the attention in query heads."""
        queries = self.queries(config) if attention == "queries" else None
        sites = (queries if queries and site.name == ATTENTION else site for site in self.sites(config))
        return tuple(site for site in sites if attention != "none" or site.name != ATTENTION)

    def queries(self, config: Any) -> Site | None:
        """The attention counted in single query heads; None where no key/value head has several, or all have one."""
        attention = self.attention(config)
        if attention is None or 1 in (attention.queries, attention.heads) or not self.whole_heads:
            return None
        heads = next(site for site in self.sites(config) if site.name == ATTENTION)
        query = attention.query
        return replace(
            heads,
            unit="queries",
            units=attention.heads * attention.queries,
            group=attention.head_dim,
            producers=(Rows(query.layer, attention.head_dim, query.start),),
            shared=tuple(rows.layer for rows in heads.producers if rows.layer != query.layer),
            parts=attention.heads,
            table=f"{attention.module}.readers",
        )

    def widths(self, config: Any, kept: dict[str, int]) -> dict[str, int]:
        """Keyword arguments of `pruned_class.narrow`, an entry of `block_widths`: `kept`, and the rest as it was."""
        attention = self.attention(config)
        whole = {site.unit: site.units for site in self.sites(config)}
        directions = {} if attention is None else attention.widths(kept)
        queries = self.queries(config)
        fewer = queries is not None and kept.get("queries", queries.units) < queries.units
        alone = {"queries": kept["queries"]} if fewer else {}
        return {unit: kept.get(unit, units) for unit, units in whole.items()} | directions | alone

    def layer_fields(self, config: Any, kept: dict[str, int]) -> dict[str, int]:
        """A block with what is `kept` in the fields of a stock config: one entry of `per_layer_config`.

        Where query heads went alone, each of those that are left has a copy of its keys and values when it attends.
        """
        widths, attention = self.widths(config, kept), self.attention(config)
        site = next(site for site in self.sites(config) if site.name == ATTENTION)
        of = heads_of(config)
        shared = of.keys == 1 < site.units  # the heads that go are query heads
        heads = widths.get("queries", widths["heads"] if shared else widths["heads"] * of.queries // of.keys)
        read = widths.get("queries", 1 if shared else widths["heads"])
        name = next((name for name in KEY_HEADS if hasattr(config, name)), None)
        fields = {"num_attention_heads": heads} | ({} if name is None else {name: read})
        head_dim = {"head_dim": of.width if attention is None else attention.kernel_width(widths)}
        return fields | head_dim | (self.stock["neurons"](config, widths["neurons"]) or {})

    def stock_counts(self, config: Any, site: Site) -> tuple[int, ...]:
        """How many of a site's units the stock class can have, from all of them down."""
        counted = self.stock.get(site.unit)
        possible = (count for count in range(site.units - 1, 0, -1) if counted and counted(config, count) is not None)
        return (site.units, *possible)

    def stock_fields(self, config: Any, kept: Sequence[dict[str, int]]) -> dict[str, int] | None:
        """The config fields with which the stock class has the units that are `kept` in each block, or None.

        A stock config has one number for all blocks.
        """
        whole = self.widths(config, {})
        found = [self.widths(config, block) for block in kept]
        changed = {name for widths in found for name in widths if widths[name] != whole.get(name)}
        if any(widths != found[0] for widths in found) or not changed <= set(self.stock):
            return None
        fields: dict[str, int] = {}
        for unit in changed or ("neurons",):
            counted = self.stock[unit](config, found[0][unit])
            if counted is None:
                return None
            fields |= counted
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
