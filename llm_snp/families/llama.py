"""Llama: grouped queries, a gated MLP, rotary positions."""

from __future__ import annotations

from ..modeling.llama import SnpLlamaForCausalLM
from .grouped import like_llama

LLAMA = like_llama("llama", SnpLlamaForCausalLM)
