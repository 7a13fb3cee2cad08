"""A whole model, for what needs one: text that it writes itself, timing, tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME

from ..errors import SnpError
from ..families import check_tables, known_family
from ..system.files import scratch
from ..system.libraries import ONE_AT_A_TIME, explained
from .checkpoint import Checkpoint, weight_files
from .claims import ELSEWHERE
from .hub import transformers_is
from .skeleton import computing

SETTINGS = "generation_config.json"


def whole_model(directory: Path, config: Any, dtype: torch.dtype | None, sentence: Callable[[str], SnpError]) -> Any:
    """A whole causal language model on the host, of the weights that pruning reads and of nothing else.

    transformers looks for more in a model's directory: adapters, which it would add to the model (and import what they
    name), weights under other names, code. So it sees a directory with links to the weights only. Classes that llm_snp
    registers are known. dtype: to load in; None for the type of the file. Raises `CheckpointError` if there are no
    weights, or tables with numbers they cannot have, and `sentence` of the reason if they do not load.
    """
    config = computing(config)
    for name in ELSEWHERE:
        config.__dict__.pop(name, None)
    options = {} if dtype is None else {"dtype" if transformers_is(4, 56) else "torch_dtype": dtype}
    names = [*weight_files(directory), SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME, SETTINGS]
    with scratch() as folder, explained(sentence), ONE_AT_A_TIME:
        for name in names:
            if (directory / name).is_file():
                (folder / name).symlink_to((directory / name).resolve())
        if not (directory / SETTINGS).is_file():  # then transformers takes what the config has of them
            config.to_json_file(folder / "config.json")
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder, config=config, trust_remote_code=False, output_loading_info=True, **options
        )
        _fill(model, loaded["missing_keys"], directory, sentence)
    if (family := known_family(config)) is not None:
        check_tables(family, config, dict(model.named_buffers()))
    return model


def _fill(model: Any, missing: Iterable[str], directory: Path, sentence: Callable[[str], SnpError]) -> None:
    """Give a model the weights that transformers has not found, which it makes up without a word.

    They may be spelled as older versions did, which pruning reads. Raises `sentence` for those that are not there.
    """
    parameters = dict(model.named_parameters())
    if not (wanted := sorted(set(missing).intersection(parameters))):
        return
    family = known_family(model.config)
    checkpoint = Checkpoint(directory, family.renames if family else ())
    if gone := [name for name in wanted if name not in checkpoint.names()]:
        raise sentence(f"its files have no {gone[0]}")
    with torch.no_grad():
        for name in wanted:
            parameters[name].copy_(checkpoint.tensor(name))


def generate_plainly(model: Any, also: Sequence[str] = ()) -> None:
    """Take of a model's settings for `generate` those that say which tokens end or fill a text, and the fields `also`.

    Others, which a stranger may have chosen, would have it write several texts at a time, or none, or in another way.
    """
    given = model.generation_config
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", *also)
    model.generation_config = type(given)(**{name: getattr(given, name) for name in kept})
