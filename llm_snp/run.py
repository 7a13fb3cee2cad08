"""A whole run: find the model and the text, decide, prune, write, evaluate, report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .card import model_card
from .checkpoint import Checkpoint
from .config import PruneConfig
from .data import Windows
from .errors import DeviceMemoryError
from .evaluation.perplexity import Perplexity, perplexity_streamed
from .executor import BlockResult, decide, prune_blocks
from .hub import load_tokenizer
from .job import open_job, resolve_dtype
from .progress import Progress
from .prune_site import State
from .report import Report, block_line
from .result import open_result, write_rest
from .skeleton import Skeleton, empty_model
from .text import Text
from .writer import REPORT, Writer, check_space


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
    progress = Progress(options.quiet)
    with progress.phase("load"):
        job = open_job(options, weights=True)
        options, family, config = job.options, job.family, job.config
        checkpoint = Checkpoint(job.directory, family.renames)
        stored = stored_dtype(checkpoint)
        dtype = resolve_dtype(options.dtype, job.device, stored)
        tokenizer = load_tokenizer(job.directory)
        check_space(job.output, sum(file.stat().st_size for file in checkpoint.files))
        skeleton = Skeleton(config, family.blocks, checkpoint, job.device, dtype)
    with progress.phase("text"):
        text = Text(job.directory, tokenizer, config, job.length, dtype, job.device)
        assert options.evaluate is not None
        calibration = text.calibration(options)
        evaluation = {source: text.evaluation(source, options.seed) for source in options.evaluate}
        text.close()
    report = Report(job, checkpoint, calibration, dtype, stored)
    for source, windows in evaluation.items():
        report.evaluated(source, "dense", _evaluate(skeleton, windows, "dense", progress))
    plan, sensitivity = decide(skeleton, family, config, calibration.tokens, options, progress)
    progress.say(f"plan: {plan.why}")
    report.planned(plan, sum(p.numel() for p in empty_model(config).parameters()))

    writer = Writer(job.output, len(skeleton) + 1, options.overwrite)
    with _whole_or_nothing(writer):

        def save(index: int, state: State, results: BlockResult) -> None:
            prefix = f"{family.blocks}.{index}."
            writer.shard(index, {prefix + name: tensor for name, tensor in state.items()})
            report.block(index, results)
            progress.say(block_line(report.data))

        prune_blocks(skeleton, family, config, calibration.tokens, options, plan, sensitivity, progress, save)
        with progress.phase("save"):
            write_rest(writer, job, skeleton, plan, tokenizer)
        pruned = open_result(writer.partial, job, dtype)  # also without evaluation: what was written must load
        for source, windows in evaluation.items():
            report.evaluated(source, "pruned", _evaluate(pruned, windows, "pruned", progress))
        report.finished(job.output, writer.weight_bytes, progress.seconds)
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


@contextmanager
def _whole_or_nothing(writer: Writer) -> Iterator[None]:
    try:
        yield
    except BaseException:
        writer.discard()
        raise
