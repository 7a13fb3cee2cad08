"""All options of a healing in one object; needs no torch, so that what can be refused is refused at once."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..config import DEVICES, flag_of, make_plain, option, shares
from ..documents.shareable import launcher, words_of
from ..errors import OptionError, at_least, choose
from ..system.private import in_cache, public_name

# Learning rates of all weights, and of LoRA's matrices, that were best on the reference models, of a width of about
# WIDTH. Wider ones get less in proportion, as Adam's rates for matrices do (Yang et al., arXiv 2203.03466).
RATE, LORA_RATE, WIDTH = 3e-4, 3e-3, 128
# A text may be read so many times; more is learning it by heart (Muennighoff et al., arXiv 2305.16264).
PASSES = 4
HIGHEST_RATE = 1e30  # beyond it numbers of the optimiser overflow
SELF = "self"
# With variables of that name accelerate is told to train in another way, which the Trainer would follow, but for those
# that say nothing; the rest is of its words and lines.
ACCELERATE = "ACCELERATE_"
# By which it takes the tasks of an MPI or srun job for processes of one training.
TASKS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
NOTHING = ("", "0", "no", "false", "off", "n", "f", "none", "default")
WORDS = ("ACCELERATE_LOG_LEVEL", "ACCELERATE_DEBUG_MODE", "ACCELERATE_ENABLE_RICH", "ACCELERATE_DISABLE_RICH")
# Options that do not change the result.
FREE = frozenset(("output", "device", "overwrite", "resume", "quiet", "evaluate"))


@dataclass(frozen=True)
class HealConfig:
    """Options of `llm_snp heal`, named as its flags are."""

    directory: str = option(MISSING, "the result of a run")
    text: tuple[str, ...] = option(
        (),
        "text to train on: a file (.txt .raw .json .jsonl, plain or .gz .xz; .parquet), a datasets directory, "
        "wikitext2 or c4; repeatable, as TEXT:SHARE with another share of the windows than the others have (default: "
        "what DIR was calibrated on, where that is here)",
    )
    tokens: int | None = option(None, "tokens to train on, such as 1000000 (default: as many as DIR was calibrated on)")
    teacher: str | None = option(
        None, "whose predictions are learned: directory or Hub id (default: the dense model that DIR was made of)"
    )
    output: str | None = option(None, "directory for the healed model (default: DIR-healed)")
    lora: int | None = option(None, "train LoRA matrices of rank R, merged at the end; else all weights")
    learning_rate: float | None = option(
        None,
        f"at its peak (default: {RATE:g} for {WIDTH} hidden dimensions, {LORA_RATE:g} with --lora; less in proportion "
        "for wider models)",
    )
    batch: int = option(8, "windows at a time, of a process")
    accumulate: int = option(1, "batches whose gradients make one step")
    sequence_length: int = option(512, "tokens per window, capped by the models")
    text_loss: float = option(0.0, "weight of the text's own loss; the teacher's predictions have 1 - W")
    checkpointing: bool = option(False, "compute activations twice instead of keeping them: less memory")
    seed: int = option(0, "seed of everything random")
    device: str = option("auto", "auto, cpu or cuda")
    evaluate: tuple[str, ...] | None = option(
        None,
        "text to measure perplexity on, before and after; repeatable (default: those that the pruning was measured on, "
        "where they are found)",
    )
    overwrite: bool = option(False, "replace an earlier result, or an unfinished one, in DIR2")
    resume: bool = option(False, "go on with an interrupted run of the same command")
    quiet: bool = option(False, "print the final table only")

    def __post_init__(self) -> None:
        make_plain(self)

    def rate(self, width: int) -> float:
        """The learning rate at its peak, for a model of a hidden width."""
        if self.learning_rate is not None:
            return self.learning_rate
        return (RATE if self.lora is None else LORA_RATE) * WIDTH / width

    @property
    def destination(self) -> Path:
        """--output, or the directory's name with -healed behind it, beside it; for one in the Hub's cache here."""
        given = Path(os.path.expanduser(self.output or self.directory))
        if self.output:
            return given
        named = given if given.name not in ("", "..") else given.resolve()
        return Path(f"{public_name(named)}-healed") if in_cache(named) else named.with_name(f"{named.name}-healed")

    def validate(self) -> None:
        """Raise `OptionError` for a value that cannot be used, before anything is loaded."""
        for name, least in (("tokens", 1), ("batch", 1), ("accumulate", 1), ("sequence_length", 2)):
            if getattr(self, name) is not None:
                at_least(getattr(self, name), least, flag_of(name))
        if not 0 <= self.seed < 2**32:
            raise OptionError(f"--seed is {self.seed}; it must be at least 0 and below 2**32")
        if self.lora is not None:
            at_least(self.lora, 1, "--lora")
            if find_spec("peft") is None:
                raise OptionError("--lora needs the package peft; install it with `pip install peft`, or leave it out")
        if self.learning_rate is not None and not 0.0 < self.learning_rate <= HIGHEST_RATE:
            raise OptionError(
                f"--learning-rate is {self.learning_rate:g}; it must be above 0 and at most {HIGHEST_RATE:g}"
            )
        if not 0.0 <= self.text_loss < 1.0:
            raise OptionError(
                f"--text-loss is {self.text_loss:g}; it is a share and must be at least 0 and below 1, as without the "
                "teacher's predictions there is no teacher"
            )
        choose(self.device, DEVICES, "--device")
        for name, value in os.environ.items():
            if name.startswith(ACCELERATE) and name not in WORDS and value.strip().lower() not in NOTHING:
                raise OptionError(f"{name} is set in the environment, but heal trains with torchrun alone; unset it")
        for name in TASKS if "WORLD_SIZE" not in os.environ else ():
            if os.environ.get(name, "1").strip() not in ("", "0", "1"):
                raise OptionError(
                    f"{name} is {os.environ[name]}: this is one of several tasks of a job, but heal trains with "
                    "torchrun alone; start it as one task, or unset it"
                )
        if "WORLD_SIZE" not in os.environ and os.environ.get("LOCAL_RANK", "-1") != "-1":
            raise OptionError(
                f"LOCAL_RANK is {os.environ['LOCAL_RANK']} in the environment, by which the Trainer takes this for one "
                "of several processes, but there is no WORLD_SIZE; unset it, or start several with torchrun"
            )
        for flag, texts in (("--text", tuple(shares(self.text, "--text"))), ("--evaluate", self.evaluate or ())):
            if SELF in texts:
                raise OptionError(f"{flag} self is for pruning only, which needs little text; give a file or a corpus")

    def settings(self) -> dict[str, Any]:
        """The options that decide the result, by their flag, as JSON has them."""
        fields = dataclasses.asdict(self) | {"text": list(self.text)}
        return {flag_of(name): value for name, value in fields.items() if name not in FREE | {"directory", "teacher"}}


def command_line(options: Mapping[str, Any], processes: int = 1, nodes: int = 1) -> str:
    """The command that `options` (fields of `HealConfig`) come to."""
    words = [*launcher(processes, nodes), "-m", "llm_snp", "heal", options["directory"]]
    for field in dataclasses.fields(HealConfig)[1:]:
        value = options[field.name]
        if value is not None and value != field.default:  # what has to be given has none
            words += words_of(field.name, value)
    return shlex.join(words)
