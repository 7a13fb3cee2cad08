"""OLMo 2: all query heads are normed together, and all keys, and what a layer gives before it joins the stream."""

from __future__ import annotations

from ..modeling.olmo2 import SnpOlmo2ForCausalLM
from .grouped import normed_as_one

OLMO2 = normed_as_one("olmo2", SnpOlmo2ForCausalLM)
