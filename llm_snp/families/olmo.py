"""OLMo: norms without weights."""

from __future__ import annotations

from ..modeling.olmo import SnpOlmoForCausalLM
from .llama import like_llama

OLMO = like_llama("olmo", SnpOlmoForCausalLM)
