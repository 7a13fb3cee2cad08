"""Mistral 7B and models of the same architecture."""

from __future__ import annotations

from ..modeling.mistral import SnpMistralForCausalLM
from .base import field
from .grouped import fewer_heads, like_llama

MISTRAL = like_llama(
    "mistral", SnpMistralForCausalLM, stock={"neurons": field("intermediate_size"), "heads": fewer_heads}
)
