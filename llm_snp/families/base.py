"""The vocabulary in which a model family is described.

A *unit* is a neuron or an attention head. Its *producers* are the layers whose rows make it, its *consumer* is the
linear layer that reads it. A *site* is one consumer with its producers in one decoder block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import UnsupportedModelError


@dataclass(frozen=True)
class Site:
    """One consumer with its producers; module names are relative to the decoder block.

    name         `attention` or `mlp`
    unit         what is counted: `heads` or `neurons`
    units        how many there are in the dense model
    group        g, columns of the consumer (and rows of each producer) per unit
    producers    linear layers whose rows make the units; consumer: the linear layer that reads them
    stream       the module whose input is the residual stream that the consumer's output is added to
    nonnegative  whether the consumer's input is ≥ 0 by construction
    """

    name: str
    unit: str
    units: int
    group: int
    producers: tuple[str, ...]
    consumer: str
    stream: str
    nonnegative: bool = False


@dataclass(frozen=True)
class Attention:
    """Where the parts of the attention are, for subspaces inside the heads; only without rotary embeddings.

    `value` rows and `consumer` columns share one free basis per head, `query` and `key` rows another.
    """

    site: str
    query: str
    key: str
    value: str
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Family:
    """A model family as data.

    model_type, pruned_model_type   of the dense and of the pruned config
    blocks       path of the decoder blocks in the causal-LM model
    sites        config -> the sites of a block, in the order in which they are pruned
    attention    config -> where the heads are
    widths       (config, kept per unit name) -> keyword arguments of `narrow`, and an entry of `block_widths`
    narrow       narrows a live block in place
    pruned_config, pruned_class     of `modeling_snp`
    stock_fields (config, widths of all blocks) -> config fields with which the stock class has these widths, or None
    renames      (regular expression, replacement) pairs from other key spellings to the model's own, applied in order
    check        raises `UnsupportedModelError` for a config that would be pruned wrongly
    """

    model_type: str
    pruned_model_type: str
    blocks: str
    sites: Callable[[Any], tuple[Site, ...]]
    attention: Callable[[Any], Attention]
    widths: Callable[[Any, dict[str, int]], dict[str, int]]
    narrow: Callable[..., None]
    pruned_config: type
    pruned_class: type
    stock_fields: Callable[[Any, list[dict[str, int]]], dict[str, Any] | None]
    renames: tuple[tuple[str, str], ...]
    check: Callable[[Any], None]

    def linear_parameters(self, block: nn.Module, config: Any) -> int:
        """Parameters of the linear layers of one block, the base of `--sparsity` (METHOD, section 6)."""
        names = {name for site in self.sites(config) for name in (*site.producers, site.consumer)}
        return sum(p.numel() for name in names for p in linear(block, name).parameters())

    def unit_cost(self, block: nn.Module, site: Site) -> int:
        """Parameters that go with one unit: g rows (and biases) of each producer, g columns of the consumer."""
        cost = linear(block, site.consumer).out_features * site.group
        for name in site.producers:
            cost += sum(p.numel() // p.shape[0] * site.group for p in linear(block, name).parameters())
        return cost


def linear(block: nn.Module, name: str) -> nn.Linear:
    """The linear layer of that name in a block. Raises `UnsupportedModelError` if it is something else."""
    layer = block.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise UnsupportedModelError(f"{name} is a {type(layer).__name__}, expected a linear layer")
    return layer
