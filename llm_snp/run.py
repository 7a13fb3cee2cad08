"""A whole run: find the model and the text, decide, prune, write, evaluate, report."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from . import modeling_snp
from .card import model_card
from .checkpoint import Checkpoint
from .config import PruneConfig
from .data import Windows, calibration_windows, evaluation_windows, self_written
from .errors import DeviceMemoryError, OptionError
from .estimate import Estimate, estimate
from .evaluation.perplexity import Perplexity, perplexity_streamed
from .executor import BlockResult, decide, prune_blocks
from .families import Family, family_of
from .hub import EMBEDDED, config_dtype, load_config, load_tokenizer, locate
from .plan import Plan, empty_curves, make_plan
from .progress import Progress
from .prune_site import State
from .report import Report, block_line
from .skeleton import Skeleton, empty_model
from .writer import REPORT, TOKENIZER_FILES, Writer, check_output, check_space

# Text that the model writes itself: calibration and evaluation must not be the same.
EVALUATION_SEED = 1
SELF_EVALUATION_WINDOWS = 64


def default_output(options: PruneConfig) -> Path:
    """./<model name>-snp-<percent>"""
    path = EMBEDDED if options.model is None else Path(options.model).expanduser()
    name = path.resolve().name if path.exists() else path.name  # a Hub id ends in the model's name, too
    return Path(f"{name}-snp-{100 * options.sparsity:g}")


def resolve_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, or the CPU. Raises `OptionError` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"--device {name!r} is no device; give auto, cpu, cuda or cuda:0") from error
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if found <= (device.index or 0):
            raise OptionError(f"--device {name} was asked for, but torch sees {found} CUDA devices; use --device cpu")
    return device


def resolve_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """`auto` computes in the checkpoint's type on a GPU and in float32 on the CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" or stored == torch.float64 else stored
    return getattr(torch, name)  # type: ignore[no-any-return]


def window_length(options: PruneConfig, config: Any) -> int:
    """--sequence-length, capped by the positions the model has."""
    return min(options.sequence_length, getattr(config, "max_position_embeddings", options.sequence_length))


@dataclasses.dataclass(frozen=True)
class Preview:
    """What `--dry-run` shows: the plan by shares, and what the run will need."""

    options: PruneConfig
    plan: Plan
    measured: bool
    parameters: int
    estimate: Estimate
    output: Path
    device: torch.device
    dtype: torch.dtype
    length: int


def preview(options: PruneConfig) -> Preview:
    """The plan without weights. Where the allocation measures, the plan shown is the uniform one of that budget."""
    options.validate()
    options = options.resolved()
    directory = locate(options.model, options.revision, weights=False)
    config = load_config(directory)
    family = family_of(config)
    output = Path(options.output) if options.output else default_output(options)
    check_output(output, options.overwrite)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device, config_dtype(config))
    model = empty_model(config)
    blocks = list(model.get_submodule(family.blocks))
    plan = make_plan(family, config, blocks, options, empty_curves(family, config, blocks, options), "uniform")
    parameters = sum(p.numel() for p in model.parameters())
    length = window_length(options, config)
    needed = estimate(model, family, config, options, length, dtype, device, 1 - plan.removed / parameters)
    return Preview(options, plan, options.measures, parameters, needed, output, device, dtype, length)


def run(options: PruneConfig) -> dict[str, Any]:
    """Prune as `options` say and write the result. Returns the report.

    Raises `SnpError` for everything that has its cause outside llm_snp; then nothing is left behind.
    """
    try:
        return _run(options)
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"the device ran out of memory ({str(error).splitlines()[0]}); use --device cpu or a shorter "
            "--sequence-length; --dry-run tells what a run needs"
        ) from error


def _run(options: PruneConfig) -> dict[str, Any]:
    options.validate()
    options = options.resolved()
    progress = Progress(options.quiet)
    with progress.phase("load"):
        directory = locate(options.model, options.revision)
        config = load_config(directory)
        family = family_of(config)
        output = Path(options.output) if options.output else default_output(options)
        check_output(output, options.overwrite)
        device = resolve_device(options.device)
        checkpoint = Checkpoint(directory, family.renames)
        stored = stored_dtype(checkpoint)
        dtype = resolve_dtype(options.dtype, device, stored)
        tokenizer = load_tokenizer(directory)
        check_space(output, sum(f.stat().st_size for f in checkpoint.files))
        skeleton = Skeleton(config, family.blocks, checkpoint, device, dtype)
    length = window_length(options, config)
    with progress.phase("text"):
        text = _Text(directory, tokenizer, config, length, dtype, device)
        assert options.evaluate is not None
        calibration = text.calibration(options)
        evaluation = {source: text.evaluation(source, options.seed) for source in options.evaluate}
        text.close()
    report = Report(
        options,
        directory,
        config.model_type,
        family.sites(config),
        checkpoint,
        calibration,
        length,
        device,
        dtype,
        stored,
    )
    for source, windows in evaluation.items():
        report.evaluated(
            source, "dense", _evaluate(skeleton, windows, f"perplexity of the dense model, {source}", progress)
        )
    plan, sensitivity = decide(skeleton, family, config, calibration.tokens, options, progress)
    progress.say(f"plan: {plan.why}")
    report.planned(plan, sum(p.numel() for p in empty_model(config).parameters()))

    writer = Writer(output, len(skeleton) + 1, options.overwrite)
    with _whole_or_nothing(writer):

        def save(index: int, state: State, results: BlockResult) -> None:
            prefix = f"{family.blocks}.{index}."
            writer.shard(index, {prefix + name: tensor for name, tensor in state.items()})
            report.block(index, results)
            progress.say(block_line(report, index))

        prune_blocks(skeleton, family, config, calibration.tokens, options, plan, sensitivity, progress, save)
        with progress.phase("save"):
            _write_rest(writer, directory, skeleton, family, config, plan, tokenizer)
        if evaluation:
            pruned = _open_result(writer.partial, family, device, dtype)
        for source, windows in evaluation.items():
            report.evaluated(source, "pruned", _evaluate(pruned, windows, "pruned", progress))
        report.finished(output, writer.weight_bytes, progress.seconds)
        writer.json(REPORT, report.data)
        writer.text("README.md", model_card(report.data))
        writer.finish()
    return report.data


