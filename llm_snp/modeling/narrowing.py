"""A stock model whose decoder blocks are narrowed, each to widths of its own.

The forward pass is the stock one: the stock model is built, its linear layers are cut, and the weights are loaded.
A pruned checkpoint carries a copy of this: it imports torch and transformers only.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class Narrowed:
    """In front of a stock model class: its blocks get the widths of `config.block_widths`.

    A class says where its blocks are (`blocks_path`), how one is narrowed of which something is left (`cut`), and where
    in it the last layers of attention and MLP are (`consumers`).
    """

    blocks_path: str
    cut: Any
    consumers: tuple[str, str] = ("self_attn.o_proj", "mlp.down_proj")
    # Before transformers 4.56 a static cache took its shape from the config, the same for every block.
    _supports_static_cache = False

    def __init__(self, config: Any):
        with _whole(config):
            super().__init__(config)  # type: ignore[call-arg]
        blocks = self.get_submodule(self.blocks_path)  # type: ignore[attr-defined]
        widths = config.block_widths
        if widths is None or len(widths) != len(blocks):
            found = "none" if widths is None else str(len(widths))
            raise ValueError(f"config.block_widths has {found} entries, expected one for each of {len(blocks)} blocks")
        whole = [_attention_shapes(block) for block in blocks]
        for block, width in zip(blocks, widths, strict=True):
            self.narrow(block, **width)
        self.other_caches = whole != [_attention_shapes(block) for block in blocks]

    @classmethod
    def narrow(cls, block: Any, heads: int, neurons: int, **left: int) -> None:
        """Narrow a block in place; of no heads, or no neurons, a `Nothing` is left in the place of attention or MLP."""
        cls.cut(block, heads=heads or 1, neurons=neurons, **left)
        for count, path in zip((heads, neurons), cls.consumers, strict=True):
            if not count:
                module, _, name = path.rpartition(".")
                constant = Constant(block.get_submodule(path).bias)
                values = _values(block, module) if path == cls.consumers[0] else 1
                nothing = Nothing(name, constant, values) if module else constant
                setattr(block, module or name, nothing)

    def init_continuous_batching(self, *args: Any, **options: Any) -> Any:
        """As of the stock model, where keys and values still have its shape. Raises `ValueError` where not.

        transformers' paged cache has one shape for all blocks, from the config; without this the error would be
        hidden in every request.
        """
        if self.other_caches:
            raise ValueError(
                "continuous batching keeps the keys and values of all blocks in one shape, and this model is pruned to "
                "others: use `generate`, or prune with --attention none or --format stock"
            )
        return super().init_continuous_batching(*args, **options)  # type: ignore[misc]


@contextmanager
def _whole(config: Any) -> Iterator[None]:
    """A config that reads as the dense model's in every block, for stock layers, which are narrowed afterwards.

    `per_layer_config` tells other readers of the widths. transformers before 5.14 does not know it.
    """
    layers = config.to_dict()["per_layer_config"] if getattr(config, "is_heterogeneous", False) else None
    if layers is not None:
        config.per_layer_config = None
    try:
        yield
    finally:
        if layers is not None:
            config.per_layer_config = layers


class Constant(nn.Module):
    """In the place of a linear layer whose inputs are all gone: its bias, or zeros, for every position."""

    bias: nn.Parameter | None

    def __init__(self, bias: nn.Parameter | None):
        super().__init__()
        self.register_parameter("bias", bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # In training the norm in front, which nothing else reads, gets a gradient of zero: several processes want one.
        found = hidden_states * 0 if hidden_states.requires_grad else torch.zeros_like(hidden_states)
        return found if self.bias is None else found + self.bias


class Nothing(nn.Module):
    """In the place of an attention or an MLP of which nothing is left but what its last layer adds: no cache, no mask.

    name: of that layer, whose bias a checkpoint has; values: how many a block expects, of an attention its weights,
    too, and in older versions of OPT the cache, as it is.
    """

    def __init__(self, name: str, constant: Constant, values: int):
        super().__init__()
        self.add_module(name, constant)
        self.name, self.values = name, values

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = getattr(self, self.name)(hidden_states)
        return found if self.values == 1 else (found, None, kwargs.get("past_key_value"))[: self.values]


def _values(block: Any, module: str) -> int:
    """How many values a block takes from its attention: two, and in older versions of OPT three."""
    try:
        source = inspect.getsource(type(block).forward)
    except OSError:  # only compiled files are there
        source = ""
    found = re.search(rf"^ *((?:\w+, )+\w+) = self\.{module}\(", source, re.MULTILINE)
    return found[1].count(",") + 1 if found else 2


def _attention_shapes(block: Any) -> list[torch.Size]:
    return [weight.shape for name, weight in block.named_parameters() if "att" in name]


def narrow_layer(layer: Any, rows: int | None = None, columns: int | None = None) -> None:
    """Keep the first `rows` outputs and `columns` inputs of a linear layer (or Conv1D), in place.

    Which ones does not matter: the caller loads the weights afterwards, and a freshly built model keeps its
    initialisation. Raises `ValueError` for more than there are.
    """
    transposed = isinstance(layer, Conv1D)
    weight = layer.weight.mT if transposed else layer.weight
    rows = weight.shape[0] if rows is None else rows
    columns = weight.shape[1] if columns is None else columns
    if rows > weight.shape[0] or columns > weight.shape[1]:
        raise ValueError(f"cannot narrow {tuple(weight.shape)} to {(rows, columns)}")
    cut = weight.detach()[:rows, :columns]
    layer.weight = _parameter(cut.mT if transposed else cut, layer.weight.requires_grad)
    if layer.bias is not None:
        layer.bias = _parameter(layer.bias.detach()[:rows], layer.bias.requires_grad)
    if transposed:
        layer.nx, layer.nf = columns, rows
    else:
        layer.out_features, layer.in_features = rows, columns


def _parameter(values: torch.Tensor, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(values.clone(memory_format=torch.contiguous_format), requires_grad)


class ConfigView:
    """A config of which some fields read differently, for layers that look up their own width in it."""

    def __init__(self, config: Any, **fields: Any):
        self.__dict__.update(fields, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_config" not in self.__dict__:  # copying and pickling ask an empty object
            raise AttributeError(name)
        return getattr(self.__dict__["_config"], name)


def convert_as(own: str, stock: str) -> None:
    """Let transformers 5 turn the names in files into those of a model, and back, as it does for the stock one.

    own, stock: both a type of model, or both the name of a class. Before 5 models have the names of files.
    """
    with suppress(ImportError):
        from transformers.conversion_mapping import (
            get_checkpoint_conversion_mapping,
            register_checkpoint_conversion_mapping,
        )

        if conversions := get_checkpoint_conversion_mapping(stock):
            register_checkpoint_conversion_mapping(own, conversions, overwrite=True)
