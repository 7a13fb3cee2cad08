"""Speed and memory of a pruned model beside the dense one, measured in turn in one process."""

from __future__ import annotations

import inspect
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import NEW, PROMPT, RUNS
from ..dense.hub import load_config
from ..dense.whole import whole_model
from ..errors import CheckpointError, DeviceMemoryError, UnsupportedModelError, at_least, first_line
from ..system.device import device_facts
from ..system.libraries import explained, out_of_memory
from .clock import timed
from .widths import Mlp, WidthTiming, head_dims, mlp_of

SEED = 0
REASON = 200  # characters at most that an error quotes


@dataclass(frozen=True)
class Run:
    """Seconds of a prefill and of one decode step; bytes of the cache at the end, and of what came and went."""

    prefill: float
    decode: float
    cache: int
    working: int | None


def measure_speed(
    pruned: Path,
    dense: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    batch: int = 1,
    prompt: int = PROMPT,
    new: int = NEW,
    runs: int = RUNS,
    step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Time two local checkpoints of causal language models in turn: dense, pruned, dense, pruned, ... after a warm-up.

    Both are on the device as a whole, at the same time. A run is a prefill of (batch, prompt) random tokens, the same
    for both models, and `new` greedy steps of one token with KV cache; the model is called directly, not by
    `generate`. As `generate` does, the prefill asks for the last position's logits only where the model class can.
    `prompt` and `new` shrink to what the models have positions for, which a note then says. `step` is called after each
    of the `measurements`.

    Returns a JSON-ready dict:

    device, batch, prompt, new, runs   what was measured on and with
    pruned, dense (if given)           prefill_seconds and decode_seconds_per_token: medians over runs, with
                                       prefill_range and decode_range [min, max]; tokens_per_second: of the decoding,
                                       all sequences of the batch together; kv_cache_bytes: of the cache's tensors
                                       after prompt + new tokens; weight_bytes: of the parameters; peak_bytes: own
                                       weights plus the most that a run had allocated beside them on a CUDA device,
                                       None on others
    ratio (with dense)                 prefill_speedup, decode_speedup: dense seconds / pruned seconds;
                                       kv_cache_pruned_over_dense, weights_pruned_over_dense: bytes
    widths (where some are odd)        `WidthTiming.measure`
    notes                              sentences

    Raises `OptionError` for a count below 1, `CheckpointError` for a directory that does not load,
    `UnsupportedModelError` for a model without KV cache, `DeviceMemoryError` if the models do not fit.
    """
    for name, value in (("batch", batch), ("prompt", prompt), ("new", new), ("runs", runs)):
        at_least(value, 1, f"--{name}")
    directories = ({} if dense is None else {"dense": dense}) | {"pruned": pruned}
    try:
        models = {which: load_model(directory, device, dtype) for which, directory in directories.items()}
        bench = _Bench(models, device, dtype, batch, prompt, new, runs, step)
        result = bench.run()
        mlp, dims = mlp_of(models["pruned"]), head_dims(models["pruned"])
        del models, bench.models  # the products are timed with weights of their own
        if dense is not None:
            result["ratio"] = _ratio(result["dense"], result["pruned"])
        _add_widths(result, mlp, dims, device, dtype)
    except Exception as error:
        if not out_of_memory(error):
            raise
        reason = re.sub(r"^\[.*?\] err == 0\. ", "", first_line(error)[:REASON])  # the place in torch's source
        raise DeviceMemoryError(
            f"{device} has no room for what was to be measured ({reason}); give a smaller --batch or --prompt, or "
            f"--dtype bfloat16{'' if device.type == 'cpu' else ', or --device cpu'}"
        ) from error
    step()
    return result


def measurements(dense: Path | None, runs: int) -> int:
    """How many times `measure_speed` calls `step`: after each warm-up, each run and the timing of the widths."""
    return (1 if dense is None else 2) * (1 + runs) + 1


def load_model(directory: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A whole causal language model, ready to run. Raises `CheckpointError` if it cannot be loaded.

    Classes that llm_snp registers are known; code that lies in a directory is not run.
    """

    def refusal(cause: str) -> CheckpointError:
        return CheckpointError(
            f"{directory} is no causal language model that this transformers can load ({cause}); give a directory with "
            "config.json and weights"
        )

    model = whole_model(directory, load_config(directory), dtype, refusal)
    return model.to(device).eval()


def positions(config: Any) -> int | None:
    """How many tokens, prompt and new ones together, a model takes; None if its config sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def fit(prompt: int, new: int, limit: int | None) -> tuple[int, int]:
    """`prompt` and `new`, together at most `limit`; the prompt gives way only where it leaves no room."""
    if limit is None or prompt + new <= limit:
        return prompt, new
    if prompt >= limit:
        prompt = max(limit - new, limit // 2, 1)
    return prompt, min(new, limit - prompt)


class _Bench:
    """Loaded models by name, and what they are measured with."""

    def __init__(
        self,
        models: dict[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        batch: int,
        prompt: int,
        new: int,
        runs: int,
        step: Callable[[], None],
    ):
        self.models, self.device, self.dtype, self.batch, self.runs = models, device, dtype, batch, runs
        self.step = step
        limits = [positions(model.config) for model in models.values()]
        limit = min((found for found in limits if found is not None), default=None)
        self.prompt, self.new = fit(prompt, new, limit)
        self.notes: list[str] = []
        if (self.prompt, self.new) != (prompt, new):
            self.notes.append(
                f"measured with a prompt of {self.prompt} tokens and {self.new} new ones instead of {prompt} and "
                f"{new}: there are {limit} positions"
            )
        generator = torch.Generator().manual_seed(SEED)
        vocabulary = min(model.get_input_embeddings().weight.shape[0] for model in models.values())
        self.tokens = torch.randint(vocabulary, (batch, self.prompt), generator=generator).to(device)
        # Older classes have no such argument; then both models compute the logits of all positions.
        can = all("logits_to_keep" in inspect.signature(model.forward).parameters for model in models.values())
        self.arguments: dict[str, Any] = {"use_cache": True} | ({"logits_to_keep": 1} if can else {})

    def run(self) -> dict[str, Any]:
        """Warm up, measure, and sum up."""
        found: dict[str, list[Run]] = {which: [] for which in self.models}
        for round_ in range(1 + self.runs):
            for which, model in self.models.items():
                with explained(partial(self._refusal, which)):
                    run = self._once(model)
                if round_ > 0:
                    found[which].append(run)
                self.step()
        return {
            "device": device_facts(self.device, self.dtype),
            "batch": self.batch,
            "prompt": self.prompt,
            "new": self.new,
            "runs": self.runs,
            **{which: self._figures(model, found[which]) for which, model in self.models.items()},
            "notes": self.notes + (doubts(found["dense"], found["pruned"]) if "dense" in found else []),
        }

    def _refusal(self, which: str, cause: str) -> CheckpointError:
        """A config may have fields that only the cache reads."""
        return CheckpointError(f"the {which} model cannot generate, so its speed cannot be measured ({cause})")

    @torch.inference_mode()
    def _once(self, model: Any) -> Run:
        cuda = self.device.type == "cuda"
        before = torch.cuda.memory_allocated(self.device) if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        output, prefill = timed(lambda: model(input_ids=self.tokens, **self.arguments), self.device)
        if getattr(output, "past_key_values", None) is None:
            raise UnsupportedModelError(
                f"models of type {model.config.model_type!r} have no KV cache, so that decoding cannot be timed"
            )
        cache, decode = timed(lambda: self._decode(model, output), self.device)
        working = torch.cuda.max_memory_allocated(self.device) - before if cuda else None
        return Run(prefill, decode / self.new, cache_bytes(cache), working)

    def _decode(self, model: Any, output: Any) -> Any:
        """Greedy steps, without waiting for the device in between. Returns the cache."""
        for _ in range(self.new):
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, past_key_values=output.past_key_values, **self.arguments)
        return output.past_key_values

    def _figures(self, model: Any, runs: list[Run]) -> dict[str, Any]:
        prefill, decode = [run.prefill for run in runs], [run.decode for run in runs]
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        working = [run.working for run in runs if run.working is not None]
        return {
            "prefill_seconds": statistics.median(prefill),
            "prefill_range": [min(prefill), max(prefill)],
            "decode_seconds_per_token": statistics.median(decode),
            "decode_range": [min(decode), max(decode)],
            "tokens_per_second": self.batch / statistics.median(decode),
            "kv_cache_bytes": runs[-1].cache,
            "weight_bytes": weights,
            "peak_bytes": weights + max(working) if working else None,
        }


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors of a cache: of layers (transformers 4.54 and later), of two lists, or of nested tuples."""
    if hasattr(cache, "layers"):
        parts = [vars(layer).values() for layer in cache.layers]
    elif hasattr(cache, "key_cache"):
        parts = [cache.key_cache, cache.value_cache]
    else:
        parts = list(cache)
    return sum(t.numel() * t.element_size() for part in parts for t in part if isinstance(t, Tensor))


def _ratio(dense: dict[str, Any], pruned: dict[str, Any]) -> dict[str, float]:
    return {
        "prefill_speedup": dense["prefill_seconds"] / pruned["prefill_seconds"],
        "decode_speedup": dense["decode_seconds_per_token"] / pruned["decode_seconds_per_token"],
        "kv_cache_pruned_over_dense": pruned["kv_cache_bytes"] / dense["kv_cache_bytes"],
        "weights_pruned_over_dense": pruned["weight_bytes"] / dense["weight_bytes"],
    }


def doubts(dense: Sequence[Run], pruned: Sequence[Run]) -> list[str]:
    """Whether the faster one was faster every time; runs of the same number were beside each other in time."""
    if len(dense) == 1:
        return ["one run tells nothing of the spread; give more --runs"]
    notes = []
    for phase in ("prefill", "decode"):
        faster = sum(getattr(b, phase) < getattr(a, phase) for a, b in zip(dense, pruned, strict=True))
        if 0 < faster < len(dense):
            notes.append(
                f"{phase}: the pruned model was the faster one in {faster} of {len(dense)} pairs of runs, so that the "
                "difference may be chance; give more --runs"
            )
    return notes


def _add_widths(
    result: dict[str, Any], mlp: Mlp | None, dims: list[int], device: torch.device, dtype: torch.dtype
) -> None:
    """Whether other widths would be faster on this device."""
    if mlp is not None:
        timing = WidthTiming(mlp, device, dtype, result["batch"], result["prompt"], result["new"])
        if timing.candidates:
            result["widths"], sentence = timing.measure()
            result["notes"].append(sentence)
    odd = [dim for dim in dims if dim % 8]
    if odd and device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        result["notes"].append(
            f"head dimensions of {', '.join(map(str, odd))} are no multiples of 8: flash attention kernels take them "
            "only padded, copying queries, keys and values at every call; prune with --round-to 8"
        )