def _evaluate(skeleton: Skeleton, windows: Windows, which: str, progress: Progress) -> Perplexity:
    title = f"perplexity, {which}, {Path(windows.source).name}"
    with progress.phase("evaluate", len(skeleton), title) as step:
        return perplexity_streamed(skeleton, windows, step)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The type of the checkpoint's largest tensor."""
    largest = max(checkpoint.names(), key=lambda name: torch.Size(checkpoint.shape(name)).numel())
    return checkpoint.tensor(largest).dtype


class _Text:
    """Calibration and evaluation windows; loads the whole model only if it has to write the text itself."""

    def __init__(
        self, directory: Path, tokenizer: Any, config: Any, length: int, dtype: torch.dtype, device: torch.device
    ):
        self.directory, self.tokenizer, self.length = directory, tokenizer, length
        self.dtype, self.device = dtype, device
        self.start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id
        self._model: Any = None

    def _write(self, samples: int, seed: int) -> Windows:
        if self._model is None:
            model = AutoModelForCausalLM.from_pretrained(self.directory)
            self._model = model.to(self.device, self.dtype).eval()
        return self_written(self._model, samples, self.length, seed, self.start)

    def calibration(self, options: PruneConfig) -> Windows:
        assert options.calibration is not None
        if options.calibration == "self":
            return self._write(options.samples, 2 * options.seed)
        return calibration_windows(options.calibration, self.tokenizer, options.samples, self.length, options.seed)

    def evaluation(self, source: str, seed: int) -> Windows:
        if source == "self":
            return self._write(SELF_EVALUATION_WINDOWS, 2 * seed + EVALUATION_SEED)
        return evaluation_windows(source, self.tokenizer, self.length)

    def close(self) -> None:
        self._model = None
        gc.collect()


def _write_rest(
    writer: Writer, directory: Path, skeleton: Skeleton, family: Family, config: Any, plan: Plan, tokenizer: Any
) -> None:
    """Everything but the blocks: outer weights, config, tokenizer, modelling file; the index last."""
    checkpoint = skeleton.checkpoint
    writer.shard(len(skeleton), {name: checkpoint.tensor(name).contiguous() for name in skeleton.outer})
    widths = [family.widths(config, kept) for kept in plan.kept]
    stock = family.stock_fields(config, widths)
    fields = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    # Without it AutoTokenizer would look for the tokenizer of a model type that stock transformers does not know.
    # (TokenizersBackend is what transformers 5 calls PreTrainedTokenizerFast, which both major versions know.)
    fields["tokenizer_class"] = type(tokenizer).__name__.replace("TokenizersBackend", "PreTrainedTokenizerFast")
    if stock is not None:
        result = type(config)(**(fields | stock))
        result.architectures = config.architectures
    else:
        result = family.pruned_config(**fields, block_widths=widths)
        result.architectures = [family.pruned_class.__name__]
        module = Path(modeling_snp.__file__).stem
        result.auto_map = {
            "AutoConfig": f"{module}.{family.pruned_config.__name__}",
            "AutoModelForCausalLM": f"{module}.{family.pruned_class.__name__}",
        }
        writer.copy(Path(modeling_snp.__file__))
    writer.text("config.json", result.to_json_string())
    writer.copy(directory, TOKENIZER_FILES)
    writer.index()


def _open_result(directory: Path, family: Family, device: torch.device, dtype: torch.dtype) -> Skeleton:
    """The written model as anyone would find it: its own config, its own weights."""
    return Skeleton(load_config(directory), family.blocks, Checkpoint(directory), device, dtype)


@contextmanager
def _whole_or_nothing(writer: Writer) -> Iterator[None]:
    try:
        yield
    except BaseException:
        writer.discard()
        raise
