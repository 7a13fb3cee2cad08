"""Writes the files of llm_snp/modeling that are llama.py with other names and a few more lines: make families

A pruned model carries its family's file, so each family has a whole one. Those of the rows in
`llm_snp/families/llama_like.py` come from llama.py and the row; a test compares.
"""

from __future__ import annotations

from pathlib import Path

import llm_snp
from llm_snp.families.llama_like import LLAMA_LIKE, LlamaLike

MODELING = Path(llm_snp.__file__).parent / "modeling"
TEMPLATE = "llama"
# Above the docstring, so that it does not travel: `llm_snp.result.bundle` begins there.
HEAD = "# Written by `make families` from llama.py and a row of ../families/llama_like.py: change those.\n"

# What the docstring of the config says is left of each block, by `LlamaLike.normed`.
WIDTHS = {
    None: """\
`heads` (of keys), `neurons`,
    the `values` and rotary `pairs` of a head, and `queries` where some went alone.""",
    "head": """\
`heads` (of keys), `neurons`,
    the `values` of a head, and `queries` where some went alone.""",
    "all heads": """\
`heads` (all), `neurons` and the `values` of a
    head.""",
}
# What an attention may have besides.
EAGER = "    eager = staticmethod(eager_attention_forward)\n"
PROJECT = """\
    norms = ()  # they go over all heads together, before these are told apart

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key = self.q_norm(self.q_proj(hidden)), self.k_norm(self.k_proj(hidden))
        return self.by_head(query, key, self.v_proj(hidden))
"""
OPTIONS = """
    def attention_options(self) -> dict[str, Any]:
        return {hands_on}
"""


def source(row: LlamaLike) -> str:
    """The text of a row's file, without `HEAD`. Raises `ValueError` where llama.py has not what is to be replaced."""
    text = row.text_classes or row.classes
    classes = ", ".join(sorted([f"{text}Config", f"{text}Model", f"{row.classes}ForCausalLM"]))
    found = (MODELING / f"{TEMPLATE}.py").read_text(encoding="utf-8")
    for old, new in (
        ("LlamaConfig, LlamaForCausalLM, LlamaModel", classes),
        ("LlamaConfig", f"{text}Config"),
        ("LlamaModel", f"{text}Model"),
        ("LlamaForCausalLM", f"{row.classes}ForCausalLM"),
        ("LlamaAttention", f"{row.classes}Attention"),
        ("models.llama.modeling_llama", f"models.{row.file}.modeling_{row.file}"),
        ('"snp_llama"', f'"snp_{row.model_type}"'),
        ("Llama with", f"{row.title or row.classes} with"),
        (WIDTHS[None], WIDTHS[row.normed]),
    ):
        found = _replaced(found, old, new)
    if row.normed == "all heads":
        found = _replaced(found, EAGER, EAGER + PROJECT)
        found = _replaced(found, "from transformers import", "from torch import Tensor\nfrom transformers import")
    if row.mixture:
        found = _replaced(
            found, "from .narrowing", "from .mixture import as_in_files, narrow_mixture_block\nfrom .narrowing"
        )
        found = _replaced(found, "NarrowHeads, narrow_llama_block", "NarrowHeads").replace(
            "narrow_llama", "narrow_mixture"
        )
        found = _replaced(
            found, "block_widths = None\n", f"block_widths = None\n\n\nas_in_files(Snp{row.classes}Config)\n"
        )
        beside = ", `shared` ones" if row.mixture.shared else ""
        found = _replaced(found, "`neurons`", f"`neurons` of each\n    of the `experts`{beside}")
    if row.hands_on:
        options = OPTIONS.format(hands_on=row.hands_on)
        found = _replaced(found, "\n\n\n_narrow =", f"\n{options}\n\n_narrow =")
        found = _replaced(found, "import partial\n", "import partial\nfrom typing import Any\n")
    return found


def _replaced(text: str, old: str, new: str) -> str:
    if old not in text:
        raise ValueError(f"{TEMPLATE}.py no longer has {old!r}, which families differ in; change docs/families.py, too")
    return text.replace(old, new)


def files() -> dict[Path, str]:
    """What each file is to hold, but for the template."""
    return {MODELING / f"{row.file}.py": HEAD + source(row) for row in LLAMA_LIKE.values() if row.file != TEMPLATE}


if __name__ == "__main__":
    for path, content in files().items():
        path.write_text(content, encoding="utf-8")
        print(path)
