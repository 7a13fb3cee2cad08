"""Several texts in one calibration: how many windows each gives, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import OptionError
from .data import UNSEEN, Windows, as_windows

MOST_WINDOWS = 1 << 24  # 8 billion tokens in windows of 512


def turns(shares: Sequence[float], samples: int) -> list[int]:
    """Whose turn it is: for each of `samples` windows the number of the text that gives it.

    After any count each text has given its share of it to within one window, so that what looks at the first windows,
    or at a part of them, sees every text. Each has its first turn before any has more than it is due. Raises
    `OptionError` for more windows than any text has.
    """
    if samples > MOST_WINDOWS:
        raise OptionError(f"{samples:,} windows were asked for; {MOST_WINDOWS:,} are the most that are counted")
    total, taken = sum(shares), [0] * len(shares)
    found = []
    for i in range(1, samples + 1):
        missing = [k for k, count in enumerate(taken) if not count]
        left = samples - i + 1
        able = missing if len(missing) == left else range(len(shares))
        text = max(able, key=lambda k: (i * shares[k] / total - taken[k], -k))
        taken[text] += 1
        found.append(text)
    return found


def mix(parts: Sequence[Windows], order: Sequence[int]) -> Windows:
    """The windows of all parts in one, taken by turns: `order[i]` is the part that gives window i."""
    if len(parts) == 1:
        return parts[0]
    at = [iter(part.tokens) for part in parts]
    return as_windows(
        torch.stack([next(at[text]) for text in order]),
        " and ".join(part.source for part in parts),
        sum(part.available for part in parts),
        sum(part.text_tokens for part in parts),
        tuple(parts),
    )


def fitted_and_unseen(windows: Windows) -> tuple[Windows, Windows] | None:
    """As many calibration windows and others of the same texts, in which those of each are equally many.

    At most `UNSEEN` of either, but one of each text; None where no text has a window left.
    """
    parts = [part for part in windows.parts or (windows,) if part.unseen is not None and len(part.unseen)]
    if not parts:
        return None
    fitted, unseen = [], []
    for part in parts:
        assert part.unseen is not None
        count = min(max(1, UNSEEN // len(parts)), len(part.tokens), len(part.unseen))
        fitted.append(part.tokens[:count])
        unseen.append(part.unseen[:count])
    names = ("windows that were calibrated on", "other windows of the same text")
    found = [as_windows(torch.cat(tokens), name, 0, 0) for tokens, name in zip((fitted, unseen), names, strict=True)]
    return found[0], found[1]
