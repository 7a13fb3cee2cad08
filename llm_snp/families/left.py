"""What an earlier pruning has left of a model's blocks (`block_widths`), and what must be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from .sites import EXPERTS

OTHER = {"heads": "neurons", "neurons": "heads"}
SHOWN = 80  # characters at most that an error quotes


def dropped(kept: Mapping[str, int]) -> bool:
    """Whether nothing is left of a block's attention and MLP, so that the block itself goes."""
    return 0 in (kept.get("heads"), kept.get("queries")) and kept.get("neurons") == 0


def first_attentions(config: Any) -> set[int]:
    """The blocks that have to keep their attention: the first one, and the first of each kind (with a window, without).

    A KV cache tells the length of what it holds by them.
    """
    kinds = getattr(config, "layer_types", None) or ["all"] * config.num_hidden_layers
    return {kinds.index(kind) for kind in set(kinds)} | {0}


def fewer_blocks(config: Any, left: Sequence[int]) -> dict[str, Any]:
    """The config fields with which a model has the blocks `left` only."""
    if len(left) == config.num_hidden_layers:
        return {}
    name = getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    kinds = getattr(config, "layer_types", None)
    return {name: len(left)} | ({} if kinds is None else {"layer_types": [kinds[index] for index in left]})


def check_widths(family: Any, config: Any) -> None:
    """Raise `CheckpointError` unless `block_widths` says of every block what can be left of it; family: a `Family`."""
    widths, queries = config.block_widths, family.queries(config)
    blocks, advice = config.num_hidden_layers, "the config.json of another model? Put back the one it was saved with"
    if not isinstance(widths, list) or len(widths) != blocks:
        found = len(widths) if isinstance(widths, list) else "no"
        raise CheckpointError(f"block_widths in config.json has {found} entries for {blocks} blocks; is it {advice}")
    first = first_attentions(config)
    for index, block in enumerate(widths):
        dense = family.whole(config, index)
        whole = dense | ({} if queries is None else {"queries": queries.units})
        if not isinstance(block, dict) or not {"heads", "neurons"} <= set(block) <= set(whole):
            expected = ", ".join(dense)
            raise CheckpointError(
                f"block_widths of block {index} in config.json is {str(block)[:SHOWN]}, expected {expected}; is it "
                f"{advice}"
            )
        for unit, left in block.items():
            # Nothing may be left of an attention or an MLP, where the other one is there.
            stays = unit not in OTHER or block.get(OTHER[unit]) == 0 or (unit == "heads" and index in first)
            least = int(stays or family.mixture is not None)
            if unit == EXPERTS:
                least = getattr(config, family.mixture.picked)
            if not isinstance(left, int) or isinstance(left, bool) or not least <= left <= whole[unit]:
                raise CheckpointError(
                    f"block_widths of block {index} in config.json has {str(left)[:SHOWN]} {unit}, expected "
                    f"{least} to {whole[unit]}; is it {advice}"
                )
        alone, shape = block.get("queries"), family.shape(config, index)
        if alone is not None and not shape.keys <= alone <= shape.keys * shape.queries:
            raise CheckpointError(
                f"block_widths of block {index} in config.json has {alone} queries for {shape.keys} heads, "
                f"expected {shape.keys} to {shape.keys * shape.queries}; is it {advice}"
            )


def check_tables(family: Any, config: Any, tables: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` for a table of a pruned model (see `modeling.rotary`) with numbers it cannot have.

    tables: by their name in the model; their shapes are right.
    """
    for index in range(config.num_hidden_layers):
        shape = family.shape(config, index)
        attention = family.inside(config, shape)
        if attention is None:
            continue
        pairs, readers = attention.pair_table, f"{attention.module}.readers"
        for name, count, each in ((pairs, family.dense_shape(config, index).scores // 2, 1), (readers, shape.keys, 0)):
            table = tables.get(f"{family.blocks}.{index}.{name}")
            if table is None or not table.numel():
                continue
            sound = bool((table.diff() >= each).all()) and table.min() >= 0 and table.max() < count
            unread = name == readers and len(set(table.tolist())) != count  # a head that no query head reads
            if not sound or unread:
                raise CheckpointError(
                    f"{family.blocks}.{index}.{name} in the weights has other numbers than those of "
                    f"{count} {'rotary pairs' if name == pairs else 'heads'}, ascending; the file is damaged"
                )
