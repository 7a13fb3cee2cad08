"""Gemma 2: what a layer gives is normed before it joins the residual stream."""

from __future__ import annotations

from functools import partial

from ..modeling.gemma2 import SnpGemma2ForCausalLM
from .grouped import like_llama, sites

GEMMA2 = like_llama("gemma2", SnpGemma2ForCausalLM, sites=partial(sites, attention=None, mlp=None))
