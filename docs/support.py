"""The table of models in docs/families.md, from the code: python docs/support.py"""

from __future__ import annotations

import importlib

from transformers import AutoConfig

from llm_snp.families import FAMILIES, REASONS, SHARED
from llm_snp.families.llama_like import LLAMA_LIKE

# What is said of the units inside a head.
PARTS = {"dims": "directions", "values": "values", "pairs": "rotary pairs"}
# Whether query heads can go alone shows in a model of the family in which several read one key/value head.
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}


def table() -> str:
    """Markdown: what can be pruned of each family, and what is refused with its reason."""
    lines = ["| model type | what it is | attention | repair | stock |", "|---|---|---|---|---|"]
    for model_type, family in FAMILIES.items():
        config = AutoConfig.for_model(model_type)
        row = LLAMA_LIKE.get(model_type)
        about = row.about if row else importlib.import_module(f"llm_snp.families.{model_type}").__doc__ or ""
        what = about.splitlines()[0].rstrip(".")
        if row and row.since:
            what += f" (from transformers {row.since})"
        inside = family.attention(config)
        parts = [PARTS[unit] for unit in inside.directions] if inside else []
        if hasattr(config, "num_key_value_heads") and family.queries(AutoConfig.for_model(model_type, **GROUPED)):
            parts.append("query heads")
        attention = ", ".join([*parts, *["heads"] * family.whole_heads])
        repair = "residual" if all(site.stream for site in family.sites(config) if site.name != SHARED) else "dense"
        lines.append(f"| `{model_type}` | {what} | {attention} | {repair} | {', '.join(sorted(family.stock))} |")
    lines += [f"| `{model_type}` | refused: {reason} | | | |" for model_type, reason in REASONS.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
