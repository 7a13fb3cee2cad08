"""What `quality.py` measures with: a checkpoint and its windows, read once, pruned by the choices of a row."""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from perplexity import sha256, windows_of
from quality_floor import least_influential
from quality_results import Row
from transformers.utils import logging

from llm_snp.config import PruneConfig, shares
from llm_snp.dense.checkpoint import Checkpoint
from llm_snp.dense.data import Windows, as_windows, calibration_windows
from llm_snp.dense.hub import config_dtype, load_config, locate
from llm_snp.dense.mixture import mix, turns
from llm_snp.dense.skeleton import Skeleton
from llm_snp.dense.storage import Storage
from llm_snp.dense.tokenizer import load_tokenizer
from llm_snp.errors import NumericalError, OptionError
from llm_snp.evaluation.perplexity import perplexity_streamed
from llm_snp.evaluation.speed import measure_speed
from llm_snp.families import family_of
from llm_snp.pruning.decide import decide
from llm_snp.pruning.executor import prune_blocks
from llm_snp.pruning.job import Job, fit_for_format, fitted, window_length
from llm_snp.pruning.session import Session
from llm_snp.result.assembly import open_result, stored_block, write_rest
from llm_snp.result.carried import Carried
from llm_snp.result.own_code import modeling_file
from llm_snp.result.writer import Writer
from llm_snp.system.device import device_facts, resolve_device, resolve_dtype
from llm_snp.system.journal import Journal
from llm_snp.system.processes import Processes
from llm_snp.system.progress import Progress

PROMPT, NEW = 256, 64  # tokens that --speed reads and writes

_bench: Bench  # of a process of --jobs


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The flags that every script with a `Bench` has, and the defaults of those that it may leave out."""
    p.add_argument(
        "--calibration", required=True, action="append", metavar="TEXT", help="as llm_snp takes it; repeatable"
    )
    p.add_argument("--evaluate", required=True, action="append", metavar="TEXT", help="like --calibration; repeatable")
    p.add_argument("--samples", type=int, default=128, metavar="N", help="calibration windows (default: 128)")
    p.add_argument("--sequence-length", type=int, default=2048, metavar="T", help="tokens per window (default: 2048)")
    p.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    p.add_argument(
        "--max-windows", type=int, metavar="N", help="evaluate on the first N windows only, for a quick look"
    )
    p.add_argument("--quiet", action="store_true", help="print the table only")
    p.set_defaults(device="auto", dtype="auto", own_text=0, evaluation_length=None, speed=False)


class Bench:
    """A checkpoint with its calibration and evaluation windows, read once for all rows."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.directory = directory = locate(args.model)
        self.config = load_config(directory)
        self.family = family_of(self.config)
        device = resolve_device(args.device)
        dtype = resolve_dtype(args.dtype, device, config_dtype(self.config))
        checkpoint = Checkpoint(directory, self.family.renames)
        self.skeleton = Skeleton(self.config, self.family.blocks, checkpoint, device, dtype)
        self.tokenizer = tokenizer = load_tokenizer(directory)
        length, read = (
            window_length(PruneConfig(sequence_length=asked), self.config)
            for asked in (args.sequence_length, args.evaluation_length or args.sequence_length)
        )
        self.corpora: dict[str, Windows] = {}
        self.calibration, unseen = drawn(args, tokenizer, length)
        if args.own_text:
            fitted = dataclasses.replace(self.calibration, tokens=self.calibration.tokens[: args.own_text])
            self.corpora = {"calibration windows": fitted, "other windows of that text": unseen}
        self.corpora |= windows_of(args.evaluate, tokenizer, read, args.max_windows)
        name, digest = Path(args.model).name, sha256(checkpoint.files)
        self.facts: dict[str, Any] = {
            "model": {"name": name, "type": self.config.model_type, "sha256": digest},
            "calibration": {
                "source": " and ".join(Path(text).name for text in args.calibration),
                "sha256": self.calibration.sha256,
                "windows": args.samples,
                "sequence_length": length,
                "seed": args.seed,
            },
            "corpora": {n: {"sha256": w.sha256, "windows": len(w.tokens)} for n, w in self.corpora.items()},
            "device": device_facts(device, dtype),
        }

    def options(self, row: Row, sparsity: float) -> PruneConfig:
        texts = tuple(self.args.calibration)  # by their number `--attention auto` decides
        given = PruneConfig(
            sparsity=sparsity, samples=self.args.samples, seed=self.args.seed, calibration=texts, **row.given
        )
        return fit_for_format(given, self.family).resolved()

    def possible(self, row: Row) -> bool:
        """Whether a row's choices can be made for this model."""
        try:
            fitted(self.options(row, 0.1), self.family, self.config)
        except OptionError:
            return False
        return True

    @contextmanager
    def pruned(
        self, options: PruneConfig, windows: int, least_influence: bool = False
    ) -> Iterator[tuple[Skeleton, dict[str, Any]]]:
        """Prune on the first calibration windows; gives the result, which lasts as long as the context, and facts."""
        options = fitted(options, self.family, self.config)
        timer, tokens = Progress(quiet=True), self.calibration.tokens[:windows]
        options = dataclasses.replace(options, samples=windows)  # of which some may be held out
        with TemporaryDirectory(prefix="llm-snp-quality-") as temporary:
            processes = Processes()
            journal = Journal(Path(temporary), processes)

            def save(index: int, state: dict[str, torch.Tensor] | None, _: object) -> None:
                if state is None:
                    return
                place = plan.left.index(index)
                writer.shard(place, stored_block(self.family, self.skeleton, place, state))

            session = Session(
                self.skeleton, self.family, self.config, options, tokens, processes, Storage(), journal, timer
            )
            plan = least_influential(session) if least_influence else decide(session)
            writer = Writer(Path(temporary) / "result", len(plan.left) + 1)
            writer.directory.mkdir()
            prune_blocks(session, plan, save)
            device, length = self.skeleton.device, tokens.shape[1]
            job = Job(options, self.directory, self.config, self.config, self.family, writer.directory, device, length)
            carried, code = Carried(self.directory), modeling_file(job.family)
            write_rest(writer, job, self.skeleton, plan, self.tokenizer, carried, code)
            facts = {"achieved": plan.achieved, "seconds": {n: round(s, 3) for n, s in timer.seconds.items()}}
            steps = {"steps": [dataclasses.asdict(step) for step in plan.steps]} if plan.steps else {}
            yield open_result(writer.directory, job, self.skeleton.dtype), facts | steps

    def speed(self, skeleton: Skeleton) -> dict[str, Any]:
        """How many times as fast as the dense model a result is, if that was asked for."""
        if not self.args.speed:
            return {}
        here, device = skeleton.checkpoint.directory, skeleton.device
        ratio = measure_speed(here, self.directory, device, skeleton.dtype, prompt=PROMPT, new=NEW)["ratio"]
        return {"speed": {name: round(ratio[f"{name}_speedup"], 3) for name in ("prefill", "decode")}}

    def perplexity(self, skeleton: Skeleton) -> dict[str, Any]:
        """`perplexity` on every corpus, by its label, and the seconds that `evaluation` took."""
        began = time.perf_counter()
        found = {n: perplexity_streamed(skeleton, w, lambda: None).perplexity for n, w in self.corpora.items()}
        if not all(map(math.isfinite, found.values())):
            raise NumericalError("the perplexity is infinite")
        return {"perplexity": found, "evaluation": round(time.perf_counter() - began, 3)}

    def measure(self, options: PruneConfig, least_influence: bool) -> dict[str, Any]:
        """The facts of one result, or the error that there is instead."""
        try:
            with self.pruned(options, self.args.samples, least_influence) as (skeleton, facts):
                return facts | self.perplexity(skeleton) | self.speed(skeleton)
        except (OptionError, NumericalError) as error:
            return {"error": str(error)}

    def warm_up(self) -> None:
        """What only the first run pays for (kernels, libraries) belongs into nobody's seconds."""
        with self.pruned(self.options(Row("", "", {"method": "best"}), 0.1), windows=2):
            pass


