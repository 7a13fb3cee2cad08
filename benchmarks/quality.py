#!/usr/bin/env python3
"""What each choice is worth: orders, allocations, targets, attention modes, sensitivities and presets side by side.

    python benchmarks/quality.py facebook/opt-125m --calibration train.txt --evaluate wikitext2 --evaluate c4 \\
        --sparsity 0.2 0.3 0.4 0.5 --json quality.json --plot quality.png --markdown quality.md

One checkpoint, one set of calibration windows, one list of budgets; per row the perplexity of the pruned model on
every corpus and the seconds of pruning (sensitivity, measure, steps and prune phases; no loading, no evaluation), with
--speed also how fast it is beside the dense one, timed in turn as `bench` does. Text is tokenised and the dense model
evaluated once. The JSON file is written after each result, and what it already has for the same model, text, seed and
device is not measured again, so an interrupted run can simply be repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from perplexity import aligned, check_files, code_state, provenance, sha256, windows_of
from quality_floor import least_influential
from quality_results import Results, Row, all_rows, rows_matching
from quality_table import cells, heading, markdown, plot, verdict
from transformers.utils import logging

from llm_snp import SnpError
from llm_snp.cli import BAD_INPUT
from llm_snp.config import DTYPES, PruneConfig, shares
from llm_snp.dense.checkpoint import Checkpoint
from llm_snp.dense.data import Windows, as_windows, calibration_windows
from llm_snp.dense.hub import config_dtype, load_config, load_tokenizer, locate
from llm_snp.dense.mixture import mix, turns
from llm_snp.dense.skeleton import Skeleton
from llm_snp.dense.storage import Storage
from llm_snp.errors import NumericalError, OptionError
from llm_snp.evaluation.perplexity import perplexity_streamed
from llm_snp.evaluation.speed import measure_speed
from llm_snp.families import family_of
from llm_snp.pruning.decide import decide
from llm_snp.pruning.executor import prune_blocks
from llm_snp.pruning.job import (
    Job,
    check_structures,
    fit_for_experts,
    fit_for_format,
    fit_for_heads,
    for_layers,
    window_length,
)
from llm_snp.pruning.plan import check_order
from llm_snp.pruning.session import Session
from llm_snp.result.assembly import open_result, stored_block, write_rest
from llm_snp.result.carried import Carried
from llm_snp.result.writer import Writer
from llm_snp.system.device import device_facts, resolve_device, resolve_dtype
from llm_snp.system.journal import Journal
from llm_snp.system.processes import Processes
from llm_snp.system.progress import Progress
from llm_snp.system.signals import exit_code

PROMPT, NEW = 256, 64  # tokens that --speed reads and writes


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
        length = window_length(PruneConfig(sequence_length=args.sequence_length), self.config)
        self.corpora: dict[str, Windows] = {}
        self.calibration, unseen = drawn(args, tokenizer, length)
        if args.own_text:
            fitted = dataclasses.replace(self.calibration, tokens=self.calibration.tokens[: args.own_text])
            self.corpora = {"calibration windows": fitted, "other windows of that text": unseen}
        self.corpora |= windows_of(args.evaluate, tokenizer, length, args.max_windows)
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
        given = PruneConfig(sparsity=sparsity, samples=self.args.samples, seed=self.args.seed, **row.given)
        return fit_for_format(given, self.family).resolved()

    def possible(self, row: Row) -> bool:
        """Whether a row's choices can be made for this model."""
        try:
            options = fit_for_experts(fit_for_heads(self.options(row, 0.1), self.family, self.config), self.family)
            check_structures(options, self.config)
            check_order(self.family, self.config, options)
        except OptionError:
            return False
        return True

    @contextmanager
    def pruned(
        self, options: PruneConfig, windows: int, least_influence: bool = False
    ) -> Iterator[tuple[Skeleton, dict[str, Any]]]:
        """Prune on the first calibration windows; gives the result, which lasts as long as the context, and facts."""
        options = fit_for_experts(for_layers(fit_for_heads(options, self.family, self.config)), self.family)
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
            write_rest(writer, job, self.skeleton, plan, self.tokenizer, Carried(self.directory))
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


