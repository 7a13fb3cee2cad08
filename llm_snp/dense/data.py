"""Text to calibrate and to evaluate on, as token windows: from the Hub, a local file, or written by the model itself.

The evaluation protocol is the usual one: WikiText-2 raw test as `"\\n\\n".join(rows)`, tokenised once with the
model's own tokenizer, consecutive non-overlapping windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, CorpusError
from ..system.libraries import explained
from .readers import documents
from .whole import generate_plainly

# Tokenising hundreds of megabytes to draw a few windows helps nobody: calibration reads this much of a file.
CALIBRATION_CHARACTERS = 32_000_000
# Beside the calibration windows so many others are kept, to tell by them how closely the calibration was fitted.
UNSEEN = 8


@dataclass(frozen=True)
class Windows:
    """Token windows with their origin.

    tokens (N, T) long; source: what the user named; sha256 of the token ids; available: windows to choose from;
    text_tokens: tokens of the whole text that was read; parts: where they are of several texts, those of each;
    unseen (K, T) long: a few other windows of the text, where they were drawn from it and there are any.
    """

    tokens: Tensor
    source: str
    sha256: str
    available: int
    text_tokens: int
    parts: tuple[Windows, ...] = ()
    unseen: Tensor | None = None


def as_windows(
    tokens: Tensor,
    source: str,
    available: int,
    text_tokens: int,
    parts: tuple[Windows, ...] = (),
    unseen: Tensor | None = None,
) -> Windows:
    """Windows with their hash."""
    digest = hashlib.sha256(tokens.to(torch.int32).contiguous().numpy().tobytes()).hexdigest()
    return Windows(tokens, source, digest, available, text_tokens, parts, unseen)


def calibration_windows(source: str, tokenizer: Any, samples: int, length: int, seed: int) -> Windows:
    """`samples` of the non-overlapping windows of `length` tokens of a corpus, drawn with `seed`.

    Raises `CorpusError` if there are too few, saying how many there are.
    """
    ids = tokenize(tokenizer, _join(documents(source, "calibration"), CALIBRATION_CHARACTERS), source)
    available = ids.numel() // length
    if available < samples:
        raise CorpusError(
            f"calibration text {source} has {ids.numel()} tokens, which is {available} windows of {length}; "
            f"--samples asks for {samples}: lower --samples or --sequence-length, or give more text"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[: samples + UNSEEN]
    drawn = ids[: available * length].view(available, length)[order]
    return as_windows(drawn[:samples], source, available, ids.numel(), unseen=drawn[samples:])


def evaluation_windows(source: str, tokenizer: Any, length: int) -> Windows:
    """All consecutive non-overlapping windows of `length` tokens of a corpus; the rest at its end is dropped.

    Raises `CorpusError` if there is not one.
    """
    ids = tokenize(tokenizer, _join(documents(source, "evaluation")), source)
    available = ids.numel() // length
    if not available:
        raise CorpusError(
            f"evaluation text {source} has {ids.numel()} tokens, less than one window of {length}: "
            "lower --sequence-length or give more text"
        )
    return as_windows(ids[: available * length].view(available, length), source, available, ids.numel())


def tokenize(tokenizer: Any, text: str, source: str) -> Tensor:
    """The whole text as one stream of token ids (n,), with the special tokens the tokenizer itself adds."""
    if not text.strip():
        raise CorpusError(f"{source} has no text")
    with explained(lambda cause: CorpusError(f"{source} cannot be tokenised: {cause}")):
        return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)


def check_known(ids: Tensor, vocabulary: int, directory: Path) -> None:
    """Raise `CheckpointError` if the tokenizer of a directory gave a token that its model has no embedding of."""
    largest = int(ids.max()) if ids.numel() else 0
    if largest >= vocabulary:
        raise CheckpointError(
            f"the tokenizer in {directory} gives token {largest}, but the model has {vocabulary} tokens; it is the "
            "tokenizer of another model"
        )


def self_written(model: Any, samples: int, length: int, seed: int, start: int, batch: int = 128) -> Windows:
    """Windows that the model samples from itself, each beginning with token `start`; `model` is whole and loaded.

    With settings for `generate` that came with it, it would not be the model's own distribution, nor as much of it.
    """
    parts = []
    generate_plainly(model)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for first in range(0, samples, batch):
            prompt = torch.full((min(batch, samples - first), 1), start, device=model.device)
            written = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                min_new_tokens=length - 1,
                max_new_tokens=length - 1,
            )
            parts.append(written.cpu())
    return as_windows(torch.cat(parts), f"self (seed {seed})", samples, samples * length)


def _join(texts: Iterable[str], most: int | None = None) -> str:
    """Texts joined by a blank line, until `most` characters are reached."""
    parts, size = [], 0
    for text in texts:
        parts.append(text)
        size += len(text) + 2
        if most is not None and size >= most:
            break
    joined = "\n\n".join(parts)
    return joined if most is None else joined[:most]
