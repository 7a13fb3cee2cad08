"""The vocabulary in which the layers of a block are described.

A *unit* is a neuron or an attention head. Its *producers* are the layers whose rows make it, its *consumer* is the
linear layer that reads it. A *site* is one consumer with its producers in one decoder block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError

MLP, SHARED = "mlp", "shared"
# The unit of a mixture of which whole experts go.
EXPERTS = "experts"


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

    name         `attention` or `mlp`; `shared` is the MLP that all tokens go through beside the experts
    unit         what is counted: `heads`, `queries`, `neurons`, `shared` neurons or `experts`. With grouped queries a
                 head is a key/value head with the query heads that read it, and these alone are `queries`
    units        how many there are
    group        g, columns of the consumer per unit
    producers    the rows that make the units; consumer: the linear layer that reads them
    stream       the module whose input is the residual stream that the consumer's output is added to, as it is; None
                 where a norm lies between
    nonnegative  whether the consumer's input is ≥ 0 by construction
    shared       linear layers that all units have in common, which stay whole
    parts        how many parts the units have, each of which keeps at least one: the query heads of a key/value head
    table        the buffer of a pruned model that says to which part each unit belongs that is left; without it the
                 parts are runs of units, equally long
    tables       buffers that may be there, with a row for each unit
    holder       what has the experts of a mixture as children 0, 1, ...; None where there are none
    experts      how many there are, all with as many units: the other names are those of the first, see `members`
    picked       how many of them work on a token, and no fewer are left
    router       what picks them: a layer with a row for each
    expert       which of them it is, of a site that `members` has given
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
    parts: int = 1
    table: str | None = None
    tables: tuple[str, ...] = ()
    holder: str | None = None
    experts: int = 0
    picked: int = 0
    router: str | None = None
    expert: int | None = None

    @property
    def by_expert(self) -> Site:
        """The site of a mixture counted in whole experts instead of their neurons."""
        return self if self.unit == EXPERTS else replace(self, unit=EXPERTS, units=self.experts, group=self.units)

    @property
    def columns(self) -> int:
        """Of a consumer, that of each expert."""
        return self.group if self.unit == EXPERTS else self.units * self.group

    @property
    def least(self) -> int:
        """How many units have to stay."""
        return self.picked if self.unit == EXPERTS else self.parts

    @property
    def members(self) -> tuple[Site, ...]:
        """The site of each expert, which keeps units of its own choice, as many as the others; or the site itself."""
        return tuple(map(self._of, range(self.experts))) if self.experts else (self,)

    def _of(self, expert: int) -> Site:
        def named(layer: str) -> str:
            return layer.replace(f"{self.holder}.0.", f"{self.holder}.{expert}.")

        producers = tuple(replace(rows, layer=named(rows.layer)) for rows in self.producers)
        consumer, name = named(self.consumer), f"{self.name}.{expert}"
        of = replace(self, unit="neurons", units=self.columns, group=1)
        return replace(of, name=name, producers=producers, consumer=consumer, experts=0, expert=expert)

    @property
    def output(self) -> str:
        """The module that gives what the site adds to the model: its consumer, or all experts together."""
        return self.consumer if self.holder is None else self.holder

    @property
    def joined(self) -> str:
        """The module whose output is the site's part of the residual stream: of experts with what is beside them."""
        return self.consumer if self.holder is None else self.holder.rpartition(".")[0]

    @property
    def layers(self) -> tuple[str, ...]:
        """Every linear layer of the site once: the producers, what they share, then the consumer."""
        if self.experts:
            return tuple(layer for member in self.members for layer in member.layers)
        return (*dict.fromkeys(rows.layer for rows in self.producers), *self.shared, self.consumer)

    @property
    def enclosing(self) -> str:
        """The module that is nothing but the site, relative to the block; empty if its layers stand in the block."""
        return self.consumer.rpartition(".")[0]

    def part_of(self, state: Mapping[str, Tensor]) -> Tensor:
        """(units,) long: the part that each unit belongs to; state: the tensors of the block."""
        if self.table is not None and self.table in state:
            return state[self.table]
        return torch.arange(self.units) // (self.units // self.parts)

    def rows_left(self, layer: str, count: int, columns: Tensor) -> Tensor:
        """Of `count` rows of a producer those that stay, ascending, if of the consumer's `columns` (k·g,) are left."""
        gone = torch.ones(self.units, dtype=torch.bool)
        gone[columns // self.group] = False
        stays = torch.ones(count, dtype=torch.bool)
        for rows in self.producers:
            if rows.layer == layer:
                stays[rows.of(self.units)[gone]] = False
        return stays.nonzero().squeeze(1)


def parameters_of(block: nn.Module, site: Site) -> int:
    """Parameters of all linear layers of a site, of every expert."""
    return sum(p.numel() for name in site.layers for p in linear(block, name).parameters())


def linear(block: nn.Module, name: str) -> nn.Linear:
    """The linear layer of that name in a block. Raises `UnsupportedModelError` if it is something else."""
    layer = block.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise UnsupportedModelError(f"{name} is a {type(layer).__name__}, expected a linear layer")
    return layer
