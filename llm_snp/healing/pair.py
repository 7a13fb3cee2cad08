"""The student, which is a result, and its teacher: found, checked against each other, and loaded as a whole.

Both are data: classes are llm_snp's and transformers', adapters and code beside the weights are not looked at.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.linalg import all_finite
from ..dense.checkpoint import Checkpoint
from ..dense.claims import expected_tensors
from ..dense.hub import load_config, locate
from ..dense.skeleton import empty_model
from ..dense.tokenizer import load_tokenizer
from ..dense.whole import whole_model
from ..documents.shareable import hub_id, shareable
from ..documents.writing import read_report
from ..errors import CheckpointError, OptionError, SnpError, UnsupportedModelError
from ..families import known_family
from ..result.origin import COPIED, ancestors, find_dense, is_dense_of
from ..result.own_code import MODELING
from ..system.manifest import changed, check_weights, faults, has_report, manifest
from ..system.private import public_name
from ..system.remembering import recall
from .options import HealConfig


@dataclass(frozen=True)
class Model:
    """A model on disk. name: for others, without the place on this machine; hub: whether that is an id on the Hub."""

    directory: Path
    config: Any
    tokenizer: Any
    checkpoint: Checkpoint
    name: str
    hub: bool

    def load(self, dtype: torch.dtype | None) -> Any:
        """The whole model on the host, without dropout. dtype: to load in; None for the type of the file.

        Raises `CheckpointError` for what transformers cannot load, and for files that have changed.
        """

        def refusal(cause: str) -> CheckpointError:
            return CheckpointError(f"{self.directory} is no causal language model that transformers can load ({cause})")

        self.checkpoint.check_unchanged()  # since it was checked, and hashed
        model = whole_model(self.directory, without_dropout(self.config), dtype, refusal).eval()
        self.checkpoint.check_unchanged()
        return model


@dataclass(frozen=True)
class Pair:
    """student: a result, with its report as others may see it; teacher; its_own: whether that is the dense model of
    the report; ancestors: where the models are that the student was made of; memory: what this machine knows of the
    student beside its report.
    """

    student: Model
    teacher: Model
    report: dict[str, Any]
    its_own: bool
    ancestors: list[Path]
    memory: dict[str, Any]

    @property
    def vocabulary(self) -> int:
        return int(self.student.config.get_text_config().vocab_size)

    def length(self, asked: int) -> int:
        """Tokens of a window: `asked`, capped by the positions that both models have."""
        configs = (model.config.get_text_config() for model in (self.student, self.teacher))
        limits = (getattr(config, "max_position_embeddings", None) for config in configs)
        return min([asked, *(limit for limit in limits if limit is not None)])


def find_pair(options: HealConfig) -> Pair:
    """Find both models, fetching the teacher where it is on the Hub, and check that they belong together.

    Raises `CheckpointError` for a result that is not as it was written, and for a teacher that is not there or has
    another vocabulary; `OptionError` if none is given and the report's is not to be had.
    """
    directory = Path(os.path.expanduser(options.directory))
    report = read_report(directory)
    check_weights(directory, report)
    if wrong := faults(*changed(directory, _needed(directory, report))):
        raise CheckpointError(f"{directory} is not as it was written: {wrong}; restore that, or prune again")
    student = open_model(directory, public_name(directory.resolve()))
    found, name, hub, its_own = _teacher(options.teacher, directory, report)
    teacher = open_model(found, name, hub)
    _check_vocabulary(student, teacher)
    width = student.config.get_text_config().hidden_size
    if options.lora is not None and options.lora > width:
        raise OptionError(f"--lora is {options.lora}, but the model is {width} wide; give a rank of at most that")
    return Pair(student, teacher, shareable(report), its_own, ancestors(directory, report), recall(directory))


def _needed(directory: Path, report: dict[str, Any]) -> dict[str, str]:
    """What of a result's files is read here, with the hashes that the report has: no documents, and no code."""
    others = ("README.md", "report.html", "plots/", MODELING)
    return {name: found for name, found in manifest(directory, report).items() if not name.startswith(others)}


def _teacher(given: str | None, directory: Path, report: dict[str, Any]) -> tuple[Path, str, bool, bool]:
    """Where the teacher is, its name for others, whether that is of the Hub, and whether it is the report's model."""
    if given is not None:
        found = locate(given)
        here = Path(os.path.expanduser(given))
        name = public_name(here.resolve()) if found == here else given
        return found, name, found != here, is_dense_of(given, found, directory, report)
    its_own, seen = True, {directory.resolve()}
    try:
        found = find_dense(directory, report)
        # A result that was pruned more than once: the model before knows more, if it is there. A report may name its
        # own directory.
        while has_report(found) and found.resolve() not in seen:
            seen.add(found.resolve())
            earlier = read_report(found)
            try:
                before = find_dense(found, earlier)
            except SnpError:
                break
            found, report, its_own = before, earlier, False
    except SnpError as error:
        raise OptionError(
            f"the dense model of {directory} is not there to learn from ({' '.join(str(error).split())}; {COPIED}); "
            "give it with --teacher"
        ) from error
    return found, report["model"]["name"], hub_id(report["model"]) is not None, its_own


def open_model(directory: Path, name: str = "", hub: bool = False) -> Model:
    """A model, of which every tensor is accounted for: transformers would make up those that are missing."""
    config = load_config(directory)
    family = known_family(config)
    if family is not None and family.mixture is not None:
        raise UnsupportedModelError(
            f"{directory} is a mixture of experts ({config.model_type}), whose tensors are other ones while it is "
            "trained than in its files: it can be pruned, but not healed"
        )
    checkpoint = Checkpoint(directory, family.renames if family else ())
    if family:
        shapes, tied, harmless = expected_tensors(model := empty_model(config))
        tables = [name for name, buffer in model.named_buffers() if not buffer.is_floating_point()]
        checkpoint.audit(shapes, tied, harmless, tables)
    return Model(directory, config, load_tokenizer(directory), checkpoint, name, hub)


def _check_vocabulary(student: Model, teacher: Model) -> None:
    """Raise `CheckpointError` unless each token is the same for both models: predictions are compared one by one."""
    sizes = [int(model.config.get_text_config().vocab_size) for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        found = f"{sizes[1]:,} tokens, and the result {sizes[0]:,}"
    elif teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        found = f"{sizes[1]:,} other tokens than the result"
    else:
        return
    raise CheckpointError(
        f"the teacher {teacher.directory} has {found}; give a --teacher of the same vocabulary, such as the dense model"
    )


def without_dropout(config: Any) -> Any:
    """A copy of a config in which nothing is left out at random: teacher and student are to see the same."""
    config = copy.deepcopy(config)
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and name.endswith(("dropout", "pdrop", "layerdrop")):
            setattr(config, name, 0.0)
    return config


def stored(model: Model, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model's files with the values that `state` has, in the types of the files, on the host.

    Raises `CheckpointError` if one of them is not finite in its type.
    """
    found = {}
    for name in model.checkpoint.names():
        kind = state[name].dtype if not state[name].is_floating_point() else model.checkpoint.dtype(name)
        found[name] = state[name].detach().to("cpu", kind)
        if not all_finite(found[name]):
            raise CheckpointError(
                f"{name} would not be finite in the {kind} of the result; give a smaller --learning-rate"
            )
    return found
