"""Rotary positions as configs of transformers before 5 have them, and engines that read those."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

THETA, SCALING, PART = "rope_theta", "rope_scaling", "partial_rotary_factor"
# Where layers of two kinds have positions of their own, those of the second (Gemma 3).
FULL, SLIDING, LOCAL = "full_attention", "sliding_attention", "rope_local_base_freq"
ORIGINAL = "original_max_position_embeddings"
# What configs have of them beside `rope_parameters`; GPT-NeoX the last two.
FIELDS = (THETA, SCALING, LOCAL, PART, "rotary_emb_base", "rotary_pct")


def older_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a parsed config.json; of one that transformers 5 has saved, from its `rope_parameters`.

    GPT-NeoX's names are not made: these models mostly have what transformers 4 takes where it finds nothing.
    """
    given = {name: fields[name] for name in FIELDS if name in fields}
    # Phi-3 has its part beside them, and nothing else of before.
    return given if given.keys() - {PART} else _made(fields.get("rope_parameters")) | given


def _made(found: Any) -> dict[str, Any]:
    """The fields that `rope_parameters` stand for, whether for all layers or for two kinds of them, or none."""
    if not isinstance(found, Mapping):
        return {}
    if THETA not in found:
        local = found.get(SLIDING)
        full = _made(found.get(FULL))
        return full | ({LOCAL: local[THETA]} if full and isinstance(local, Mapping) and THETA in local else {})
    kind = found.get("rope_type", "default")
    scaling = {name: value for name, value in found.items() if name not in (THETA, PART)}
    beside = {PART: found[PART]} if PART in found else {}
    if kind == "longrope":  # Phi-3 takes "type" there, and no copy of what is in its config
        beside |= {ORIGINAL: scaling.pop(ORIGINAL)} if ORIGINAL in scaling else {}
        scaling = {"type": kind} | {name: value for name, value in scaling.items() if name not in ("type", "rope_type")}
    return {THETA: found[THETA], SCALING: None if kind == "default" else scaling} | beside
