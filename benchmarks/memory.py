#!/usr/bin/env python3
"""What a run needs at real sizes: the dry run's figures for every OPT, and measured peaks beside them.

    python benchmarks/memory.py --measure opt-125m --measure opt-1.3b --samples 8 --sequence-length 512 \\
        --json memory.json --markdown memory.md

Checkpoints have random weights in fp16. Each is made on disk (in --work), pruned by `python -m llm_snp` in a process
of its own, and removed; the peak is what the system counted for that process, interpreter and libraries included.
`--blocks N` makes them N blocks deep only, for a quick look.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from perplexity import aligned, check_files, markdown_table, provenance, write_json
from shapes import SHAPES, make_checkpoint, make_config, make_text, run_options

from llm_snp.cli import BAD_INPUT
from llm_snp.core.allocation import ALLOCATIONS
from llm_snp.errors import SnpError
from llm_snp.running.preview import preview

# What a process that has only imported everything takes is measured, too: the estimate is without it.
IMPORTS = "import llm_snp.running.run; from llm_snp.documents.report import peak_host_bytes; print(peak_host_bytes())"


def estimated(name: str, args: argparse.Namespace, folder: Path, device: str) -> dict[str, Any]:
    """The dry run's figures for one shape; `cuda` is estimated without there being one."""
    directory = folder / name
    make_config(directory, SHAPES[name], torch.float16, args.blocks)
    p = preview(run_options(folder, name, args), torch.device(device))
    e = p.estimate
    return {"device": e.device, "host": e.host, "disk": e.disk, "operations": e.operations, "parameters": p.parameters}


def measured(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the checkpoint, prune it in a process of its own, and read the peak from its report."""
    directory, output = folder / name, folder / "pruned"
    make_checkpoint(directory, SHAPES[name], torch.float16, args.blocks)
    o = run_options(folder, name, args)
    command = [sys.executable, "-m", "llm_snp", str(directory), "--sparsity", str(o.sparsity), "--output", str(output)]
    command += ["--calibration", str(o.calibration), "--samples", str(o.samples), "--method", o.method, "--overwrite"]
    command += ["--allocation", o.allocation] if o.allocation else []
    command += ["--sequence-length", str(o.sequence_length), "--device", "cpu", "--no-evaluate", "--quiet"]
    start = time.perf_counter()
    subprocess.run(command, check=True)
    report = json.loads((output / "report.json").read_text())
    (directory / "model.safetensors").unlink()
    return {
        "peak_bytes": report["peak_memory"]["host_bytes"],
        "wall_seconds": time.perf_counter() - start,
        "seconds": report["seconds"],
        "checkpoint_bytes": report["model"]["bytes"],
        "result_bytes": report["model"]["bytes_pruned"],
        "removed": report["sparsity"]["achieved"],
        "kept": report["plan"]["kept"],
    }


def table(data: dict[str, Any]) -> list[list[str]]:
    """A line per shape."""
    lines = [["", "GPU memory", "host beside a GPU", "host, CPU only", "measured", "disk", "operations"]]
    for name, row in data["shapes"].items():
        gpu, cpu, peak = row["cuda"], row["cpu"], row.get("measured")
        lines.append(
            [
                name,
                f"{gpu['device'] / 1e9:.2f} GB",
                f"{(gpu['host'] + data['imports']) / 1e9:.2f} GB",
                f"{(cpu['host'] + data['imports']) / 1e9:.2f} GB",
                f"{peak['peak_bytes'] / 1e9:.2f} GB" if peak else "",
                f"{gpu['disk'] / 1e9:.2f} GB",
                f"{sum(gpu['operations'].values()):.1e}",
            ]
        )
    return lines


def markdown(data: dict[str, Any]) -> str:
    lines = table(data)
    by = f" --allocation {data['allocation']}" if data["allocation"] else ""
    depth = f", {data['blocks']} blocks of each" if data["blocks"] else ""
    body = [
        "# What a run needs",
        "",
        f"`--method {data['method']}{by} --sparsity {data['sparsity']:g}` with {data['samples']} windows of "
        f"{data['sequence_length']} tokens, fp16 checkpoints with random weights{depth}: computed by `--dry-run`, and "
        "the peak resident size of the process where it was measured (CPU, computing in float32). Host memory "
        f"includes {data['imports'] / 1e9:.2f} GB of interpreter and libraries; without evaluation.",
        "",
        markdown_table(lines, "---:"),
        "",
        f"{data['date']}; " + ", ".join(f"{name} {number}" for name, number in data["versions"].items()) + ".",
        "",
        f"    {data['command']}",
    ]
    return "\n".join(body) + "\n"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--measure", action="append", default=[], choices=SHAPES, help="also prune this shape; repeatable")
    p.add_argument("--samples", type=int, default=128, metavar="N", help="calibration windows (default: 128)")
    p.add_argument("--sequence-length", type=int, default=2048, metavar="T", help="tokens per window (default: 2048)")
    p.add_argument("--sparsity", type=float, default=0.3, metavar="S", help="share to remove (default: 0.3)")
    p.add_argument("--method", default="best", help="preset (default: best)")
    p.add_argument("--allocation", choices=ALLOCATIONS, help="instead of the preset's; uniform needs no measuring pass")
    p.add_argument("--blocks", type=int, metavar="N", help="make the models N blocks deep only")
    p.add_argument("--work", type=Path, metavar="DIR", help="where checkpoints are made (default: a temporary folder)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    p.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(arguments)
    try:
        check_files(args.json, args.markdown)
        with TemporaryDirectory(prefix="llm-snp-memory-", dir=args.work) as temporary:
            folder = Path(temporary)
            make_text(folder / "text.txt", 2 * args.samples * args.sequence_length)
            imports = int(subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True).stdout)
            data = provenance(__file__, arguments) | {
                "method": args.method,
                "allocation": args.allocation,
                "sparsity": args.sparsity,
                "samples": args.samples,
                "sequence_length": args.sequence_length,
                "blocks": args.blocks,
                "imports": imports,
                "shapes": {
                    name: {device: estimated(name, args, folder, device) for device in ("cpu", "cuda")}
                    for name in SHAPES
                },
            }
            for name in args.measure:
                data["shapes"][name]["measured"] = measured(name, args, folder)
                if args.json:
                    write_json(args.json, data)
    except (SnpError, subprocess.CalledProcessError) as error:
        print(f"memory: {error}", file=sys.stderr)
        return BAD_INPUT
    print(aligned(table(data)))
    if args.json:
        write_json(args.json, data)
    if args.markdown:
        args.markdown.write_text(markdown(data), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
