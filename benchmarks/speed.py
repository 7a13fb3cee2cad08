#!/usr/bin/env python3
"""Where the time of a run goes, and how far it is from what the machine can do.

    python benchmarks/speed.py opt-125m --samples 16 --sequence-length 2048 --runs 3 --json speed.json

Prunes a model of a published shape with random weights (nothing is downloaded), or the one in a directory, and reports,
for each phase, seconds, floating-point operations (as `--dry-run` counts them) and the share of the rate at which this
machine multiplies matrices, measured in the same run. Figures are medians over runs. `forward` and `moments` are
compared with products in the computing type, what solves (`order`, `subspace`, `repair`) with float64 ones.

More runs, if they are asked for: `--places` tells which functions the time goes to, `--launches` counts what the
device is told and what it is asked, `--idle` for which share of the time a GPU computes nothing. The last two take
longer than a run, `--idle` much memory: few --blocks do.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from launches import ELIMINATION, REST, Busy, Launches
from perplexity import aligned, check_files, provenance, write_json
from sampling import Sampling
from shapes import SHAPES, make_checkpoint, make_text, run_options
from transformers.utils import logging

from llm_snp.cli import BAD_INPUT
from llm_snp.config import DTYPES, METHODS, PruneConfig
from llm_snp.core.allocation import ALLOCATIONS
from llm_snp.core.stopwatch import Stopwatch
from llm_snp.errors import OptionError, SnpError
from llm_snp.running.preview import preview
from llm_snp.running.run import run
from llm_snp.system.device import device_facts

# Sides of the matrices whose product gives the rate.
SIDE = {"cpu": 2048, "cuda": 8192}
SOLVING = ("order", "subspace", "repair")
# Places that are shown; the JSON has all.
MOST = 40


def matrix_rate(device: torch.device, dtype: torch.dtype, runs: int = 5) -> float:
    """Floating-point operations per second of a square matrix product, the median of `runs`."""
    side = SIDE.get(device.type, 2048)
    a, b = (torch.randn(side, side, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    taken = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        (a @ b).sum().item()
        taken.append(time.perf_counter() - start)
    return 2.0 * side**3 / statistics.median(taken[1:])


def once(options: PruneConfig) -> dict[str, float]:
    """Seconds of each phase of one run, and of the whole."""
    start = time.perf_counter()
    with Stopwatch() as watch:
        run(options)
    whole = time.perf_counter() - start
    return watch.seconds | {REST: whole - sum(watch.seconds.values()), "whole": whole}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All facts of the table."""
    with TemporaryDirectory(prefix="llm-snp-speed-", dir=args.work) as temporary:
        folder = Path(temporary)
        if args.shape in SHAPES:
            make_checkpoint(folder / args.shape, SHAPES[args.shape], getattr(torch, args.stored), args.blocks)
            model = args.shape
        else:
            model = str(Path(args.shape).absolute())
        make_text(folder / "text.txt", 2 * args.samples * args.sequence_length)
        options = dataclasses.replace(run_options(folder, model, args), device=args.device, dtype=args.dtype)
        p = preview(options)
        types = {"computing": p.dtype, "float64": torch.float64}
        rates = {name: matrix_rate(p.job.device, dtype) for name, dtype in types.items()}
        runs = [once(options) for _ in range(args.runs)]
        # On a shared machine the rate is what it reached at its best, before or after.
        rates = {name: max(rates[name], matrix_rate(p.job.device, dtype)) for name, dtype in types.items()}
        more: dict[str, Any] = {}
        if args.launches:
            with Launches() as launches:
                run(options)
            more["launches"] = launches.found
        if args.idle:
            with Busy() as watch:
                run(options)
            more["busy"] = watch.found
        if args.places:
            with Sampling() as sampling:
                run(options)
            more["places"] = [[*place, seconds] for place, seconds in sampling.found.most_common()]
    return {
        "shape": args.shape,
        "blocks": p.job.config.num_hidden_layers,
        "samples": args.samples,
        "sequence_length": p.job.length,
        "method": args.method,
        "sparsity": args.sparsity,
        "device": device_facts(p.job.device, p.dtype),
        "rates": rates,
        "operations": p.estimate.operations,
        "runs": runs,
        "seconds": {name: statistics.median(r.get(name, 0.0) for r in runs) for name in runs[0]},
        "peak_device_bytes": torch.cuda.max_memory_allocated() if p.job.device.type == "cuda" else 0,
    } | more


def table(data: dict[str, Any]) -> list[list[str]]:
    """A line per phase."""
    lines = [["phase", "seconds", "of the time", "operations", "per second", "of the matrix rate"]]
    whole = data["seconds"]["whole"]
    for name, seconds in sorted(data["seconds"].items(), key=lambda item: (item[0] == "whole", -item[1])):
        work = data["operations"].get(name, 0.0)
        rate = data["rates"]["float64" if name in SOLVING else "computing"]
        done = work / seconds if seconds else 0.0
        lines.append(
            [
                name,
                f"{seconds:.2f}",
                f"{seconds / whole:.0%}",
                f"{work:.2e}" if work else "",
                f"{done:.2e}" if work else "",
                f"{done / rate:.0%}" if work else "",
            ]
        )
    return lines


