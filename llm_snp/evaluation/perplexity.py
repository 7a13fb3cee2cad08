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

from ..core.linalg import strips
from ..dense.data import Windows
from ..dense.skeleton import HEAD_TOKENS, Skeleton
from ..dense.storage import Storage
from ..dense.stream import Stream
from ..errors import NumericalError
from ..system.processes import Processes

# Nats per token: exp(700) is about as far as a float, and JSON, goes; what is worse has no perplexity worth telling
# apart.
WORST = 700.0


@dataclass(frozen=True)
class Perplexity:
    """perplexity = exp(nll / tokens); nll in nats, summed over `tokens` predicted tokens in `windows` windows."""

    perplexity: float
    nll: float
    tokens: int
    windows: int
    sequence_length: int
    source: str
    sha256: str = ""  # of the windows


def perplexity_of(mean: float) -> float:
    """Of a mean negative log-likelihood in nats."""
    return math.exp(min(mean, WORST))


def labels_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed negative log-likelihood in nats of labels (T,) under logits (T, V), a number that stays on the device."""
    return F.cross_entropy(logits.float(), labels.to(logits.device), reduction="sum")


def summed(nll: float, windows: Windows) -> Perplexity:
    """The perplexity of windows whose predicted tokens have `nll` nats in all."""
    if not math.isfinite(nll):
        raise NumericalError("the model's logits are not finite; use --dtype float32 or bfloat16")
    count, length = windows.tokens.shape
    tokens = count * (length - 1)
    return Perplexity(perplexity_of(nll / tokens), nll, tokens, count, length, windows.source, windows.sha256)


def worst(windows: Windows) -> Perplexity:
    """The perplexity of a model that predicts nothing: its logits are not finite."""
    return summed(WORST * windows.tokens[:, 1:].numel(), windows)


@torch.no_grad()
def perplexity_streamed(
    skeleton: Skeleton,
    windows: Windows,
    progress: Callable[[], None],
    processes: Processes | None = None,
    storage: Storage | None = None,
) -> Perplexity:
    """Perplexity of a checkpoint of which only one block is loaded at a time; windows are shared between processes."""
    stream = Stream(skeleton, windows.tokens, processes, storage)
    for i, weights in skeleton.block_states(range(len(skeleton))):
        stream.advance(i, skeleton.load_block(i, weights))
        progress()
    nll = torch.zeros(1, dtype=torch.float64, device=skeleton.device)
    with skeleton.outer_weights():
        for rows, hidden in stream.parts():
            for ids, state in zip(stream.tokens[rows].to(skeleton.device), hidden, strict=True):
                for part in strips(ids.shape[0] - 1, HEAD_TOKENS):
                    logits = skeleton.leave(ids[None, part], state[None, part])[0]
                    nll += labels_nll(logits, ids[part.start + 1 : part.stop + 1])
    stream.processes.sum(nll)
    return summed(nll.item(), windows)


@torch.no_grad()
def perplexity_loaded(model: Any, windows: Windows, progress: Callable[[], None]) -> Perplexity:
    """Perplexity of any causal LM of transformers that is already loaded."""
    nll = torch.zeros((), dtype=torch.float64, device=model.device)
    for ids in windows.tokens:
        nll += labels_nll(model(input_ids=ids[None].to(model.device), use_cache=False).logits[0, :-1], ids[1:])
        progress()
    return summed(nll.item(), windows)
