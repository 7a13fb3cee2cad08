"""Tasks of lm-evaluation-harness (package lm_eval, optional), run on the dense and on the pruned model.

lm_eval is imported only when a task is asked for: it is slow.
"""

from __future__ import annotations

import gc
import io
import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..dense.hub import load_config
from ..dense.tokenizer import load_tokenizer
from ..dense.whole import generate_plainly, whole_model
from ..errors import CheckpointError, DeviceMemoryError, NumericalError, OptionError
from ..system.libraries import explained
from .harness_tasks import find_tasks

# Draws for standard errors without a formula, of perplexities, say: 2 % exact. The harness's 100,000 take minutes.
BOOTSTRAP = 1000
# Of a model's settings for `generate`, what others measure its tasks with, too.
PENALTIES = ("repetition_penalty", "no_repeat_ngram_size")


def evaluate_harness(
    directory: Path,
    tasks: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int = 8,
    seed: int = 0,
    limit: int | None = None,
    known: Mapping[str, Mapping[str, Any]] | None = None,
    keep: Callable[[str, Mapping[str, Any]], None] = lambda task, results: None,
) -> dict[str, Any]:
    """Run tasks on a whole model, loaded from `directory`. `limit`: samples per task, to try it out.

    known: results of tasks that are not run again; keep: what is done with those of each other one of `tasks`.

    Batches get smaller where the device has no memory for `batch_size`. Few-shot examples are drawn with `seed`; the
    random numbers of the caller stay what they are.

    Returns {task: {"metrics": {name: {"value", "stderr", "higher_is_better"}}, "version", "samples", "num_fewshot"}};
    names are those of the harness, with the filter unless that is `none`. Groups stand beside their tasks and have
    "subtasks". What is no finite number is left out, or None as a stderr.

    Raises what `check_tasks` raises, `CheckpointError`, `DeviceMemoryError`, `NumericalError` if the model's logits
    are not finite, and `OptionError` if a task cannot be run on this model.
    """
    found = dict(known or {})
    with quiet_log(), own_random_numbers(device):
        requests = [(request, request.load()) for request in find_tasks([task for task in tasks if task not in found])]
        model = _open_model(directory.resolve(), device, dtype, batch_size) if requests else None
        for request, loaded in requests:
            with request.at_home():
                found[request.name] = results_of(model, request.name, loaded, seed, limit)
            keep(request.name, found[request.name])
    del model
    gc.collect()  # the harness's wrapper is in a cycle with the model
    return {name: result for task in dict.fromkeys(tasks) for name, result in found[task].items()}


def _open_model(directory: Path, device: torch.device, dtype: torch.dtype, batch_size: int) -> Any:
    """A whole model, in the harness's wrapper."""
    tokenizer = load_tokenizer(directory)
    model = whole_model(
        directory,
        load_config(directory),
        None,
        lambda cause: CheckpointError(f"{directory} is no model that transformers can load ({cause})"),
    )
    try:
        model = model.to(device, dtype).eval()
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(f"{device} has no room for the whole of {directory}; use --device cpu") from error
    generate_plainly(model, PENALTIES)
    model.register_forward_hook(_check_logits)
    return wrapped(model, tokenizer, batch_size)


def wrapped(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """A model of transformers as the harness takes one."""
    from lm_eval.models.huggingface import HFLM

    if tokenizer.eos_token_id is None:  # the harness cuts, begins and pads texts with it, and fails without
        tokenizer.eos_token = tokenizer.bos_token or tokenizer.convert_ids_to_tokens(0)
    known = model.get_input_embeddings().num_embeddings
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= known:  # one that was added for a training, say
        choice = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, 0)  # nobody looks at it
        there = next(token for token in choice if token is not None and token < known)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(there)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _check_logits(module: torch.nn.Module, inputs: Any, output: Any) -> None:
    """Without this the harness takes the first choice of all for the likeliest."""
    if not math.isfinite(output.logits.max().item()):
        raise NumericalError("the model's logits are not finite; use --dtype float32 or bfloat16")


