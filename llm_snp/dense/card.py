"""The card (README.md) of a dense model: of its metadata what is still true of the pruned one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..system.files import scratch, write_text
from ..system.libraries import explained
from ..system.private import CARRIED, carried_words, within

CARD_BYTES = 1_000_000  # of its beginning: a picture may follow
FRONT_MATTER = 1 << 16  # characters: YAML's time grows with the square of the length of some values


def card_metadata(directory: Path) -> dict[str, Any]:
    """Licence, language, tags and datasets of the card (README.md) of a model directory, as far as it has them.

    Each is a text or a list of texts: what else a card may have there (dates, tables, lists of lists) is left behind,
    because the result's card and report could not hold it, and so is what names a place on somebody's machine, and a
    card that is a link out of the directory.
    """
    path = directory / "README.md"
    matter = ""
    with suppress(OSError):  # a card is for people: one that cannot be read takes nothing from the model
        if path.is_file() and within(path, directory):
            with path.open("rb") as file:
                matter = front_matter(file.read(CARD_BYTES))
    found = _parsed(matter) if len(matter) <= FRONT_MATTER else {}
    if not found:  # one line that is wrong, or a hundred benchmarks, takes nothing from the licence
        for section in _sections(matter):
            found |= _parsed(section)
    if "language" in found:
        found["language"] = _with_norwegian(found["language"])
    return carried_words(found)


def front_matter(card: bytes) -> str:
    """A card without its text, which may be of another encoding."""
    head = re.match(rb"(?:\xef\xbb\xbf)?\s*---\n(.*?)\n---[ \t]*(?:\n|$)", re.sub(rb"\r\n?", b"\n", card), re.DOTALL)
    matter = b"" if head is None else head[1]
    try:
        return matter.decode()
    except UnicodeDecodeError:
        return matter.decode("latin-1")


def _sections(matter: str) -> Iterator[str]:
    """Each of those that are carried, as long as they are short enough together."""
    sections = {one.partition(":")[0]: one for one in re.split(r"^(?=[^\s#-])", matter, flags=re.MULTILINE)}
    left = FRONT_MATTER
    for section in (sections[name] for name in CARRIED if name in sections):
        if len(section) <= left:
            left -= len(section)
            yield section


def _parsed(matter: str) -> dict[str, Any]:
    """The fields of a front matter, or a part of it; none if it is no YAML."""
    from huggingface_hub import metadata_load

    found: Any = None
    with suppress(CheckpointError), explained(CheckpointError), scratch() as folder:  # it is read from files only
        write_text(folder / "README.md", f"---\n{matter}\n---\n")
        found = metadata_load(folder / "README.md")
    return found if isinstance(found, dict) else {}


def _with_norwegian(language: Any) -> Any:
    """`no`, which is false in YAML."""
    if isinstance(language, list):
        return ["no" if one is False else one for one in language]
    return "no" if language is False else language
