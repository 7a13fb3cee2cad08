"""OLMo 3: as OLMo 2, with windows in some blocks."""

from __future__ import annotations

from ..modeling.olmo3 import SnpOlmo3ForCausalLM
from .grouped import normed_as_one

OLMO3 = normed_as_one("olmo3", SnpOlmo3ForCausalLM)
