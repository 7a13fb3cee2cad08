#!/usr/bin/env python3
"""Perplexity of causal language models of transformers, dense or pruned, side by side.

    python benchmarks/perplexity.py facebook/opt-125m opt-125m-snp-30 --evaluate wikitext2 --evaluate c4

The protocol is that of the literature: the whole corpus tokenised once with the model's own tokenizer, consecutive
windows that do not overlap, exp of the mean negative log-likelihood of all predicted tokens. Models are loaded whole;
importing llm_snp makes its pruned models load without --trust-remote-code.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import llm_snp
from llm_snp import SnpError
from llm_snp.cli import BAD_INPUT
from llm_snp.config import DTYPES, PruneConfig
from llm_snp.dense.checkpoint import Checkpoint
from llm_snp.dense.data import Windows, evaluation_windows
from llm_snp.dense.hub import config_dtype, locate
from llm_snp.dense.tokenizer import load_tokenizer
from llm_snp.documents.report import versions
from llm_snp.errors import CheckpointError, OutputError
from llm_snp.evaluation.perplexity import perplexity_loaded
from llm_snp.pruning.job import window_length
from llm_snp.system.device import device_facts, resolve_device, resolve_dtype
from llm_snp.system.progress import Progress
from llm_snp.system.signals import exit_code

REASON = 200  # characters at most that an error quotes


def load(name: str, directory: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    """Model and tokenizer, on the CPU. Raises `CheckpointError` if it does not load, or not every weight is there."""
    # Code files are not among what `locate` fetches.
    source = name if trust_remote_code else directory
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True) if trust_remote_code else None
        model, found = AutoModelForCausalLM.from_pretrained(
            source, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except Exception as error:  # files that are not what the class expects fail in many ways
        reason = " ".join(str(error).split())[:REASON] or type(error).__name__
        raise CheckpointError(f"{name} is no causal language model that transformers can load: {reason}") from error
    # transformers only warns, and gives such weights random values.
    lacking = [*found["missing_keys"], *found["mismatched_keys"]]
    if lacking:
        raise CheckpointError(f"{name} lacks {len(lacking)} of the model's weights, among them {lacking[0]}")
    return model.eval(), load_tokenizer(directory) if tokenizer is None else tokenizer


def labels(sources: Sequence[str]) -> dict[str, str]:
    """Short names of corpora: the file's name, where that is unambiguous."""
    names = [Path(source).name for source in sources]
    return {s: name if names.count(name) == 1 else s for s, name in zip(sources, names, strict=True)}


def windows_of(sources: Sequence[str], tokenizer: Any, length: int, most: int | None = None) -> dict[str, Windows]:
    """The windows of each text by its label, the first `most` of them (all)."""
    found = {label: evaluation_windows(source, tokenizer, length) for source, label in labels(sources).items()}
    return {label: dataclasses.replace(windows, tokens=windows.tokens[:most]) for label, windows in found.items()}


def sha256(files: Iterable[Path]) -> str:
    """One hash over the contents of files."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def code_state() -> str:
    """A short hash of llm_snp's source: the state of the code that measures."""
    return sha256(sorted(Path(llm_snp.__file__).parent.rglob("*.py")))[:12]


