"""Qwen3: norms of queries and keys, shared by all heads."""

from __future__ import annotations

from functools import partial

from ..modeling.qwen3 import SnpQwen3ForCausalLM
from .attention import WHOLE
from .base import field
from .grouped import fewer_heads, like_llama, rotary

QWEN3 = like_llama(
    "qwen3",
    SnpQwen3ForCausalLM,
    # A norm over a head needs all of it.
    attention=partial(rotary, scores=WHOLE),
    stock={"neurons": field("intermediate_size"), "heads": fewer_heads},
)