def drawn(args: argparse.Namespace, tokenizer: Any, length: int) -> tuple[Windows, Windows]:
    """The calibration windows, of all texts by turns, and `args.own_text` others of the same texts, which no fit sees.

    Raises `OptionError` for shares that are none, `CorpusError` where a text has too few windows.
    """
    given = shares(tuple(args.calibration))
    orders = [turns(list(given.values()), count) for count in (args.samples, args.own_text) if count]
    parts: list[list[Windows]] = [[] for _ in orders]
    for i, text in enumerate(given):
        counts = [order.count(i) for order in orders]
        windows = calibration_windows(text, tokenizer, sum(counts), length, args.seed)
        for part, tokens in zip(parts, windows.tokens.split(counts), strict=True):
            part.append(as_windows(tokens, windows.source, windows.available, windows.text_tokens))
    mixed = [mix(part, order) for part, order in zip(parts, orders, strict=True)]
    return mixed[0], mixed[-1]


def measured_all(bench: Bench, todo: Sequence[tuple[Row, float]]) -> Iterator[tuple[Row, float, dict[str, Any]]]:
    """What `Bench.measure` finds, as it is found: in this process, or by --jobs others, each with the model."""
    jobs = min(bench.args.jobs, len(todo))
    if jobs > 1:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin, (bench.args,)) as pool:
            waiting = {pool.submit(_measured, row, sparsity): (row, sparsity) for row, sparsity in todo}
            for future in as_completed(waiting):
                # How long a text took beside other processes says nothing of how fast the result is.
                found = {name: value for name, value in future.result().items() if name != "evaluation"}
                yield *waiting[future], found
        return
    if todo:
        bench.warm_up()
    for row, sparsity in todo:
        yield row, sparsity, bench.measure(bench.options(row, sparsity), row.least_influence)


def _begin(args: argparse.Namespace) -> None:
    """A process of --jobs reads model and text once."""
    global _bench
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    _bench = Bench(args)
    _bench.warm_up()


def _measured(row: Row, sparsity: float) -> dict[str, Any]:
    return _bench.measure(_bench.options(row, sparsity), row.least_influence)