def evaluate(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Load one model and measure its perplexity on every corpus; the entry for the JSON file."""
    directory = locate(name)
    size = sum(file.stat().st_size for file in Checkpoint(directory).files)
    device = resolve_device(args.device)
    progress = Progress(args.quiet)
    progress.say(f"load {name} ...")
    model, tokenizer = load(name, directory, args.trust_remote_code)
    config = model.config.get_text_config()
    dtype = resolve_dtype(args.dtype, device, config_dtype(config))
    model = model.to(device, dtype)
    length = window_length(PruneConfig(sequence_length=args.sequence_length), config)
    entry: dict[str, Any] = {
        "model": name,
        "type": config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": size,
        "sequence_length": length,
        "device": device_facts(device, dtype),
        "evaluation": {},
    }
    for label, windows in windows_of(args.evaluate, tokenizer, length).items():
        start = time.perf_counter()
        with progress.phase("perplexity", len(windows.tokens), label, unit="window") as step:
            result = perplexity_loaded(model, windows, step)
        entry["evaluation"][label] = {
            "perplexity": result.perplexity,
            "tokens": result.tokens,
            "windows": result.windows,
            "sha256": windows.sha256,
            "seconds": round(time.perf_counter() - start, 3),
        }
    return entry


def provenance(script: str, arguments: Sequence[str] | None) -> dict[str, Any]:
    """Versions, the command as it can be typed again, and the date."""
    return {
        "versions": versions(),
        "command": shlex.join(
            ["python", f"benchmarks/{Path(script).name}", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def check_files(*files: Path | None) -> None:
    """Raise `OutputError` for a result file whose directory does not exist, before hours are spent."""
    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            raise OutputError(f"{file} cannot be written: its directory does not exist; create it first")


def write_json(file: Path, data: Any) -> None:
    """Write a JSON file whole or not at all."""
    temporary = file.with_name(f".{file.name}.partial")
    temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table as text: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )


def markdown_table(rows: Sequence[Sequence[str]], rule: str = "---") -> str:
    """The same as Markdown, the first row as its head; rule: of all columns but the first, "---:" for numbers."""
    head, *rest = rows
    lines = [head, ["---", *[rule] * (len(head) - 1)], *rest]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(models: Sequence[dict[str, Any]], asked: int) -> str:
    """One line per model, and what has to be said about their windows."""
    corpora = list(models[0]["evaluation"])
    rows = [("model", "parameters", "MB", *(f"perplexity {corpus}" for corpus in corpora), "tokens", "seconds")]
    for m in models:
        results = [m["evaluation"][corpus] for corpus in corpora]
        rows.append(
            (
                m["model"],
                f"{m['parameters']:,}",
                f"{m['bytes'] / 1e6:,.1f}",
                *(f"{r['perplexity']:,.2f}" for r in results),
                " + ".join(f"{r['tokens']:,}" for r in results),
                f"{sum(r['seconds'] for r in results):.1f}",
            )
        )
    notes = [
        f"note  windows of {m['model']} have {m['sequence_length']} tokens, not {asked}: it has no more positions"
        for m in models
        if m["sequence_length"] < asked
    ]
    return "\n".join([aligned(rows), *notes])


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="+", metavar="MODEL", help="Hub id or directory")
    p.add_argument("--evaluate", action="append", metavar="TEXT", help="wikitext2, c4 or a file; repeatable")
    p.add_argument("--sequence-length", type=int, default=2048, metavar="T", help="tokens per window (default: 2048)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:i (default: auto)")
    p.add_argument("--dtype", default="auto", choices=DTYPES, help="type to compute in (default: auto)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the results there, after each model")
    p.add_argument("--trust-remote-code", action="store_true", help="run modelling code that comes with a checkpoint")
    p.add_argument("--quiet", action="store_true", help="print the table only")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(arguments)
    args.evaluate = args.evaluate or ["wikitext2"]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    data: dict[str, Any] = provenance(__file__, arguments) | {"models": []}
    code = 0
    try:
        PruneConfig(sequence_length=args.sequence_length, device=args.device).validate()
        check_files(args.json)
        for name in args.model:
            data["models"].append(evaluate(name, args))
            if args.json:
                write_json(args.json, data)
    except (SnpError, torch.OutOfMemoryError) as error:
        print(f"perplexity: {str(error).splitlines()[0]}", file=sys.stderr)
        code = BAD_INPUT
    except KeyboardInterrupt as error:
        print("perplexity: interrupted", file=sys.stderr)
        code = exit_code(error)
    if data["models"]:
        print(table(data["models"], args.sequence_length))
    return code


if __name__ == "__main__":
    sys.exit(main())
