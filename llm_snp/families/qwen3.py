"""Qwen3: norms of queries and keys, shared by all heads."""

from __future__ import annotations

from ..modeling.qwen3 import SnpQwen3ForCausalLM
from .base import field
from .llama import fewer_heads, like_llama

QWEN3 = like_llama("qwen3", SnpQwen3ForCausalLM, stock={"neurons": field("intermediate_size"), "heads": fewer_heads})
