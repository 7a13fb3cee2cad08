"""Windows to train on, and others of the same texts to tell by whether that helps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import shares
from ..dense.data import Windows, as_windows, check_known, tokenize
from ..dense.mixture import mix, turns
from ..dense.readers import documents
from ..errors import CorpusError, OptionError
from .options import PASSES, HealConfig

# Of the windows trained on so many more are held out, but at least LEAST and at most MOST.
HELD_OUT, LEAST, MOST = 1 / 32, 8, 64
# Text is tokenised so many characters at a time, and read until there are enough tokens.
PIECE = 1 << 20


@dataclass(frozen=True)
class Material:
    """train: windows (N, T) in the order of training, some of them perhaps several times; held_out: (H, T), never
    trained on; passes: how often the text is read.
    """

    train: Windows
    held_out: Windows
    passes: float


def material(
    options: HealConfig, windows: int, length: int, tokenizer: Any, vocabulary: int, directory: Path
) -> Material:
    """`windows` windows of `length` tokens to train on, those of several texts by turns, drawn with the seed.

    Raises `CorpusError` for texts that are too short, saying how many tokens there are, and `CheckpointError` for
    tokens beyond the `vocabulary` of the model, whose tokenizer is that of `directory`.
    """
    given = shares(options.text)
    if windows < len(given):
        raise OptionError(
            f"--tokens comes to {windows} windows of {length}, for {len(given)} texts, each of which gives one at "
            "least; give more, or fewer texts"
        )
    held = max(min(MOST, round(windows * HELD_OUT)), LEAST, len(given))
    orders = [turns(list(given.values()), count) for count in (windows, held)]
    parts: list[list[Windows]] = [[], []]
    passes = 0.0
    for i, source in enumerate(given):
        counts = [order.count(i) for order in orders]
        ids = _ids(source, tokenizer, (counts[0] + counts[1]) * length)
        check_known(ids, vocabulary, directory)
        train, held_out, available = _draw(ids, counts, length, source, options.seed + i)
        passes = max(passes, counts[0] / (available - counts[1]))
        for part, tokens in zip(parts, (train, held_out), strict=True):
            part.append(as_windows(tokens, source, available, ids.numel()))
    mixed = [mix(part, order) for part, order in zip(parts, orders, strict=True)]
    return Material(mixed[0], mixed[1], passes)


def _draw(ids: Tensor, counts: list[int], length: int, source: str, seed: int) -> tuple[Tensor, Tensor, int]:
    """Windows to train on and held out, and how many the text has. Each pass is in another order."""
    wanted, held = counts
    available = ids.numel() // length
    if PASSES * (available - held) < wanted:
        least = (held + -(-wanted // PASSES)) * length
        raise CorpusError(
            f"text {source} has {ids.numel():,} tokens, and at least {least:,} are needed: windows of {length} to "
            f"train on, each up to {PASSES} times, and {held} that are held out; give more text, or lower --tokens or "
            "--sequence-length"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(available, generator=generator)
    rest = order[held:]
    passes = -(-wanted // len(rest))
    drawn = torch.cat([rest[torch.randperm(len(rest), generator=generator)] for _ in range(passes)])[:wanted]
    windows = ids[: available * length].view(available, length)
    return windows[drawn], windows[order[:held]], available


def _ids(source: str, tokenizer: Any, enough: int) -> Tensor:
    """Token ids (n,) of a text, of at most about as much of it as gives `enough`."""
    parts, count = [], 0
    for piece in _pieces(documents(source, "calibration")):
        if piece.strip():
            parts.append(tokenize(tokenizer, piece, source))
            count += parts[-1].numel()
        if count >= enough:
            break
    if not parts:
        raise CorpusError(f"{source} has no text")
    return torch.cat(parts)


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Texts joined by blank lines, in pieces of at least `PIECE` characters."""
    waiting: list[str] = []
    size = 0
    for text in texts:
        waiting.append(text)
        size += len(text) + 2
        if size >= PIECE:
            yield "\n\n".join(waiting)
            waiting, size = [], 0
    if waiting:
        yield "\n\n".join(waiting)
