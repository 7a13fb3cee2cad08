#!/usr/bin/env python3
"""What has to be known of a GPU, in few minutes of it: correctness, speed, memory, tests, the most important first.

    python benchmarks/gpu.py --text wiki-calibration.txt --evaluate wiki.test.raw [--model DIR] [--json gpu.json]

Each step is a process of its own with a limit of its own, and is ended when its time is up; the next one then begins,
as after a failure. What times nothing runs side by side and prints when it is done, what is timed runs alone and prints
as it goes. A table at the end says how each went, also after Ctrl-C or SIGTERM; the exit code is 1 if any failed.
`--device cpu --quick` goes through all of it with tiny settings, to try the script without a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
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
POLL = 0.05  # seconds


@dataclass(frozen=True)
class Step:
    """limit: seconds; command: what is run; output: where a prune writes its result, for `compared`; alone: timed."""

    name: str
    limit: int
    command: list[str]
    output: Path | None = None
    alone: bool = False


def steps(args: argparse.Namespace, folder: Path) -> list[Step]:
    """All steps, the most important first."""
    quick = args.quick
    windows = ["--samples", "4" if quick else "32", "--sequence-length", "32" if quick else "256"]
    text = ["--calibration", str(args.text), "--evaluate", str(args.evaluate)]
    found = []

    def prune(name: str, model: str, device: str, dtype: str, limit: int, method: str = "best") -> None:
        output = folder / name.replace(" ", "-")
        more = ["--sparsity", "0.3", "--method", method, "--device", device, "--dtype", dtype]
        more += ["--output", str(output), "--quiet"]
        found.append(Step(name, limit, [*PYTHON, "-m", "llm_snp", model, *windows, *text, *more], output))

    def speed(name: str, limit: int, *arguments: str, alone: bool = True) -> None:
        command = [*PYTHON, str(HERE / "speed.py"), *arguments, "--device", args.device, "--runs", "1"]
        command += ["--work", str(folder), "--json", str(folder / f"{name}.json")]
        found.append(Step(name, limit, command, alone=alone))

    models = [HERE / "models" / name for name in ("llama-wiki-1m", "opt-wiki-tall", "mixtral-wiki-2m")]
    shape, large = (str(models[0]),) * 2 if quick else ("opt-1.3b", "opt-13b")
    few = ["--samples", "2", "--sequence-length", "16"] if quick else ["--samples", "128", "--sequence-length", "2048"]
    short = [] if quick else ["--blocks", "2"]
    half = "float32" if args.device == "cpu" else "float16"
    two = few if quick else ["--samples", "16", "--sequence-length", "2048"]
    speed("2 blocks in 16 bits", 90, shape, *short, "--dtype", half, *two, alone=False)
    for model in models[:1] if quick else models:
        prune(f"{model.name} cpu", str(model), "cpu", "float32", 120)
        for dtype in TYPES[:1] if quick else TYPES:
            prune(f"{model.name} {dtype}", str(model), args.device, dtype, 90)
    prune("everything", str(models[0]), args.device, "float32", 120, method="everything")
    if args.model:
        prune("model", str(args.model), args.device, half, 120)
    tests = ["tests/dense/test_transfers.py"] if quick else ["-m", "gpu", "tests"]
    kernels = [] if quick else ["tests/core/test_elimination_kernels.py"]
    found.append(Step("tests", 120, [*PYTHON, "-m", "pytest", *tests]))
    if kernels:
        found.append(Step("kernels", 90, [*PYTHON, "-m", "pytest", *kernels]))
    speed("best", 120, shape, "--method", "best", "--dtype", half, *few)
    speed("snp", 150, shape, "--method", "snp", "--dtype", half, *few)
    speed("large", 90, large, *short, "--dtype", half, *few)
    speed("idle", 90, shape, *short, "--dtype", half, *two, "--idle")
    return found


def stages(steps: Sequence[Step]) -> list[list[Step]]:
    """What runs at the same time: a timed step alone, others side by side."""
    kinds = itertools.groupby(enumerate(steps), key=lambda item: item[0] if item[1].alone else "together")
    return [[step for _, step in members] for _, members in kinds]


def carry_out(stage: Sequence[Step], folder: Path) -> list[dict[str, Any]]:
    """Run the steps of a stage. Seconds of each, and `ok`, `failed (code)` or `out of time`.

    folder: takes what each of several steps prints, until it has ended.
    """
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    threads = str(max(1, (os.cpu_count() or 1) // len(stage)))  # or those of the steps would wait for each other
    environment = {"OMP_NUM_THREADS": threads} | os.environ | {"PYTHONPATH": path}
    running: dict[str, tuple[Step, subprocess.Popen[bytes], float]] = {}
    done: dict[str, dict[str, Any]] = {}
    try:
        for step in stage:
            print(f"\n== {step.name} (at most {step.limit} s): {shlex.join(step.command[2:])}", flush=True)
            with ExitStack() as stack:
                out = None if len(stage) == 1 else stack.enter_context((folder / f"{step.name}.log").open("wb"))
                process = subprocess.Popen(
                    step.command, cwd=HERE.parent, env=environment, start_new_session=True, stdout=out, stderr=out
                )
            running[step.name] = step, process, time.perf_counter()
        while running:
            for name, (step, process, start) in list(running.items()):
                seconds, code = time.perf_counter() - start, process.poll()
                if code is None and seconds < step.limit:
                    continue
                ended = "out of time" if code is None else "ok" if code == 0 else f"failed ({code})"
                done[name] = {"step": name, "ended": ended, "seconds": seconds}
                _end(running.pop(name)[1])
                if len(stage) > 1:
                    log = (folder / f"{name}.log").read_text(errors="replace")
                    print(f"\n-- {name}: {ended} after {seconds:.1f} s\n{log}", flush=True)
            time.sleep(POLL)
    finally:
        for _, process, _ in running.values():
            _end(process)
    return [done[step.name] for step in stage]


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


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
    p.add_argument("--only", default="", metavar="REGEX", help="only the steps whose names match")
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
            for stage in stages([step for step in steps(args, folder) if re.search(args.only, step.name)]):
                for step, row in zip(stage, carry_out(stage, folder), strict=True):
                    results.append(row)
                    if step.output is not None and row["ended"] == "ok":
                        row |= result_of(step.output)
                    figures = folder / f"{step.name}.json"
                    if figures.exists():
                        row["speed"] = json.loads(figures.read_text())
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