def summary(data: dict[str, Any]) -> list[str]:
    """What the table comes to."""
    seconds, rates = data["seconds"], data["rates"]
    floor = sum(data["operations"][name] for name in ("forward", "backward", "moments")) / rates["computing"]
    outside = seconds["whole"] - sum(seconds.get(name, 0.0) for name in ("forward", "backward", "moments"))
    return [
        f"matrix products: {rates['computing']:.2e} operations per second in {data['device']['dtype']}, "
        f"{rates['float64']:.2e} in float64",
        f"outside forward, backward and moments: {outside / seconds['whole']:.0%} of the time",
        f"the whole takes {seconds['whole'] / floor:.2f} times what forward, backward and moments would at that rate",
    ]


def launch_table(launches: dict[str, Any]) -> list[list[str]]:
    """A line per phase: kernels and values read back, of the elimination also those for every unit."""
    units = launches["units"]
    lines = [["phase", "kernels", "read back", "units", "kernels per unit"]]
    for name, count in sorted(launches["kernels"].items(), key=lambda item: -item[1]):
        per = [str(units), f"{count / units:.1f}"] if name == ELIMINATION and units else ["", ""]
        lines.append([name, str(count), str(launches["reads"].get(name, 0)), *per])
    every = [sum(launches[kind].values()) for kind in ("kernels", "reads")]
    return [*lines, ["whole", *map(str, every), "", ""]]


def busy_table(phases: dict[str, Any]) -> list[list[str]]:
    """A line per phase: how long, how many kernels, and how idle the device was."""
    lines = [["phase", "seconds", "kernels", "computing", "idle"]]
    for name, p in sorted(phases.items(), key=lambda item: -item[1]["seconds"]):
        lines.append([name, f"{p['seconds']:.2f}", f"{p['kernels']:.0f}", f"{p['running']:.2f}", f"{p['idle']:.0%}"])
    seconds, running = (sum(p[kind] for p in phases.values()) for kind in ("seconds", "running"))
    kernels = sum(p["kernels"] for p in phases.values())
    return [*lines, ["whole", f"{seconds:.2f}", f"{kernels:.0f}", f"{running:.2f}", f"{1 - running / seconds:.0%}"]]


def places_table(places: Sequence[tuple[str, str, float]]) -> list[list[str]]:
    """A line per place in the code, those that took the most."""
    return [["phase", "in", "seconds"], *([phase, place, f"{taken:.2f}"] for phase, place, taken in places[:MOST])]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("shape", metavar="SHAPE", help=f"{', '.join(SHAPES)}, or the directory of a model")
    p.add_argument("--blocks", type=int, metavar="N", help="make the model N blocks deep only")
    p.add_argument("--samples", type=int, default=128, metavar="N", help="calibration windows (default: 128)")
    p.add_argument("--sequence-length", type=int, default=2048, metavar="T", help="tokens per window (default: 2048)")
    p.add_argument("--sparsity", type=float, default=0.3, metavar="S", help="share to remove (default: 0.3)")
    p.add_argument("--method", default="best", choices=METHODS, help="preset (default: best)")
    p.add_argument("--allocation", choices=ALLOCATIONS, help="instead of the preset's")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:i (default: auto)")
    p.add_argument("--dtype", default="auto", choices=DTYPES, help="type to compute in (default: auto)")
    p.add_argument("--stored", default="float16", choices=DTYPES[1:], help="type of the checkpoint (default: float16)")
    p.add_argument("--runs", type=int, default=3, metavar="N", help="figures are medians over N runs (default: 3)")
    p.add_argument("--places", action="store_true", help="tell which functions the time goes to, in one more run")
    p.add_argument("--launches", action="store_true", help="count kernels and values read back, in one more run")
    p.add_argument("--idle", action="store_true", help="measure how idle a GPU is, in one more run")
    p.add_argument(
        "--work", type=Path, metavar="DIR", help="where the checkpoint is made (default: a temporary folder)"
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        check_files(args.json)
        if args.shape not in SHAPES and args.blocks:
            raise OptionError("--blocks is for a shape; a model in a directory has those that it has")
        data = provenance(__file__, arguments) | measure(args)
    except (SnpError, torch.OutOfMemoryError) as error:
        print(f"speed: {str(error).splitlines()[0]}", file=sys.stderr)
        return BAD_INPUT
    print(aligned(table(data)), "", *summary(data), sep="\n")
    if "places" in data:
        print("", aligned(places_table(data["places"])), sep="\n")
    if "launches" in data:
        print("", aligned(launch_table(data["launches"])), sep="\n")
    if "busy" in data:
        print("", aligned(busy_table(data["busy"])), sep="\n")
    if args.json:
        write_json(args.json, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
