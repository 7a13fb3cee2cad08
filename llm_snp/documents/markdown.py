"""Texts, tables, lists and code as Markdown has them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from .shareable import told_apart

MARKUP = re.compile(r"[\\<\[]|&(?=#?\w+;)")  # `&#58;` is a colon before addresses are looked for
# What an address has, which is made a link of; and a word joiner, with which it is none.
ADDRESS = re.compile(r":(?=//)|www(?=\.)|(?<=\S)@(?=\S)|(mailto|xmpp)(?=:)", re.IGNORECASE)
UNSEEN = "\u2060"
# How a heading, quotation, list, rule or block of code begins: where a backslash makes text of it.
BLOCK = re.compile(r"^(?=#+(\s|$)|>|[-+*](\s|$)|~~~|([-_*]\s*){3,}$|=+\s*$)|^\d+(?=[.)](\s|$))")


def as_text(content: Any) -> Any:
    """A copy of a report whose texts Markdown takes for texts: no links, HTML, headings or lists, and nothing is code.

    Addresses, which the Hub makes links of as they are, get a character in them that is not seen.
    """
    if isinstance(content, str):
        plain = MARKUP.sub(r"\\\g<0>", " ".join(content.replace("`", "'").split()))
        return ADDRESS.sub(rf"\g<0>{UNSEEN}", BLOCK.sub(r"\g<0>\\", plain))
    if isinstance(content, dict):
        return dict(zip(told_apart(map(as_text, content)), map(as_text, content.values()), strict=True))
    return [as_text(one) for one in content] if isinstance(content, list) else content


def code(line: str) -> str:
    """A line set as code, between marks that are longer than any in it: it may be one of them."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence}\n{line}\n{fence}"


def listed(sentences: Sequence[str]) -> str:
    """A list below a paragraph, if there is anything to list."""
    return "".join(("\n\n- " if i == 0 else "\n- ") + sentence for i, sentence in enumerate(sentences))


def change(dense: float, pruned: float, style: str) -> tuple[str, str, str]:
    return style.format(dense), style.format(pruned), f"{pruned / dense - 1:+.1%}" if dense else ""


def table_of(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
