"""Qwen2 and Qwen2.5: biases in query, key and value."""

from __future__ import annotations

from ..modeling.qwen2 import SnpQwen2ForCausalLM
from .base import field
from .grouped import fewer_heads, like_llama

QWEN2 = like_llama("qwen2", SnpQwen2ForCausalLM, stock={"neurons": field("intermediate_size"), "heads": fewer_heads})
