"""Which MLP widths a device likes: the matrix products timed at the widths there are and at rounded ones.

A rule such as "multiples of 64" is true of some devices, types and sizes, so it is measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..families import known_family
from .clock import timed

MULTIPLES = (8, 16, 32, 64)
CUDA_MULTIPLES = (*MULTIPLES, 128)
SAMPLE = 8  # blocks at most whose products are timed
CPU_WEIGHTS = 1 << 26  # and on a CPU, so many weights of theirs, but two blocks in any case
REPETITIONS = (11, 51)  # at least, and at most
BUDGET = 3.0  # seconds for all repetitions; where they do not suffice for the fewest, fewer tokens are timed
CLEAR = 0.05  # share of the time that has to be won before it is worth a word


@dataclass(frozen=True)
class Mlp:
    """neurons: of each block; hidden: size of the residual stream; producers: layers that read it (2 with a gate)."""

    neurons: tuple[int, ...]
    hidden: int
    producers: int


@dataclass(frozen=True)
class Timed:
    """seconds[r]: of the products at these widths in repetition r; `multiple` 1 are the widths there are."""

    multiple: int
    widths: tuple[int, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Gain:
    """gain: share of the time that widths in multiples of `multiple` save, the median over repetitions; noise: their
    interquartile range.
    """

    multiple: int
    gain: float
    noise: float


def mlp_of(model: Any) -> Mlp | None:
    """The MLP widths of a loaded model of a supported family, pruned or not; None for other families and mixtures."""
    family = known_family(model.config)
    if family is None or family.mixture is not None:
        return None
    site = next(site for site in family.sites(model.config) if site.unit == "neurons")
    consumers = [block.get_submodule(site.consumer) for block in model.get_submodule(family.blocks)]
    consumers = [c for c in consumers if isinstance(c, (nn.Linear, Conv1D))]  # not where an MLP is gone
    if not consumers:
        return None
    # (in, out) of linear layers; GPT-2 has Conv1D.
    sizes = [(c.nx, c.nf) if isinstance(c, Conv1D) else (c.in_features, c.out_features) for c in consumers]
    return Mlp(tuple(neurons for neurons, _ in sizes), sizes[0][1], len(site.producers))


def head_dims(model: Any) -> list[int]:
    """The different widths in which attention kernels see a pruned model's heads, ascending; none for a stock one."""
    family, widths = known_family(model.config), getattr(model.config, "block_widths", None) or []
    attention = family.attention(model.config) if family else None
    return [] if attention is None else sorted({attention.kernel_width(width) for width in widths if width["heads"]})


def sample(widths: Sequence[int], count: int) -> tuple[int, ...]:
    """At most `count` of the widths, ascending and evenly spread over the sorted ones."""
    ordered = sorted(widths)
    if len(ordered) <= count:
        return tuple(ordered)
    return tuple(ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count))


