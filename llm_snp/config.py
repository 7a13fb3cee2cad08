"""All options of a pruning run in one object. The command line's flags and their help are made from it.

Needs no torch: what can be refused is refused at once.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .errors import OptionError, at_least, choose
from .system import plain

# On the deeper small OPT 0.1 to 0.4 points better than 1e-3 at 30 and 50 % (perplexity over dense), elsewhere equal.
DAMPING = 2e-2
MOST_SHARE = 1e12  # of a text, relative to the others': sums and products of two must be numbers
# A ridge so many times the mean variance leaves nothing of what is fitted, and far beyond it numbers overflow.
MOST_DAMPING = 1e6
# The names of what `core.orders.ORDERS` and `core.allocation.ALLOCATIONS` do.
ORDERS = ("zca", "saw", "energy", "loo", "random", "wanda", "leverage", "i-spasp", "greedy")
# Whole experts are ranked otherwise than what a single layer reads (`core.routing`), and one way is theirs alone.
EXPERT_ORDERS = ("greedy", "reap", "random")
ALLOCATIONS = ("uniform", "variance", "loss")
# What the repair refits a layer to; `none` leaves the remaining weights as they are.
TARGETS = ("self", "dense", "residual", "none")
# `auto` is `both`, or `dims` where all calibration text is of one kind, which cannot judge whole heads: on SmolLM2,
# calibrated on Wikipedia, `both` lost up to 0.18 nats more on WikiText-2 than `dims`.
ATTENTION_MODES = ("auto", "heads", "queries", "dims", "both", "none")
EXPERT_MODES = ("neurons", "whole", "both")
FORMATS = ("auto", "blockwise", "stock")
STRUCTURES = ("units", "layers", "both")
SENSITIVITIES = ("relative", "scalar", "fisher")
DEVICES = ("auto", "cpu", "cuda")
GGUF_TYPES = ("f16", "bf16", "f32", "q8_0")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# What is timed unless it is asked for otherwise: tokens of the prefill, tokens to decode, measurements of each.
PROMPT, NEW, RUNS = 512, 64, 5

# Of so many calibration windows one is held out, and at least one: to choose a ridge (--damping auto), to compare
# candidates (--method everything).
HELD_OUT = 8

# Each kind of text serves its own kind best; a mix of two, most others.
CALIBRATION = ("wikitext2", "c4")

# The combination that lost least in the ablation of benchmarks/quality.py.
BEST = {
    "order": "greedy",
    "allocation": "loss",
    "target": "residual",
    "attention": "auto",
    "experts": "both",
    "structures": "units",
}
# A method is a name for a combination of choices, each of which can also be made on its own.
METHODS: dict[str, dict[str, str]] = {
    # Subspace Node Pruning as its paper has it (arXiv 2405.17506).
    "snp": {
        "order": "zca",
        "allocation": "variance",
        "target": "self",
        "attention": "heads",
        "experts": "neurons",
        "structures": "units",
    },
    "best": BEST,
    # The loop of Pruning Everything, Everywhere, All at Once (arXiv 2506.04513), each candidate made as `best` is.
    "everything": BEST | {"structures": "both"},
}


def flag_of(name: str) -> str:
    """The field as the command line has it."""
    return f"--{name.replace('_', '-')}"


def make_plain(options: Any) -> None:
    """Give the fields of a frozen dataclass of options the types that JSON has. Raises `OptionError` for others."""
    for f in dataclasses.fields(options):
        value, kind = getattr(options, f.name), str(f.type)
        if value is not None or not kind.endswith(" | None"):
            found = PLAIN[kind.removesuffix(" | None")](value, flag_of(f.name))
            object.__setattr__(options, f.name, found.removeprefix("torch.") if f.name == "dtype" else found)


def judged_attention(one_kind: bool) -> str:
    """What `--attention auto` comes to."""
    return "dims" if one_kind else "both"


def option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field whose metadata becomes the flag's help."""
    return field(default=default, metadata={"help": text, "choices": choices})


