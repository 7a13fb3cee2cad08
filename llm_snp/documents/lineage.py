"""Of a model that was pruned before: what it was made of, and how much of the dense model is gone in all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..dense.skeleton import empty_model, linear_blocks
from ..families import Family
from .healing import healed_tokens
from .schema import LARGEST
from .shareable import hub_id


def parents(before: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The models that a pruned one was made of, the first one first, from its report.

    Each with its name, whether that is one on the Hub, the share of its blocks' linear parameters that went, and how
    many tokens what was left was trained for after that.
    """
    last = {"name": before["model"]["name"], "hub": hub_id(before["model"]) is not None}
    last |= {"removed": before["sparsity"]["achieved"], "healed": min(LARGEST, healed_tokens(before))}
    return [*before.get("parents", []), last]


def dense_base(family: Family, whole: Any, before: Mapping[str, Any] | None, base: int) -> int:
    """Linear parameters in the blocks of the dense model, of a model that has `base` of them left.

    From the report of the run that made it if that is about as many, else from its config. whole: the dense config.
    """
    sparsity = {} if before is None else before["sparsity"]
    there, gone = (sparsity.get(name) for name in ("block_parameters", "block_parameters_removed"))
    if isinstance(there, int) and isinstance(gone, int) and there - gone == base:
        known = sparsity.get("dense_block_parameters", there)
        if isinstance(known, int) and known >= there:
            return known
    blocks, _ = linear_blocks(empty_model(whole), family.blocks)
    return sum(family.linear_parameters(block, whole) for block in blocks)
