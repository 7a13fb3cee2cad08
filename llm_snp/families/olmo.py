"""OLMo: norms without weights."""

from __future__ import annotations

from typing import Any

from ..modeling.olmo import SnpOlmoForCausalLM
from .attention import Attention
from .grouped import like_llama, rotary


def _attention(config: Any) -> Attention | None:
    # Clipped queries, keys and values are tied to their dimensions.
    return None if config.clip_qkv is not None else rotary(config)


OLMO = like_llama("olmo", SnpOlmoForCausalLM, attention=_attention)