# How a field's values become plain, by its type; each raises `OptionError` naming the flag.
PLAIN: dict[str, Callable[[Any, str], Any]] = {
    "str": plain.text,
    "int": plain.whole,
    "float": plain.number,
    "bool": plain.truth,
    "tuple[str, ...]": plain.texts,
    "tuple[str, ...] | str": lambda value, flag: (plain.text if isinstance(value, (str, os.PathLike)) else plain.texts)(
        value, flag
    ),
    "float | str": lambda value, flag: (plain.text if isinstance(value, str) else plain.number)(value, flag),
}


def shares(texts: tuple[str, ...], flag: str = "--calibration") -> dict[str, float]:
    """Text -> its share of the windows, relative to the others', of texts given by `flag` as TEXT or TEXT:SHARE.

    Raises `OptionError` for a share that is none, and for a text that is given twice, under whatever names: its windows
    would be, too, and one kind of text would look like several.
    """
    found: dict[str, float] = {}
    seen: dict[Any, str] = {}
    for given in texts:
        text, number = plain.text_and_share(given)
        share = 1.0 if number is None else float(number)
        if os.path.exists(os.path.expanduser(given)):  # a name with a colon in it
            text, share = given, 1.0
        if not 0.0 < share <= MOST_SHARE:
            raise OptionError(f"{flag} {given}: the share after the colon must be above 0 and at most {MOST_SHARE:g}")
        same = seen.setdefault(_identity(text), text)
        if text in found or same != text:
            twice = "is given twice" if same == text else f"is {same}, which is given, too"
            raise OptionError(f"{flag} {text} {twice}; give it once, as {same}:2 for twice the windows")
        found[text] = share
    return found


def _identity(text: str) -> Any:
    """What is the same for all names of a text: of a file or a directory its number."""
    try:
        found = os.stat(os.path.expanduser(text))
    except (OSError, ValueError):  # ValueError: a zero byte
        return text
    return text if text in CALIBRATION else (found.st_dev, found.st_ino)


