"""Model families: what is a unit, who makes it, who reads it. One short file of data per family.

`FAMILIES` maps a config's `model_type` to its `Family`; `family_of` looks one up with a clear error.
"""

from __future__ import annotations

from ..errors import UnsupportedModelError
from .base import Attention, Family, Site, linear
from .opt import OPT

FAMILIES: dict[str, Family] = {family.model_type: family for family in (OPT,)}

__all__ = ["FAMILIES", "Attention", "Family", "Site", "family_of", "linear"]


def family_of(config: object) -> Family:
    """The family of a transformers config. Raises `UnsupportedModelError` with the list of families otherwise."""
    model_type = getattr(config, "model_type", "unknown")
    pruned = {family.pruned_model_type: family for family in FAMILIES.values()}
    if model_type in pruned:
        raise UnsupportedModelError(
            f"this checkpoint is already pruned (model type {model_type!r}); prune the dense model to another size"
        )
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"models of type {model_type!r} cannot be pruned yet; supported: {', '.join(sorted(FAMILIES))}"
        )
    FAMILIES[model_type].check(config)
    return FAMILIES[model_type]
