#!/usr/bin/env python3
"""What has to be known of a GPU, in few minutes of it: correctness, speed, memory, tests, the most important first.

    python benchmarks/gpu.py --text wiki-calibration.txt --evaluate wiki.test.raw [--model DIR] [--json gpu.json]

Each step is a process of its own with a limit of its own, prints as it goes, and is ended when its time is up; the next
one then begins, as after a failure. A table at the end says how each went, also after Ctrl-C or SIGTERM; the exit code
is 1 if any failed. `--device cpu --quick` goes through all of it with tiny settings, to try the script without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from perplexity import aligned, check_files, provenance, write_json

from llm_snp.cli import BAD_INPUT
from llm_snp.errors import OptionError, SnpError

HERE = Path(__file__).parent
# Types in which a device is compared with the CPU, and the share by which the perplexity may differ.
TYPES = ("float32", "float16", "bfloat16")
TOLERANCE = 1e-3
PYTHON = [sys.executable, "-u"]


@dataclass(frozen=True)
class Step:
    """limit: seconds; command: what is run; output: where a prune writes its result, for `compared`."""

    name: str
    limit: int
    command: list[str]
    output: Path | None = None


def steps(args: argparse.Namespace, folder: Path) -> list[Step]:
    """All steps, the most important first."""
    quick = args.quick
    windows = ["--samples", "4" if quick else "32", "--sequence-length", "32" if quick else "256"]
    text = ["--calibration", str(args.text), "--evaluate", str(args.evaluate)]
    found = []

    def prune(name: str, model: str, device: str, dtype: str, limit: int) -> None:
        output = folder / name.replace(" ", "-")
        more = ["--sparsity", "0.3", "--device", device, "--dtype", dtype, "--output", str(output), "--quiet"]
        found.append(Step(name, limit, [*PYTHON, "-m", "llm_snp", model, *windows, *text, *more], output))

    def speed(name: str, limit: int, *arguments: str) -> None:
        command = [*PYTHON, str(HERE / "speed.py"), *arguments, "--device", args.device, "--runs", "1"]
        found.append(Step(name, limit, [*command, "--work", str(folder), "--json", str(folder / f"{len(found)}.json")]))

    models = [HERE / "models" / "llama-wiki-1m", HERE / "models" / "opt-wiki-tall"]
    shape, large = (str(models[0]),) * 2 if quick else ("opt-1.3b", "opt-13b")
    few = ["--samples", "2", "--sequence-length", "16"] if quick else ["--samples", "128", "--sequence-length", "2048"]
    short = [] if quick else ["--blocks", "2"]
    half = "float32" if args.device == "cpu" else "float16"
    two = few if quick else ["--samples", "16", "--sequence-length", "2048"]
    speed("2 blocks in 16 bits", 60, shape, *short, "--dtype", half, *two)
    for model in models[:1] if quick else models:
        prune(f"{model.name} cpu", str(model), "cpu", "float32", 120)
        for dtype in TYPES[:1] if quick else TYPES:
            prune(f"{model.name} {dtype}", str(model), args.device, dtype, 60)
    speed("best", 120, shape, "--method", "best", "--dtype", half, *few)
    speed("snp", 60, shape, "--method", "snp", "--dtype", half, *few)
    speed("large", 90, large, *short, "--dtype", half, *few)
    speed("idle", 90, shape, *short, "--dtype", half, *two, "--idle")
    if args.model:
        prune("model", str(args.model), args.device, half, 120)
    tests = ["tests/dense/test_transfers.py"] if quick else ["-m", "gpu", "tests"]
    kernels = [] if quick else ["tests/core/test_elimination_kernels.py"]
    found.append(Step("tests", 120, [*PYTHON, "-m", "pytest", *tests]))
    if kernels:
        found.append(Step("kernels", 90, [*PYTHON, "-m", "pytest", *kernels]))
    return found


def carry_out(step: Step) -> dict[str, Any]:
    """Run a step, whose output is seen as it comes. Its seconds, and `ok`, `failed (code)` or `out of time`."""
    print(f"\n== {step.name} (at most {step.limit} s): {shlex.join(step.command[2:])}", flush=True)
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    process = subprocess.Popen(step.command, cwd=HERE.parent, env=environment, start_new_session=True)
    try:
        code = process.wait(timeout=step.limit)
        ended = "ok" if code == 0 else f"failed ({code})"
    except subprocess.TimeoutExpired:
        ended = "out of time"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {"step": step.name, "ended": ended, "seconds": time.perf_counter() - start}


def result_of(output: Path) -> dict[str, Any]:
    """What is compared of a pruned model: perplexity on the evaluation text, and the widths that are left."""
    report = json.loads((output / "report.json").read_text())
    (evaluated,) = report["evaluation"].values()
    return {"perplexity": evaluated["pruned"]["perplexity"], "kept": report["plan"]["kept"]}


def compared(results: list[dict[str, Any]]) -> None:
    """Note for each pruned model how far its perplexity is from that on the CPU, and fail what is too far."""
    reference: dict[str, Any] = {}
    for row in results:
        if "perplexity" not in row:
            continue
        model, _, kind = row["step"].partition(" ")
        if kind == "cpu":
            reference[model] = row
        elif model in reference:
            row["difference"] = row["perplexity"] / reference[model]["perplexity"] - 1
            row["same_widths"] = row["kept"] == reference[model]["kept"]
            if abs(row["difference"]) > TOLERANCE:
                row["ended"] = f"off by more than {TOLERANCE:.1%}"


def table(results: list[dict[str, Any]]) -> list[list[str]]:
    """A line per step."""
    lines = [["step", "ended", "seconds", "perplexity", "against the CPU", "same widths"]]
    for row in results:
        against = f"{row['difference']:+.3%}" if "difference" in row else ""
        same = {True: "yes", False: "no"}.get(row.get("same_widths", ""), "")
        perplexity = f"{row['perplexity']:.3f}" if "perplexity" in row else ""
        lines.append([row["step"], row["ended"], f"{row['seconds']:.1f}", perplexity, against, same])
    return lines


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--text", type=Path, required=True, metavar="FILE", help="to calibrate on")
    p.add_argument("--evaluate", type=Path, required=True, metavar="FILE", help="to measure perplexity on")
    p.add_argument("--model", type=Path, metavar="DIR", help="a model worth pruning, such as SmolLM2-135M")
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="what to try (default: cuda)")
    p.add_argument("--quick", action="store_true", help="tiny settings, to try the script itself")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(arguments)
    results: list[dict[str, Any]] = []
    try:
        check_files(args.json)
        for file in (args.text, args.evaluate):
            if not file.is_file():
                raise OptionError(f"{file} is no file; give a text")
        args.text, args.evaluate = args.text.absolute(), args.evaluate.absolute()
        args.model = args.model and args.model.absolute()
        data = provenance(__file__, arguments)
    except SnpError as error:
        print(f"gpu: {error}", file=sys.stderr)
        return BAD_INPUT
    with TemporaryDirectory(prefix="llm-snp-gpu-") as temporary:
        folder = Path(temporary)
        try:
            for number, step in enumerate(steps(args, folder)):
                results.append(carry_out(step))
                if step.output is not None and results[-1]["ended"] == "ok":
                    results[-1] |= result_of(step.output)
                figures = folder / f"{number}.json"
                if figures.exists():
                    results[-1]["speed"] = json.loads(figures.read_text())
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
    compared(results)
    print("", aligned(table(results)), sep="\n")
    if args.json:
        write_json(args.json, data | {"device": args.device, "results": results})
    return int(any(row["ended"] != "ok" for row in results))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a step must not outlive this process
    sys.exit(main())
