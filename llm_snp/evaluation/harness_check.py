"""What would go wrong with tasks of lm-evaluation-harness at the end, found out at the start."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..dense.data import check_known
from ..dense.tokenizer import load_tokenizer
from ..errors import NumericalError, OptionError
from ..system.files import digest_of_bytes
from .harness import of_task, own_random_numbers, quiet_log, results_of, seeded, silence, wrapped
from .harness_tasks import find_tasks
from .speed import positions

# What a task may call the number of tokens to write, and lm_eval's for one that does not say.
NEW_TOKENS, USUALLY_WRITTEN = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"), 256
POSITIONS = 2048  # of a model that says none
SEVERAL = 16  # answers that every metric has a value of


@dataclass(frozen=True)
class Asked:
    """What a task asks of a model. most: tokens at most that it may write; digest: of the questions and how they are
    judged, as far as that is no code.
    """

    most: int
    digest: str


def check_tasks(tasks: Sequence[str]) -> dict[str, Asked]:
    """Load every task with its data, fetched from the Hub if need be, and make its questions, so that nothing is
    missing or wrong hours later. Returns what each task asks.

    Raises `OptionError` if lm_eval is not installed, or something is no task that it can load or whose data it does not
    fit, `HubError` or `CorpusError` if data cannot be had.
    """
    asked = {}
    with quiet_log(), own_random_numbers(torch.device("cpu")):
        for request in find_tasks(tasks):
            loaded = request.load()
            with request.at_home(), silence(), of_task(request.name, "asked"):
                instances = _questions(loaded)
                judged = [(name, task.dump_config()) for name, task in loaded["tasks"].items()]
                content = [judged, [(one.request_type, one.args, one.doc) for one in instances]]
                asked[request.name] = Asked(max(map(_written, instances), default=0), _digest(content))
    return asked


def _questions(loaded: Mapping[str, Any]) -> list[Any]:
    """All that the tasks of one request ask, as the harness's instances."""
    seeded(loaded, 0)
    for task in loaded["tasks"].values():
        task.build_all_requests(rank=0, world_size=1)
    return [one for task in loaded["tasks"].values() for one in task.instances]


def _digest(content: Any) -> str:
    """A hash of what may hold code and dates, by their types, and dates as keys, which are left out."""
    return digest_of_bytes(json.dumps(content, default=lambda value: type(value).__name__, skipkeys=True).encode())


def check_room(asked: Mapping[str, Asked], config: Any) -> None:
    """Raise `OptionError` if a model has too few positions for what a task lets it write (`check_tasks`)."""
    limit = positions(config)
    for name, task in asked.items():
        if limit is not None and task.most >= limit:
            raise OptionError(
                f"task {name} lets a model write {task.most} tokens, but this one has {limit} positions, of which the "
                "question needs some; leave it out"
            )


def _written(request: Any) -> int:
    """How many tokens a model may write for one of the harness's requests."""
    if request.request_type != "generate_until":
        return 0
    options = request.args[1]
    asked = next((options[name] for name in NEW_TOKENS if options.get(name) is not None), USUALLY_WRITTEN)
    if type(asked) is not int or asked < 1:
        raise ValueError(f"{asked!r} tokens are to be written")
    return asked


def rehearse_tasks(tasks: Sequence[str], directory: Path, config: Any) -> None:
    """Ask a tiny model, with the tokenizer of `directory`, one question of each task, and judge the answer.

    How a task generates, filters and counts is looked at by the harness only then. Where the tokenizer has tokens that
    the model has none of, all questions are looked at for one. Raises what `evaluate_harness` does.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"n_positions": positions(config) or POSITIONS, "n_embd": 8, "n_layer": 1, "n_head": 1}
    tiny = AutoConfig.for_model("gpt2", vocab_size=config.vocab_size, **sizes)
    with quiet_log(), own_random_numbers(torch.device("cpu")):
        stand_in = AutoModelForCausalLM.from_config(tiny).eval()
        stand_in.get_input_embeddings().register_forward_pre_hook(
            lambda module, inputs: check_known(inputs[0], config.vocab_size, directory)
        )
        tokenizer = load_tokenizer(directory)
        more = max(tokenizer.get_vocab().values()) >= config.vocab_size
        model = wrapped(stand_in, tokenizer, 1)
        for request in find_tasks(tasks):
            loaded = request.load()
            with request.at_home():
                with silence(), of_task(request.name, "asked"):
                    questions = _questions(loaded) if more else ()
                for text in _texts(questions):
                    check_known(tokenizer(text, return_tensors="pt").input_ids, config.vocab_size, directory)
                with suppress(NumericalError):  # this one has learnt nothing: what it loses may be too much
                    try:
                        results_of(model, request.name, loaded, seed=0, limit=1)
                    except OptionError:  # a metric may have no value for one answer alone
                        results_of(model, request.name, loaded, seed=0, limit=SEVERAL)


def _texts(questions: Iterable[Any]) -> Iterator[str]:
    """What is given to a model of some questions, empty texts left out."""
    return (text for one in questions for text in one.args if isinstance(text, str) and text)
