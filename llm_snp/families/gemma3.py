"""Gemma 3, text only: what a layer gives is normed before it joins the residual stream."""

from __future__ import annotations

from functools import partial

from ..modeling.gemma3 import SnpGemma3ForCausalLM
from .attention import WHOLE
from .grouped import like_llama, rotary, sites

GEMMA3 = like_llama(
    "gemma3_text",
    SnpGemma3ForCausalLM,
    sites=partial(sites, attention=None, mlp=None),
    # A norm over a head needs all of it.
    attention=partial(rotary, scores=WHOLE),
)