def results_of(model: Any, name: str, tasks: Mapping[str, Any], seed: int, limit: int | None) -> dict[str, Any]:
    """What is kept of the harness's results for the tasks of one request."""
    return _results(_run(model, name, tasks, seed, limit))


def _run(model: Any, name: str, tasks: Mapping[str, Any], seed: int, limit: int | None) -> dict[str, Any]:
    """What the harness gives for the tasks of one request, as its `simple_evaluate` would.

    That also starts git, pip and more to describe the machine.
    """
    from lm_eval.evaluator import evaluate

    options = {"limit": limit, "bootstrap_iters": BOOTSTRAP, "log_samples": False}
    while True:
        seeded(tasks, seed)
        try:
            with of_task(name, "run on this model"):
                return _evaluated(name, lambda: evaluate(model, tasks, **options))
        except torch.OutOfMemoryError as error:
            if model.batch_size_per_gpu == 1:
                raise DeviceMemoryError(f"{model.device} ran out of memory in task {name}; use --device cpu") from error
        model.batch_size_per_gpu //= 2
        gc.collect()
        torch.cuda.empty_cache()


def seeded(tasks: Mapping[str, Any], seed: int) -> None:
    """Ask the same questions with the same examples each time."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for task in tasks["tasks"].values():
        task.set_config("num_fewshot", max(0, task.get_config("num_fewshot") or 0))
        task.set_fewshot_seed(seed)


def of_task(name: str, done: str) -> AbstractContextManager[None]:
    """A task is code of others, which may raise anything."""
    return explained(lambda why: OptionError(f"task {name} cannot be {done} ({why}); leave it out"))


def _evaluated(name: str, evaluate: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        with silence():
            return evaluate()
    except OverflowError as error:
        raise NumericalError(f"task {name}: a perplexity is too large for a number") from error


def _results(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of the harness's results."""
    inner, samples = raw["group_subtasks"], raw["n-samples"]

    def count(task: str) -> int:
        return samples[task]["effective"] if task in samples else sum(map(count, inner.get(task, ())))

    found: dict[str, Any] = {}
    for task, values in raw["results"].items():
        metrics = {}
        for key, value in values.items():
            name, _, kind = key.partition(",")  # the harness's filter
            if kind and not name.endswith("_stderr") and _number(value) is not None:
                metrics[name if kind == "none" else key] = {
                    "value": _number(value),
                    "stderr": _number(values.get(f"{name}_stderr,{kind}")),
                    "higher_is_better": _truth(raw["higher_is_better"].get(task, {}).get(name)),
                }
        if metrics:
            shots = raw["n-shot"].get(task)
            found[task] = {
                "metrics": metrics,
                "version": _scalar(raw["versions"].get(task)),
                "samples": count(task),
                "num_fewshot": shots if type(shots) is int and shots >= 0 else None,
            }
            if inner.get(task):
                found[task]["subtasks"] = list(inner[task])
    return found


def _scalar(value: Any) -> str | int | float | None:
    """A task's version as JSON has it: in YAML `2024-01-01` is a date, and a person may write a list."""
    plain = value is None or isinstance(value, (str, int)) or _number(value) is not None
    return value if plain else str(value)  # type: ignore[no-any-return]


def _truth(value: Any) -> bool | None:
    """In a person's YAML it may be "yes", which says nothing that is relied on."""
    return value if isinstance(value, bool) else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float, np.number)) and math.isfinite(value) else None


@contextmanager
def own_random_numbers(device: torch.device) -> Iterator[None]:
    """Leave the generators that the harness seeds as they were."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


@contextmanager
def quiet_log() -> Iterator[None]:
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def silence() -> Iterator[None]:
    """No bars and prints, and no process per core for the standard errors."""
    switch = "DISABLE_MULTIPROC"  # lm_eval's
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        del os.environ[switch]
        if before is not None:
            os.environ[switch] = before
