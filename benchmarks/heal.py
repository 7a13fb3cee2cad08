#!/usr/bin/env python3
"""What a short training beside the dense teacher wins back of what pruning has cost.

    python benchmarks/heal.py opt-wiki-tall llama-wiki-1m --calibration wiki.txt --text wiki.txt \\
        --evaluate wiki.test.raw --evaluate c4.jsonl.gz --max-windows 256 --tokens 200000 500000 1000000 2000000 \\
        --work folder --json heal.json --markdown heal.md

Each model is pruned once, to `--sparsity`, and then healed with each number of tokens, all weights and LoRA. `--again`
also prunes to 30 %, heals, prunes to `--sparsity` and heals, with half of the tokens each time. Pruned models stay in
the work folder. The JSON file is written after each result, and what it has for the same model is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from perplexity import check_files, code_state, markdown_table, provenance, windows_of, write_json
from transformers.utils import logging

from llm_snp import SnpError
from llm_snp.cli import BAD_INPUT
from llm_snp.config import PruneConfig
from llm_snp.dense.hub import load_config, locate
from llm_snp.dense.tokenizer import load_tokenizer
from llm_snp.dense.whole import whole_model
from llm_snp.documents.writing import read_report
from llm_snp.errors import CheckpointError
from llm_snp.evaluation.perplexity import perplexity_loaded
from llm_snp.healing.options import HealConfig
from llm_snp.healing.run import heal
from llm_snp.pruning.job import window_length
from llm_snp.running.run import run
from llm_snp.system.device import device_facts, resolve_device
from llm_snp.system.progress import say
from llm_snp.system.signals import exit_code

FIRST = 0.3  # what --again removes before the first healing


class Bench:
    """What has been measured, and how to measure what is missing."""

    def __init__(self, args: argparse.Namespace, origin: dict[str, Any]):
        self.args = args
        self.device = resolve_device(args.device)
        known = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
        self.data = origin | {"device": device_facts(self.device, torch.float32), "models": known.get("models", {})}
        self.code = code_state()

    def perplexity(self, directory: Path) -> dict[str, float]:
        """On each corpus, by its label."""
        config = load_config(directory)
        model = whole_model(directory, config, torch.float32, CheckpointError).eval().to(self.device)
        tokenizer, length = load_tokenizer(directory), window_length(PruneConfig(), config)
        corpora = windows_of(self.args.evaluate, tokenizer, length, self.args.max_windows)
        return {label: perplexity_loaded(model, windows, lambda: None).perplexity for label, windows in corpora.items()}

    def pruned(self, model: Path, sparsity: float, output: Path) -> Path:
        """The result in `output`, made unless it is there."""
        if not output.exists():
            run(
                PruneConfig(
                    str(model),
                    sparsity,
                    str(output),
                    calibration=tuple(self.args.calibration),
                    samples=self.args.samples,
                    evaluate=(),
                    device=self.args.device,
                    quiet=True,
                )
            )
        return output

    def healed(self, directory: Path, teacher: Path, tokens: int, lora: int | None, output: Path) -> dict[str, Any]:
        """Heal into `output`; what the report says of it, and the perplexities."""
        options = HealConfig(
            str(directory),
            tuple(self.args.text),
            tokens,
            teacher=str(teacher),
            output=str(output),
            lora=lora,
            batch=self.args.batch,
            learning_rate=self.args.learning_rate,
            device=self.args.device,
            evaluate=(),
            quiet=True,
        )
        lines = heal(options)
        if not output.exists():
            return {"error": lines[0], "code": self.code}
        step = read_report(output)["healing"][-1]
        names = ("tokens", "steps", "trained", "seconds", "held_out", "curve")
        rate = {"learning_rate": step["options"]["learning_rate"], "passes": step["text"]["passes"]}
        return {name: step[name] for name in names} | rate | {"perplexity": self.perplexity(output), "code": self.code}

    def again(self, model: Path, label: str, tokens: int, folder: Path) -> dict[str, Any]:
        """Prune, heal, prune what came of it to the whole sparsity, heal."""
        first = self.pruned(model, FIRST, self.args.work / f"{label}-{100 * FIRST:g}")
        self.healed(first, model, tokens // 2, None, folder / "first")
        rest = 1 - (1 - self.args.sparsity) / (1 - FIRST)  # of what is left
        try:
            second = self.pruned(folder / "first", rest, folder / "second")
        except SnpError as error:
            return {"error": str(error), "code": self.code}
        return self.healed(second, model, tokens // 2, None, folder / "out")

    def fill(self, name: str) -> None:
        """Everything about one model, cheapest first."""
        model, args, label = locate(name), self.args, Path(name).name
        found = self.data["models"].setdefault(label, {"sparsity": args.sparsity, "rows": {}})
        result = self.pruned(model, args.sparsity, args.work / f"{label}-{100 * args.sparsity:g}")
        for which, directory in (("dense", model), ("pruned", result)):
            if which not in found:
                found[which] = self.perplexity(directory)
                self.save(f"{label}, {which}: {found[which]}")
        hows = {"all weights": None, f"LoRA, rank {args.lora}": args.lora}
        for tokens in sorted(args.tokens):
            for how in [*hows, *(["30 %, healed, pruned again, healed"] if args.again else [])]:
                row = found["rows"].setdefault(how, {})
                if str(tokens) in row and "error" not in row[str(tokens)]:
                    continue
                with tempfile.TemporaryDirectory(prefix="llm-snp-heal-") as folder:
                    if how in hows:
                        measured = self.healed(result, model, tokens, hows[how], Path(folder, "out"))
                    else:
                        measured = self.again(model, label, tokens, Path(folder))
                row[str(tokens)] = measured
                self.save(f"{label}, {how}, {tokens:,}: {measured.get('error') or measured['perplexity']}")

    def save(self, line: str) -> None:
        say(line)
        if self.args.json:
            write_json(self.args.json, self.data)


def markdown(data: dict[str, Any]) -> str:
    """A table for each model: perplexity on every corpus, KL on held-out windows of the text, seconds."""
    parts = [f"`{data['command']}`, {data['date']}, llm_snp {data['versions']['llm_snp']}, {data['device']['name']}"]
    for name, found in data["models"].items():
        corpora = list(found["dense"])
        lines = [["", "tokens", *corpora, "held-out KL, nats", "seconds"]]
        lines += [[which, "", *(f"{found[which][c]:.2f}" for c in corpora), "", ""] for which in ("dense", "pruned")]
        for how, row in found["rows"].items():
            for tokens, one in sorted(row.items(), key=lambda item: int(item[0])):
                if "error" not in one:
                    kl = f"{one['held_out']['before']['kl']:.4f} → {one['held_out']['after']['kl']:.4f}"
                    values = (f"{one['perplexity'][c]:.2f}" for c in corpora)
                    lines.append([how, f"{int(tokens):,}", *values, kl, f"{one['seconds']:.0f}"])
        table = markdown_table(lines)
        parts.append(f"{name}, {100 * found['sparsity']:g} % of the blocks' linear parameters removed:\n\n{table}")
    return "\n\n".join(parts) + "\n"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="+", metavar="MODEL", help="Hub id or directory of a dense model")
    p.add_argument("--calibration", required=True, action="append", metavar="TEXT", help="to prune with; repeatable")
    p.add_argument("--text", required=True, action="append", metavar="TEXT", help="to train on; repeatable")
    p.add_argument("--evaluate", required=True, action="append", metavar="TEXT", help="other text; repeatable")
    p.add_argument("--max-windows", type=int, metavar="N", help="evaluate on the first N windows only")
    p.add_argument("--tokens", type=int, nargs="+", default=[200_000, 500_000, 1_000_000, 2_000_000], metavar="N")
    p.add_argument("--sparsity", type=float, default=0.5, metavar="S", help="default: %(default)s")
    p.add_argument("--samples", type=int, default=128, metavar="N", help="calibration windows (default: %(default)s)")
    p.add_argument("--lora", type=int, default=16, metavar="R", help="default: %(default)s")
    p.add_argument("--batch", type=int, default=8, metavar="N", help="default: %(default)s")
    p.add_argument("--learning-rate", type=float, metavar="X", help="default: those of `heal`")
    p.add_argument("--again", action="store_true", help="also prune in two steps, with a healing after each")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    p.add_argument("--work", type=Path, default=Path("heal-work"), metavar="DIR", help="default: %(default)s")
    p.add_argument("--json", type=Path, metavar="FILE", help="results, written after each; what it has is reused")
    p.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        check_files(args.json, args.markdown)
        args.work.mkdir(parents=True, exist_ok=True)
        bench = Bench(args, provenance(__file__, arguments))
        for name in args.model:
            bench.fill(name)
    except (SnpError, torch.OutOfMemoryError) as error:
        print(f"heal: {str(error).splitlines()[0]}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as error:
        print("heal: interrupted; the same command goes on from what --json has", file=sys.stderr)
        return exit_code(error)
    print(markdown(bench.data))
    if args.markdown:
        args.markdown.write_text(markdown(bench.data), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
