"""Model families: what is a unit, who makes it, who reads it. One short file of data per family.

`FAMILIES` maps a config's `model_type` to its `Family`; `family_of` looks one up with a clear error.
May import modeling only.
"""

from __future__ import annotations

import importlib

import transformers
from packaging.version import Version

from ..errors import UnsupportedModelError
from ..modeling.rotary import turn
from .attention import ATTENTION, FREE, PAIRS, SCORES, WHOLE, Attention
from .base import Family
from .sites import MLP, Rows, Site, linear

__all__ = [
    "ATTENTION",
    "FAMILIES",
    "FREE",
    "MLP",
    "PAIRS",
    "SCORES",
    "WHOLE",
    "Attention",
    "Family",
    "Rows",
    "Site",
    "family_of",
    "linear",
    "turn",
]

# model_type -> the file of this folder that describes it.
FILES = {
    "opt": "opt",
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi": "phi",
    "phi3": "phi3",
    "gpt2": "gpt2",
    "gpt_neox": "gpt_neox",
    "falcon": "falcon",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "olmo3": "olmo3",
}
# The first transformers with which a family works: before, Qwen3 and OLMo 3 were not there, and Gemma 2 and 3 had a KV
# cache of one shape for all blocks.
SINCE = {"qwen3": "4.51", "gemma2": "4.56", "gemma3_text": "4.56", "olmo3": "4.57"}
EXPERTS = "each expert reads other tokens, and would need moments, a repair and a width of its own"
# What is asked for and cannot be had, with the reason.
REASONS = {
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "olmoe": EXPERTS,
    "phimoe": EXPERTS,
    "gemma3": "it is the model for images and text; save its language model by itself, as gemma3_text",
}


def _families() -> dict[str, Family]:
    """Those that the installed transformers has."""
    found = {}
    for model_type, file in FILES.items():
        if Version(transformers.__version__) < Version(SINCE.get(model_type, "0")):
            continue
        try:
            module = importlib.import_module(f".{file}", __name__)
        except ImportError:  # a younger model than this transformers
            continue
        found[model_type] = getattr(module, file.upper())
    return found


FAMILIES = _families()


def family_of(config: object) -> Family:
    """The family of a transformers config. Raises `UnsupportedModelError` with the list of families otherwise."""
    model_type = getattr(config, "model_type", "unknown")
    if model_type in {family.pruned_model_type for family in FAMILIES.values()}:
        raise UnsupportedModelError(
            f"this checkpoint is already pruned (model type {model_type!r}); prune the dense model to another size"
        )
    if model_type not in FAMILIES:
        reason = f": {REASONS[model_type]}" if model_type in REASONS else ""
        if model_type in FILES:
            least = f", at least {SINCE[model_type]}" if model_type in SINCE else ""
            reason = f" with transformers {transformers.__version__}: they need a newer one{least}"
        raise UnsupportedModelError(
            f"models of type {model_type!r} cannot be pruned{reason}; supported: {', '.join(sorted(FAMILIES))}"
        )
    FAMILIES[model_type].check(config)
    return FAMILIES[model_type]
