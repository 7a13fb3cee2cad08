"""A model family as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .attention import ATTENTION, Attention, Shape, heads_of, key_heads_field, shape_of
from .left import dropped
from .mixture import Mixture
from .sites import EXPERTS, SHARED, Rows, Site, linear, parameters_of

# What the config of a pruned model has of its own (`result.assembly.result_config`), and what names its class.
OF_PRUNED = (
    *("model_type", "architectures", "auto_map"),
    *("block_widths", "per_layer_config", "allow_global_per_layer_attribute_access"),
)

# The config fields with which a stock class has so many units, or None if it cannot have them.
Counted = Callable[[Any, int, int | None], dict[str, int] | None]


def field(name: str) -> Counted:
    """For `Family.stock`: one config field that counts the units, of every block."""
    return lambda config, count, index: {name: count}


def no_directions(config: Any, shape: Shape) -> None:
    """For `Family.inside`: heads can go as a whole only."""
    return None


@dataclass(frozen=True)
class Family:
    """A model family as data.

    A `config` is that of a dense model, or of one that was pruned, whose `block_widths` say what is left of each block;
    `index` is a block of it, None the dense model's, which its other fields describe.

    model_type   of the dense config
    blocks       path of the decoder blocks in the causal-LM model
    layout       config, shape -> the sites of a block, in the order in which they are pruned
    inside       config, shape -> where the parts of the heads are, or None where heads can only go as a whole
    whole_heads  whether heads can go as a whole
    pruned_class of `llm_snp.modeling`: its `config_class` has the widths, its `base_class` is the model without the
                 head, its `narrow` narrows a live block in place
    stock        unit -> (config, count, block) -> the config fields with which the stock class has as many of them in
                 that block (None: in any), or None
    mixture      where a config has the sizes of experts; None: the family has none
    renames      (regular expression, replacement) pairs from other key spellings to the model's own, applied in order
    stored       such pairs from the model's spelling to that in which transformers expects a file, where it is another
    check        raises `UnsupportedModelError` for a config that would be pruned wrongly
    """

    model_type: str
    blocks: str
    layout: Callable[[Any, Shape], tuple[Site, ...]]
    pruned_class: Any
    stock: Mapping[str, Counted]
    check: Callable[[Any], None]
    inside: Callable[[Any, Shape], Attention | None] = no_directions
    whole_heads: bool = True
    mixture: Mixture | None = None
    renames: tuple[tuple[str, str], ...] = ()
    stored: tuple[tuple[str, str], ...] = ()

    @property
    def pruned_model_type(self) -> str:
        return str(self.pruned_class.config_class.model_type)

    @property
    def architectures(self) -> list[str]:
        """The class of the dense model, as configs name it."""
        return [self.pruned_class.__bases__[-1].__name__]

    def dense_config(self, config: Any) -> Any:
        """Of a pruned model's config that of the dense model, for the stock class."""
        fields = {name: value for name, value in config.to_dict().items() if name not in OF_PRUNED}
        found = self.pruned_class.config_class.__base__(**fields)
        found.architectures = self.architectures
        return found

    def left(self, config: Any, index: int | None) -> Mapping[str, int]:
        """What an earlier pruning has left of a block, an entry of `block_widths`; empty where nothing went."""
        widths = getattr(config, "block_widths", None)
        return {} if index is None or widths is None else widths[index]

    def dense_shape(self, config: Any, index: int | None = None) -> Shape:
        """The sizes of a block of the dense model; None: of one with experts, where not all have some."""
        found = shape_of(config)
        return found if self.mixture is None else self.mixture.shape(config, found, index)

    def shape(self, config: Any, index: int | None = None) -> Shape:
        """The sizes of a block."""
        dense, left = self.dense_shape(config, index), self.left(config, index)
        heads = left.get("heads")
        if heads is not None:
            shared = dense.keys == 1 < self.layout(config, dense)[0].units  # the heads that went are query heads
            dense = replace(dense, **{"queries" if shared else "keys": heads})
        return replace(
            dense,
            scores=left.get("head_dim", 2 * left["pairs"] if "pairs" in left else dense.scores),
            values=left.get("head_dim", left.get("values", dense.values)),
            neurons=left.get("neurons", dense.neurons),
            experts=left.get(EXPERTS, dense.experts),
            shared=left.get("shared", dense.shared),
            alone=left.get("queries"),
        )

    def sites(self, config: Any, index: int | None = None) -> tuple[Site, ...]:
        """The sites of a block, but those of which nothing is left.

        Where query heads went alone, no key/value head can, and the former are the units.
        """
        shape, queries = self.shape(config, index), self.queries(config, index)
        found = tuple(site for site in self.layout(config, shape) if site.units)
        if shape.alone is None or queries is None:
            return found
        return tuple(queries if site.name == ATTENTION else site for site in found)

    def attention(self, config: Any, index: int | None = None) -> Attention | None:
        """Where the parts of the heads of a block are; None where no directions inside them can go."""
        shape = self.shape(config, index)
        return None if shape.alone is not None or not shape.keys * shape.queries else self.inside(config, shape)

    def prunable(
        self, config: Any, attention: str | None, index: int | None = None, experts: str | None = None
    ) -> tuple[Site, ...]:
        """The sites of a block that `--attention` and `--experts` let be pruned, in the units that these say.

        `queries` counts the attention in query heads, `whole` a mixture in experts.
        """
        queries = self.queries(config, index) if attention == "queries" else None
        sites = (queries if queries and site.name == ATTENTION else site for site in self.sites(config, index))
        sites = (site.by_expert if experts == "whole" and site.experts else site for site in sites)
        return tuple(site for site in sites if attention != "none" or site.name != ATTENTION)

    def queries(self, config: Any, index: int | None = None) -> Site | None:
        """The attention counted in single query heads; None where no key/value head has several, or all have one."""
        shape = self.shape(config, index)
        attention = self.inside(config, shape)
        if attention is None or min(attention.queries, attention.heads) <= 1 or not self.whole_heads:
            return None
        heads = next(site for site in self.layout(config, shape) if site.name == ATTENTION)
        query = attention.query
        return replace(
            heads,
            unit="queries",
            units=attention.heads * attention.queries if shape.alone is None else shape.alone,
            group=attention.value_dim,
            producers=(Rows(query.layer, attention.head_dim, query.start),),
            shared=tuple(rows.layer for rows in heads.producers if rows.layer != query.layer),
            parts=attention.heads,
            table=f"{attention.module}.readers",
            tables=(),
        )

    def widths(self, config: Any, kept: Mapping[str, int], index: int | None = None) -> dict[str, int]:
        """Keyword arguments of `pruned_class.narrow`, an entry of `block_widths`: `kept`, and the rest as it was."""
        return self._widths(config, kept, self.shape(config, index))

    def whole(self, config: Any, index: int | None = None) -> dict[str, int]:
        """The same of a block of the dense model."""
        return self._widths(config, {}, self.dense_shape(config, index))

    def _widths(self, config: Any, kept: Mapping[str, int], shape: Shape) -> dict[str, int]:
        attention = self.inside(config, shape)
        sites = self.layout(config, shape)
        whole = {site.unit: site.units for site in (*sites, *(site.by_expert for site in sites if site.experts))}
        directions = {} if attention is None else attention.widths(kept)
        queries = kept.get("queries", shape.alone)
        fewer = queries is not None and queries < shape.keys * shape.queries
        alone = {"queries": queries} if queries and fewer else {}
        none = {"heads": 0} if queries == 0 else {}  # of an attention counted in query heads
        return {unit: kept.get(unit, units) for unit, units in whole.items()} | directions | alone | none

    def layer_fields(self, config: Any, kept: Mapping[str, int], index: int | None = None) -> dict[str, int]:
        """A block with what is `kept` in the fields of a stock config: one entry of `per_layer_config`.

        Where query heads went alone, each of those that are left has a copy of its keys and values when it attends.
        """
        widths, attention = self.widths(config, kept, index), self.attention(config)
        of_mlp = {unit: widths[unit] for unit in ("neurons", EXPERTS, SHARED) if unit in widths}
        if not widths["heads"]:  # nobody reads what it has, and some divide by it
            widths = self.whole(config, index) | of_mlp
        site = next(site for site in self.sites(config) if site.name == ATTENTION)
        of = heads_of(config)
        shared = of.keys == 1 < site.units  # the heads that go are query heads
        heads = widths.get("queries", widths["heads"] if shared else widths["heads"] * of.queries // of.keys)
        read = widths.get("queries", 1 if shared else widths["heads"])
        name = key_heads_field(config)
        fields = {"num_attention_heads": heads} | ({} if name is None else {name: read})
        head_dim = {"head_dim": of.width if attention is None else attention.kernel_width(widths)}
        for unit, count in of_mlp.items():
            fields |= self.stock[unit](config, count, index) or {}
        return fields | head_dim

    def stock_counts(self, config: Any, site: Site) -> tuple[int, ...]:
        """How many of a site's units the stock class can have, from all of them down."""
        counted = self.stock.get(site.unit)
        possible = (
            count for count in range(site.units - 1, 0, -1) if counted and counted(config, count, None) is not None
        )
        return (site.units, *possible)

    def stock_fields(self, config: Any, kept: Sequence[Mapping[str, int]]) -> dict[str, int] | None:
        """The config fields with which the stock class has the units that are `kept` in each block, or None.

        A stock config has one number for all blocks that are alike; those of which nothing is left are not there.
        """
        found: dict[Shape, tuple[int, dict[str, int]]] = {}  # the first of those that are alike in the dense model
        changed: set[str] = set()
        for index, block in enumerate(kept):
            widths, whole = self.widths(config, block, index), self.whole(config, index)
            if dropped(block):
                continue
            if found.setdefault(self.dense_shape(config, index), (index, widths))[1] != widths:
                return None
            changed |= {unit for unit in widths if widths[unit] != whole.get(unit)}
        # A layer that no block has any more, where the stock class has one in each.
        if not changed <= set(self.stock) or any(0 in widths.values() for _, widths in found.values()):
            return None
        fields: dict[str, int] = {}
        for index, widths in found.values():
            for unit in (changed or {"neurons"}) & widths.keys():
                counted = self.stock[unit](config, widths[unit], index)
                if counted is None or any(fields.get(name, value) != value for name, value in counted.items()):
                    return None
                fields |= counted
        return fields

    def linear_parameters(self, block: nn.Module, config: Any) -> int:
        """Parameters of the linear layers of one block as it is, the base of `--sparsity` (METHOD, section 6)."""
        shapes = [self.shape(config)]
        if self.mixture is not None:
            shapes.append(replace(shapes[0], experts=0))  # blocks without
        names = {name for shape in shapes for site in self.layout(config, shape) for name in site.layers}
        return sum(p.numel() for name, layer in block.named_modules() if name in names for p in layer.parameters())

    def site_cost(self, block: nn.Module, site: Site, with_block: bool = False) -> int:
        """Parameters that go with a site as a whole: all of its layers, but for the bias that it leaves.

        with_block: the block goes, and the bias with it.
        """
        bias = linear(block, site.consumer).bias
        return parameters_of(block, site) - (0 if bias is None or with_block else bias.numel())

    def beside_cost(self, block: nn.Module, site: Site) -> int:
        """Parameters that go with a site as a whole and are in none of its layers: norms of queries and keys."""
        if not site.enclosing:
            return 0
        every = sum(p.numel() for p in block.get_submodule(site.enclosing).parameters())
        return every - parameters_of(block, site)

    def router_row(self, block: nn.Module, site: Site) -> int:
        """Parameters of an expert's row of the router, which is no layer of its site; 0 where there are no experts."""
        return 0 if site.router is None else _row_cost(block.get_submodule(site.router))

    def unit_cost(self, block: nn.Module, site: Site) -> int:
        """Parameters that go with one unit, of every expert: rows (and biases) of its producers, g columns.

        With an expert all of its layers go.
        """
        if site.unit == EXPERTS:
            return parameters_of(block, site) // site.experts
        producers = sum(_row_cost(linear(block, rows.layer)) * rows.per_unit for rows in site.producers)
        return (producers + linear(block, site.consumer).out_features * site.group) * max(1, site.experts)

    def direction_cost(self, block: nn.Module, site: Site, attention: Attention, unit: str) -> int:
        """Parameters that go with one of `Attention.directions` in all heads of a block, whose attention is `site`."""
        query, key, value = (
            _row_cost(linear(block, part.layer)) for part in (attention.query, attention.key, attention.value)
        )
        scores = attention.heads * (attention.queries * query + key)
        columns = linear(block, site.consumer).out_features * attention.heads * attention.queries
        values = attention.heads * value + columns
        return {"dims": scores + values, "values": values, "pairs": 2 * scores}[unit]


def _row_cost(layer: nn.Module) -> int:
    """Parameters of one row of a layer."""
    return sum(p.numel() // p.shape[0] for p in layer.parameters())