def fill(bench: Bench, results: Results, rows: Sequence[Row], progress: Progress) -> None:
    """Measure what is not there yet; errors are tried again."""
    todo: list[tuple[Row, float]] = []
    for row in rows:
        for sparsity in bench.args.sparsity:
            known = results.find(row, sparsity)
            twin = any(row.choices == other.choices and sparsity == s for other, s in todo)
            if not twin and (known is None or "error" in known):
                todo.append((row, sparsity))
    if results.data["dense"] is None:
        progress.say("dense model ...")
        measured = bench.perplexity(bench.skeleton)
        results.data |= {"dense": measured["perplexity"], "dense_evaluation": measured["evaluation"]}
        results.save()
    progress.say(f"{len(todo)} results to measure, {len(rows) * len(bench.args.sparsity) - len(todo)} there or shared")
    if todo:
        bench.warm_up()
    for number, (row, sparsity) in enumerate(todo, 1):
        result = bench.measure(bench.options(row, sparsity), row.least_influence)
        results.add(row, sparsity, result)
        shown = result.get("error") or " / ".join(f"{value:,.2f}" for value in result["perplexity"].values())
        progress.say(f"{number:>{len(str(len(todo)))}}/{len(todo)}  {row.name}, {sparsity:g}: {shown}")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", metavar="MODEL", help="Hub id or directory")
    p.add_argument(
        "--calibration", required=True, action="append", metavar="TEXT", help="as llm_snp takes it; repeatable"
    )
    p.add_argument("--evaluate", required=True, action="append", metavar="TEXT", help="like --calibration; repeatable")
    p.add_argument("--sparsity", type=float, nargs="+", default=[0.2, 0.3, 0.4, 0.5], metavar="S", help="the budgets")
    p.add_argument("--samples", type=int, default=128, metavar="N", help="calibration windows (default: 128)")
    p.add_argument("--sequence-length", type=int, default=2048, metavar="T", help="tokens per window (default: 2048)")
    p.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:i (default: auto)")
    p.add_argument("--dtype", default="auto", choices=DTYPES, help="type to compute in (default: auto)")
    p.add_argument(
        "--max-windows", type=int, metavar="N", help="evaluate on the first N windows only, for a quick look"
    )
    p.add_argument(
        "--own-text",
        type=int,
        default=0,
        metavar="N",
        help="measure also on N of the calibration windows, and on N others of the same texts",
    )
    p.add_argument("--rows", default="", metavar="REGEX", help="measure only rows whose name or group matches")
    p.add_argument("--json", type=Path, metavar="FILE", help="results, written after each; what it has is reused")
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the main rows")
    p.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")
    p.add_argument(
        "--speed", action="store_true", help="time every result beside the dense model; in the table with --over-dense"
    )
    p.add_argument(
        "--over-dense", action="store_true", help="table of nats per token over the dense model instead of perplexities"
    )
    p.add_argument("--quiet", action="store_true", help="print the table only")
    return p


def check(args: argparse.Namespace) -> None:
    """Raise `OptionError` for what would only fail after hours."""
    options = PruneConfig(samples=args.samples, sequence_length=args.sequence_length, device=args.device)
    for sparsity in args.sparsity:
        dataclasses.replace(options, sparsity=sparsity).validate()
    if args.max_windows is not None and args.max_windows < 1:
        raise OptionError(f"--max-windows is {args.max_windows}; it must be at least 1")
    texts = len(shares(tuple(args.calibration)))
    if args.own_text and not texts <= args.own_text <= args.samples:
        raise OptionError(f"--own-text is {args.own_text}; it must be from {texts} (one of each text) to --samples")
    check_files(args.json, args.plot, args.markdown)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(arguments)
    args.sparsity = sorted(set(args.sparsity))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    progress = Progress(args.quiet)
    try:
        check(args)
        rows = rows_matching(args.rows)
        progress.say("load ...")
        bench = Bench(args)
        origin = provenance(__file__, arguments)
        results = Results(origin | {"code": code_state(), **bench.facts}, args.json)
        fill(bench, results, [row for row in rows if bench.possible(row)], progress)
    except (SnpError, torch.OutOfMemoryError) as error:
        print(f"quality: {str(error).splitlines()[0]}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as error:
        print("quality: interrupted; the same command goes on from what --json has", file=sys.stderr)
        return exit_code(error)
    shown = [row for row in all_rows() if any(results.find(row, sparsity) for sparsity in args.sparsity)]
    print(heading(results.data, args.over_dense), "\n", sep="")
    print(aligned(cells(results, shown, args.sparsity, markdown=False, over_dense=args.over_dense)), "\n", sep="")
    print("\n".join(verdict(results, shown, args.sparsity)))
    if args.markdown:
        args.markdown.write_text(markdown(results, shown, args.sparsity, args.over_dense), encoding="utf-8")
    if args.plot:
        plot(results, all_rows(), args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
