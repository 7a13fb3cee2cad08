"""Perplexity in the standard protocol: exp of the mean negative log-likelihood of all predicted tokens of
consecutive, non-overlapping windows; the first token of a window is not predicted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Windows
from ..errors import NumericalError
from ..skeleton import Skeleton
from ..stream import Stream


@dataclass(frozen=True)
class Perplexity:
    """perplexity = exp(nll / tokens); nll in nats, summed over `tokens` predicted tokens in `windows` windows."""

    perplexity: float
    nll: float
    tokens: int
    windows: int
    sequence_length: int
    source: str


def window_nll(logits: Tensor, ids: Tensor) -> float:
    """Summed negative log-likelihood in nats of ids (T,) under logits (T, V), from the second token on."""
    nll = F.cross_entropy(logits[:-1].float(), ids[1:].to(logits.device), reduction="sum").item()
    if not math.isfinite(nll):
        raise NumericalError("the model's logits are not finite; use --dtype float32 or bfloat16")
    return nll


def _summed(nll: float, windows: Windows) -> Perplexity:
    count, length = windows.tokens.shape
    tokens = count * (length - 1)
    mean = nll / tokens
    # exp(700) is about as far as a float, and JSON, goes: a model that bad has no perplexity worth telling apart.
    return Perplexity(math.exp(min(mean, 700.0)), nll, tokens, count, length, windows.source)


@torch.no_grad()
def perplexity_streamed(skeleton: Skeleton, windows: Windows, progress: Callable[[], None]) -> Perplexity:
    """Perplexity of a checkpoint of which only one block is loaded at a time."""
    stream = Stream(skeleton, windows.tokens)
    for i in range(len(skeleton)):
        stream.advance(i, skeleton.load_block(i, skeleton.block_state(i)))
        progress()
    nll = 0.0
    for ids, state in zip(windows.tokens, stream.states, strict=True):
        nll += window_nll(skeleton.leave(ids[None], state[None].to(skeleton.device))[0], ids)
    return _summed(nll, windows)


@torch.no_grad()
def perplexity_loaded(model: Any, windows: Windows, progress: Callable[[], None]) -> Perplexity:
    """Perplexity of any causal LM of transformers that is already loaded."""
    nll = 0.0
    for ids in windows.tokens:
        nll += window_nll(model(input_ids=ids[None].to(model.device), use_cache=False).logits[0], ids)
        progress()
    return _summed(nll, windows)
