"""Makes the pruned model classes known to transformers' Auto classes."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .base import Family


def register_auto_classes(families: Iterable[Family]) -> None:
    """Register the pruned classes of families; doing it again is harmless."""
    for family in families:
        config_class = family.pruned_class.config_class
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, family.pruned_class.base_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, family.pruned_class, exist_ok=True)
