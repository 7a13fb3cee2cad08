"""Model families: what is a unit, who makes it, who reads it.

Those that are built like Llama are the rows of `llama_like`; the others have one short file of data each.
`FAMILIES` maps a config's `model_type` to its `Family`; `family_of` looks one up with a clear error.
May import modeling only.
"""

from __future__ import annotations

import importlib
from typing import Any

import transformers
from packaging.version import Version

from ..errors import UnsupportedModelError
from ..modeling.rotary import turn
from .attention import ATTENTION, FREE, PAIRS, SCORES, WHOLE, Attention, Heads, heads_of
from .base import OF_PRUNED, Family
from .gguf import GGUF, Gguf, Positions, positions_of
from .left import check_tables, check_widths, dropped, fewer_blocks, first_attentions
from .llama_like import LLAMA_LIKE
from .mixture import expert_of
from .registration import register_auto_classes
from .sites import EXPERTS, MLP, SHARED, Rows, Site, linear, parameters_of

__all__ = [
    "ATTENTION",
    "EXPERTS",
    "FAMILIES",
    "FREE",
    "GGUF",
    "MLP",
    "OF_PRUNED",
    "PAIRS",
    "SCORES",
    "SHARED",
    "WHOLE",
    "Attention",
    "Family",
    "Gguf",
    "Heads",
    "Positions",
    "Rows",
    "Site",
    "check_tables",
    "dropped",
    "expert_of",
    "family_of",
    "fewer_blocks",
    "first_attentions",
    "heads_of",
    "known_family",
    "linear",
    "parameters_of",
    "positions_of",
    "turn",
]

# Those that are not built like Llama: model type, and the file of this folder that describes it.
OWN = ("opt", "phi", "phi3", "gpt2", "gpt_neox", "falcon")
MODEL_TYPES = (*LLAMA_LIKE, *OWN)
LATENT = "its attention keeps queries, keys and values in a common latent space, which no description here covers"
# What is asked for and cannot be had, with the reason.
REASONS = {
    "gpt_oss": "its experts have biases, are stored transposed with gate and up in turn, and clip what they compute",
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "phimoe": "its router draws one expert after the other (sparsemixer), which no description here covers",
    "gemma3": "it is the model for images and text; save its language model by itself, as gemma3_text",
}


def _family(model_type: str) -> Family | None:
    """None for one that the installed transformers does not have, or not yet as it is needed."""
    row = LLAMA_LIKE.get(model_type)
    try:
        if row is None:
            return getattr(importlib.import_module(f".{model_type}", __name__), model_type.upper())
        return row.family() if Version(transformers.__version__) >= Version(row.since or "0") else None
    except ImportError:
        return None


FAMILIES = {model_type: family for model_type in MODEL_TYPES if (family := _family(model_type)) is not None}
register_auto_classes(FAMILIES.values())


def known_family(config: Any) -> Family | None:
    """That of a model, pruned or not; None for one of no family."""
    kind = config.model_type
    return next((one for one in FAMILIES.values() if kind in (one.model_type, one.pruned_model_type)), None)


def family_of(config: object) -> Family:
    """The family of a transformers config, also of a pruned model's.

    Raises `UnsupportedModelError` with the list of families otherwise, and `CheckpointError` for a pruned model whose
    blocks cannot have the widths that its config says.
    """
    model_type = getattr(config, "model_type", "unknown")
    pruned = {family.pruned_model_type: family for family in FAMILIES.values()}
    if model_type in pruned:
        pruned[model_type].check(config)
        check_widths(pruned[model_type], config)
        return pruned[model_type]
    if model_type not in FAMILIES:
        reason = f": {REASONS[model_type]}" if model_type in REASONS else ""
        if model_type in MODEL_TYPES:
            row = LLAMA_LIKE.get(model_type)
            least = f", at least {row.since}" if row and row.since else ""
            reason = f" with transformers {transformers.__version__}: they need a newer one{least}"
        raise UnsupportedModelError(
            f"models of type {model_type!r} cannot be pruned{reason}; supported: {', '.join(sorted(FAMILIES))}"
        )
    FAMILIES[model_type].check(config)
    return FAMILIES[model_type]