@dataclass(frozen=True)
class PruneConfig:
    """Options of `llm_snp.prune`, as plain types, also where they were paths, numbers of numpy or torch, or devices.

    `OptionError` naming the option is raised for a value of the wrong type when it is made, and by `validate` for one
    that cannot be used.
    """

    model: str | None = option(None, "Hub id or local directory; without it, the small OPT that comes with llm_snp")
    sparsity: float = option(0.3, "share of the decoder blocks' linear parameters to remove, 0 <= s < 1")
    output: str | None = option(None, "directory for the pruned model (default: ./<model>-snp-<percent>)")
    calibration: tuple[str, ...] | str | None = option(
        None,
        "text to calibrate on: wikitext2, c4, self (text the model writes itself), a file (.txt .raw .json .jsonl, "
        "plain or .gz .xz; .parquet) or a datasets directory; repeatable, as TEXT:SHARE with another share of the "
        "windows than the others have (default: wikitext2 and c4; self without MODEL)",
    )
    samples: int = option(128, "calibration windows, of all texts together")
    sequence_length: int = option(2048, "tokens per window, capped by the model")
    seed: int = option(0, "seed of everything random")
    method: str = option(
        "best",
        "preset for order, allocation, target, attention, experts and structures; everything is best in steps, each "
        "of which takes a layer or as many parameters of units, whichever leaves the hidden states more alike",
        tuple(METHODS),
    )
    order: str | None = option(
        None, "which units stay (reap: of whole experts only)", (*ORDERS, *sorted(set(EXPERT_ORDERS) - set(ORDERS)))
    )
    allocation: str | None = option(None, "how much each layer gives", ALLOCATIONS)
    target: str | None = option(
        None,
        "what the repair refits to: the layer's own output on the pruned stream, the dense model's output, the dense "
        "model's residual stream, or none for no repair",
        TARGETS,
    )
    attention: str | None = option(
        None,
        "remove whole heads, single query heads where several read one key/value head (queries), directions inside all "
        "heads (dims), whichever of these loses least in each block (both), or leave the attention as it is (none); "
        "auto is both, but dims with one calibration text, by which whole heads cannot be judged",
        ATTENTION_MODES,
    )
    experts: str | None = option(
        None,
        "of a mixture of experts remove neurons, as many of all experts of a block (neurons), whole experts with their "
        "rows of the router (whole), or whatever of the two loses less (both)",
        EXPERT_MODES,
    )
    sensitivity: str = option(
        "fisher",
        "what makes the loss curves of --allocation loss comparable: relative (no gradient), or the loss gradient as "
        "one number per layer (scalar) or as a matrix (fisher)",
        SENSITIVITIES,
    )
    sensitive_order: bool = option(
        False,
        "let the sensitivity weigh the order of the units within a layer, too, not only how much each layer gives "
        "(over-fits small calibration sets)",
    )
    structures: str | None = option(
        None,
        "units (neurons, and what --attention says), layers (attention or MLP layers as a whole, and blocks of which "
        "both go), or both; the first attention stays (default: units)",
        STRUCTURES,
    )
    round_to: int = option(
        1, "keep neurons in multiples of N, and head dimensions in multiples of N up to 8 (attention kernels want 8)"
    )
    format: str = option(
        "auto",
        "auto writes a checkpoint of the stock class where that can express the widths, and brings a class of its own "
        "otherwise; blockwise removes whole heads and neurons only, which engines for blocks of different widths can "
        "express (llama.cpp, vLLM); stock only what the stock class can (as many in every block; for OPT neurons)",
        FORMATS,
    )
    damping: float | str = option(
        DAMPING, "ridge of the repair as a share of the mean variance, or auto: chosen on held-out calibration windows"
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:i")
    dtype: str = option("auto", "type to compute in; the result keeps the type of the checkpoint", DTYPES)
    evaluate: tuple[str, ...] | None = option(
        None,
        "text to measure perplexity on, like --calibration, or harness:TASK,TASK for tasks of lm-evaluation-harness "
        "(names, or local .yaml files); repeatable (default: wikitext2; self without MODEL)",
    )
    measure_speed: bool = option(
        False, "afterwards time the dense and the pruned model beside each other; loads both as a whole"
    )
    push_to_hub: str | None = option(None, "afterwards publish the result on the Hugging Face Hub as USER/NAME")
    private: bool = option(False, "make the repository of --push-to-hub a private one")
    revision: str | None = option(None, "branch, tag or commit of MODEL on the Hub")
    overwrite: bool = option(False, "replace an earlier result, or an unfinished one, in the output directory")
    resume: bool = option(False, "go on with an interrupted run of the same command: what it finished is reused")
    offload: str | None = option(None, "directory for hidden states that are too large for host memory")
    quiet: bool = option(False, "print the final table only")

    def __post_init__(self) -> None:
        make_plain(self)

    def resolved(self) -> PruneConfig:
        """With the method's choices filled in where none was made, and the defaults that depend on `model`."""
        choose(self.method, METHODS, "--method")
        chosen: dict[str, Any] = {name: getattr(self, name) or value for name, value in METHODS[self.method].items()}
        texts = ("self",) if self.model is None else CALIBRATION
        return dataclasses.replace(
            self,
            **chosen,
            calibration=self.texts or texts,
            evaluate=texts[:1] if self.evaluate is None else tuple(self.evaluate),
        )

    @property
    def texts(self) -> tuple[str, ...]:
        """The calibration texts as they were given, each perhaps with its share."""
        return (self.calibration,) if isinstance(self.calibration, str) else tuple(self.calibration or ())

    def validate(self) -> None:
        """Raise `OptionError` for a value that cannot be used, before anything is loaded."""
        if not 0.0 <= self.sparsity < 1.0:
            raise OptionError(f"--sparsity is {self.sparsity:g}; it is a share and must be at least 0 and below 1")
        for name, least in (("samples", 1), ("sequence_length", 2), ("round_to", 1)):
            at_least(getattr(self, name), least, flag_of(name))
            if getattr(self, name) >= 2**31:
                raise OptionError(f"{flag_of(name)} is {getattr(self, name)}; it must be below 2**31")
        if not 0 <= self.seed < 2**32:
            raise OptionError(f"--seed is {self.seed}; it must be at least 0 and below 2**32")
        if len(shares(self.texts)) > self.samples:
            raise OptionError(
                f"--samples is {self.samples}, but there are {len(self.texts)} calibration texts, each of which gives "
                "a window at least; give more --samples, or fewer texts"
            )
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value is not None:
                choose(value, choices, flag_of(f.name))
        choose(self.device.split(":")[0], DEVICES, "--device")
        if isinstance(self.damping, str):
            if self.damping != "auto":
                raise OptionError(f"--damping is {self.damping!r}; give a number of at least 0, or auto")
        elif not 0.0 <= self.damping <= MOST_DAMPING:
            raise OptionError(f"--damping is {self.damping:g}; give a number from 0 to {MOST_DAMPING:g}, or auto")
        if self.in_steps and self.structures not in (None, "both"):
            raise OptionError(
                f"--method everything and --structures {self.structures} exclude each other: it is about layers and "
                "units, step by step; leave one of them out"
            )
        if (self.structures == "both" or self.in_steps) and self.format != "auto":
            given = "--method everything" if self.in_steps else "--structures both"
            remedy = "--method best --structures layers" if self.in_steps else "--structures layers"
            raise OptionError(
                f"{given} and --format {self.format} exclude each other: what is left are layers of all kinds of "
                f"widths; leave one of them out, or give {remedy}"
            )
        if self.private and not self.push_to_hub:
            raise OptionError("--private is for the repository that --push-to-hub makes; give that, too")
        least = 2 + self.in_steps
        if self.damping == "auto" and self.samples < least:
            raise OptionError(f"--damping auto holds out part of the windows; give --samples of at least {least}")
        if self.in_steps and self.samples < 2:
            raise OptionError("--method everything holds out part of the windows; give --samples of at least 2")

    @property
    def one_kind(self) -> bool:
        """Whether all calibration text is of one kind. What the model writes itself is of many."""
        return len(self.texts) == 1 and plain.text_and_share(self.texts[0])[0] != "self"

    @property
    def in_steps(self) -> bool:
        """Whether layers and units go step by step, as their hidden states decide."""
        return self.method == "everything"

    @property
    def held_out(self) -> int:
        """Windows that no candidate of a step is fitted to: its hidden states are compared on them."""
        return max(1, self.samples // HELD_OUT) if self.in_steps else 0

    @property
    def whole_experts(self) -> bool:
        """Whether experts go as a whole, alone or beside neurons; of resolved options."""
        return self.experts in ("whole", "both")

    @property
    def alike(self) -> bool:
        """Whether every block keeps as much: a stock model has one number of units for all."""
        return self.format == "stock" and self.structures != "layers"

    @property
    def whole_blocks(self) -> bool:
        """Whether layers go two by two only, so that what is left are whole blocks."""
        return self.structures == "layers" and self.format != "auto"

    @property
    def curve_damping(self) -> float:
        """The damping of curves and bases: the one asked for; `auto` is decided later, repair by repair."""
        return DAMPING if isinstance(self.damping, str) else self.damping

    @property
    def measures(self) -> bool:
        """Whether the plan needs a measuring pass over the dense model."""
        return self.sparsity > 0 and (self.allocation in ("variance", "loss") or self.attention == "both")

    @property
    def directions(self) -> bool:
        """Whether heads may lose directions instead of going as a whole."""
        return self.attention in ("dims", "both")

    @property
    def needs_gradient(self) -> bool:
        curves = self.measures and self.structures != "layers"
        return curves and self.allocation == "loss" and self.sensitivity != "relative"
