"""Gemma (1)."""

from __future__ import annotations

from ..modeling.gemma import SnpGemmaForCausalLM
from .grouped import like_llama

GEMMA = like_llama("gemma", SnpGemmaForCausalLM)
