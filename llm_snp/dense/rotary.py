"""Rotary positions as configs of transformers before 5 have them, and engines that read those."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

THETA, SCALING, PART = "rope_theta", "rope_scaling", "partial_rotary_factor"
# What configs have of them beside `rope_parameters`; GPT-NeoX the last two.
FIELDS = (THETA, SCALING, "rope_local_base_freq", PART, "rotary_emb_base", "rotary_pct")


def older_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a parsed config.json; of one that transformers 5 has saved, from its `rope_parameters`.

    Those of several kinds of layers (Gemma 3), and GPT-NeoX's names, are not made: these models mostly have what
    transformers 4 takes where it finds nothing.
    """
    given = {name: fields[name] for name in FIELDS if name in fields}
    found = fields.get("rope_parameters")
    # Phi-3 has its part beside them, and nothing else of before.
    if given.keys() - {PART} or not isinstance(found, Mapping) or THETA not in found:
        return given
    scaling = {name: value for name, value in found.items() if name not in (THETA, PART)}
    made = {THETA: found[THETA], SCALING: None if scaling.get("rope_type", "default") == "default" else scaling}
    return made | ({PART: found[PART]} if PART in found else {}) | given