def rounded(widths: Sequence[int], multiple: int) -> tuple[int, ...]:
    """Each width as a neighbouring multiple, such that their sum, the budget, stays as near as it can.

    That is what the allocation would do; rounding each one to the nearest could remove or add neurons altogether, and
    the time would tell of that.
    """
    result = [max(width // multiple, 1) * multiple for width in widths]
    ups = max(round((sum(widths) - sum(result)) / multiple), 0)
    for i in sorted(range(len(widths)), key=lambda i: widths[i] - result[i], reverse=True)[:ups]:
        result[i] += multiple
    return tuple(result)


def gains(actual: Timed, others: Sequence[Timed]) -> list[Gain]:
    """What each of `others` saves; each repetition is compared with that of `actual` beside it.

    What comes of having fewer neurons is taken off: that is no gain of the multiple.
    """
    found = []
    for other in others:
        fewer = max(0.0, 1 - sum(other.widths) / sum(actual.widths))
        saved = [1 - b / a - fewer for a, b in zip(actual.seconds, other.seconds, strict=True)]
        low, _, high = statistics.quantiles(saved, n=4, method="inclusive")
        found.append(Gain(other.multiple, statistics.median(saved), high - low))
    return found


def recommended(found: Sequence[Gain]) -> Gain | None:
    """The smallest multiple that saves about as much as the best one does; None if none clearly saves anything.

    Clearly: more than `CLEAR`, and more than the noise. A smaller multiple leaves the allocation more freedom.
    """
    clear = [gain for gain in found if gain.gain > max(CLEAR, gain.noise)]
    best = max((gain.gain for gain in clear), default=0.0)
    return min((gain for gain in clear if gain.gain >= best - CLEAR), key=lambda gain: gain.multiple, default=None)


def verdict(neurons: Sequence[int], found: Sequence[Gain]) -> str:
    """The result as a sentence."""
    best = recommended(found)
    if best is not None:
        odd = sorted({width for width in neurons if width % best.multiple})
        shown = ", ".join(map(str, odd[:3]))
        return (
            f"MLP widths such as {shown} are slow on this device: in multiples of {best.multiple} the MLP's matrix "
            f"products take {best.gain:.0%} less time; prune with --round-to {best.multiple}"
        )
    most = max(gain.gain + gain.noise for gain in found)
    if most <= CLEAR:
        return f"MLP widths that are rounded (--round-to) would save less than {CLEAR:.0%} of the MLP's matrix products"
    noise = max(gain.noise for gain in found)
    return (
        "whether rounded MLP widths (--round-to) would be faster cannot be told: timings of the MLP's matrix products "
        f"vary by {noise:.0%}"
    )


class WidthTiming:
    """The products of up to `SAMPLE` blocks, for a prefill of batch * prompt tokens and `new` steps of `batch` tokens.

    candidates: widths by multiple, the actual ones under 1; empty if no multiple changes anything.
    """

    def __init__(self, mlp: Mlp, device: torch.device, dtype: torch.dtype, batch: int, prompt: int, new: int):
        self.mlp, self.device, self.dtype = mlp, device, dtype
        self.batch, self.tokens, self.steps = batch, batch * prompt, new
        cuda = device.type == "cuda"
        block = (mlp.producers + 1) * mlp.hidden * max(mlp.neurons)
        self.widths = sample(mlp.neurons, SAMPLE if cuda else max(2, min(SAMPLE, CPU_WEIGHTS // block)))
        multiples = CUDA_MULTIPLES if cuda else MULTIPLES
        others = {m: rounded(self.widths, m) for m in multiples if m <= max(self.widths)}
        others = {m: widths for m, widths in others.items() if widths != self.widths}
        self.candidates = {1: self.widths} | others if others else {}

    @torch.inference_mode()
    def measure(self) -> tuple[dict[str, Any], str]:
        """Figures, JSON-ready, and what they say as a sentence.

        neurons: the widths timed; tokens, steps: what one repetition was timed on (its seconds are those of the whole
        workload); timings: per multiple its widths, median seconds and [min, max], the share of the time it saves and
        that share's noise; recommended_round_to: a multiple or None.
        """
        weights, states = self._random()
        tokens, steps = self._affordable(weights, states)
        seconds: dict[int, list[float]] = {multiple: [] for multiple in self.candidates}
        begin = time.perf_counter()
        for repetition in range(REPETITIONS[1]):
            if repetition >= REPETITIONS[0] and time.perf_counter() - begin > BUDGET:
                break
            # To and fro: what is always first would be measured with other caches than what is always last.
            order = list(self.candidates)[:: 1 if repetition % 2 else -1]
            for multiple in order:
                seconds[multiple].append(self._once(multiple, weights, states, tokens, steps))
        done = [Timed(m, widths, tuple(seconds[m])) for m, widths in self.candidates.items()]
        found = gains(done[0], done[1:])
        best = recommended(found)
        by_multiple = {gain.multiple: gain for gain in found}
        timings = [
            {
                "round_to": t.multiple,
                "widths": list(t.widths),
                "seconds": statistics.median(t.seconds),
                "range": [min(t.seconds), max(t.seconds)],
                "saved": by_multiple[t.multiple].gain if t.multiple > 1 else 0.0,
                "noise": by_multiple[t.multiple].noise if t.multiple > 1 else 0.0,
            }
            for t in done
        ]
        figures = {
            "neurons": list(self.widths),
            "tokens": tokens,
            "steps": steps,
            "timings": timings,
            "recommended_round_to": best.multiple if best else None,
        }
        return figures, verdict(self.widths, found)

    def _random(self) -> tuple[list[list[Tensor]], Tensor]:
        """Per block the memory of its layers' weights, as much as the widest candidate needs; and hidden states.

        Candidates share it, each from the start: it begins as aligned as a parameter does. Blocks do not share it: in
        a model, too, the weights of the next block are not in the cache.
        """
        generator = torch.Generator(self.device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            # Neither denormal nor overflowing after two products, in any type.
            return torch.randn(shape, generator=generator, device=self.device).mul_(0.02).to(self.dtype)

        widest = [max(widths) for widths in zip(*self.candidates.values(), strict=True)]
        weights = [[random(n * self.mlp.hidden) for _ in range(self.mlp.producers + 1)] for n in widest]
        return weights, random(self.tokens, self.mlp.hidden)

    def _affordable(self, weights: list[list[Tensor]], states: Tensor) -> tuple[int, int]:
        """Tokens and steps for the fewest repetitions in the budget, after two rounds on few; the first warms up."""
        tokens, steps = min(self.tokens, 64), min(self.steps, 2)
        for _ in range(2):
            cost = sum(self._once(multiple, weights, states, tokens, steps) for multiple in self.candidates)
        share = min(1.0, BUDGET / (REPETITIONS[0] * cost))
        return max(min(self.tokens, 16), int(self.tokens * share)), max(1, int(self.steps * share))

    def _once(self, multiple: int, weights: list[list[Tensor]], states: Tensor, tokens: int, steps: int) -> float:
        """Seconds of the whole workload, from those of `tokens` of its prefill and `steps` of its decode steps."""
        hidden = self.mlp.hidden
        layers = [
            (*(w[: n * hidden].view(n, hidden) for w in block[:-1]), block[-1][: n * hidden].view(hidden, n))
            for block, n in zip(weights, self.candidates[multiple], strict=True)
        ]

        def products(states: Tensor) -> None:
            for *producers, consumer in layers:
                for producer in producers:
                    inner = F.linear(states, producer)
                F.linear(inner, consumer)

        def decode() -> None:
            for _ in range(steps):
                products(states[: self.batch])

        _, prefill_seconds = timed(lambda: products(states[:tokens]), self.device)
        _, decode_seconds = timed(decode, self.device)
        return prefill_seconds * self.tokens / tokens + decode_seconds * self.steps / steps
