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
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from perplexity import aligned, check_files, code_state, provenance
from quality_bench import Bench, add_arguments, measured_all
from quality_results import Results, Row, all_rows, rows_matching
from quality_table import cells, heading, markdown, plot, verdict
from transformers.utils import logging

from llm_snp import SnpError
from llm_snp.cli import BAD_INPUT
from llm_snp.config import DTYPES, PruneConfig, shares
from llm_snp.errors import OptionError
from llm_snp.system.progress import Progress
from llm_snp.system.signals import exit_code


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
    for number, (row, sparsity, result) in enumerate(measured_all(bench, todo), 1):
        results.add(row, sparsity, result)
        shown = result.get("error") or " / ".join(f"{value:,.2f}" for value in result["perplexity"].values())
        progress.say(f"{number:>{len(str(len(todo)))}}/{len(todo)}  {row.name}, {sparsity:g}: {shown}")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", metavar="MODEL", help="Hub id or directory")
    add_arguments(p)
    p.add_argument("--sparsity", type=float, nargs="+", default=[0.2, 0.3, 0.4, 0.5], metavar="S", help="the budgets")
    p.add_argument(
        "--evaluation-length",
        type=int,
        metavar="T",
        help="tokens per window of the --evaluate texts, to compare calibrations in windows of other lengths (default: "
        "those of --sequence-length)",
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:i (default: auto)")
    p.add_argument("--dtype", default="auto", choices=DTYPES, help="type to compute in (default: auto)")
    p.add_argument(
        "--own-text",
        type=int,
        default=0,
        metavar="N",
        help="measure also on N of the calibration windows, and on N others of the same texts",
    )
    p.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="measure N results at a time, each in a process with the model: seconds then say little (default: 1)",
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
    return p


def check(args: argparse.Namespace) -> None:
    """Raise `OptionError` for what would only fail after hours."""
    options = PruneConfig(samples=args.samples, sequence_length=args.sequence_length, device=args.device)
    for sparsity in args.sparsity:
        dataclasses.replace(options, sparsity=sparsity).validate()
    if args.max_windows is not None and args.max_windows < 1:
        raise OptionError(f"--max-windows is {args.max_windows}; it must be at least 1")
    if args.evaluation_length is not None and args.evaluation_length < 2:
        raise OptionError(f"--evaluation-length is {args.evaluation_length}; it must be at least 2")
    if args.jobs < 1:
        raise OptionError(f"--jobs is {args.jobs}; it must be at least 1")
    texts = len(shares(tuple(args.calibration)))
    if args.own_text and not texts <= args.own_text <= args.samples:
        raise OptionError(f"--own-text is {args.own_text}; it must be from {texts} (one of each text) to --samples")
    check_files(args.json, args.plot, args.markdown)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(arguments)
    args.sparsity = sorted(set(args.sparsity))
    several = len(args.calibration) > 1
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    progress = Progress(args.quiet)
    try:
        check(args)
        rows = rows_matching(args.rows, several)
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
    shown = [row for row in all_rows(several) if any(results.find(row, sparsity) for sparsity in args.sparsity)]
    print(heading(results.data, args.over_dense), "\n", sep="")
    print(aligned(cells(results, shown, args.sparsity, markdown=False, over_dense=args.over_dense)), "\n", sep="")
    print("\n".join(verdict(results, shown, args.sparsity)))
    if args.markdown:
        args.markdown.write_text(markdown(results, shown, args.sparsity, args.over_dense), encoding="utf-8")
    if args.plot:
        plot(results, all_rows(several), args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
