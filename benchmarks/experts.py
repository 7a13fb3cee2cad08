#!/usr/bin/env python3
"""What it costs to remove whole experts of a mixture, neurons of all of them, or both: the same number of parameters.

    python benchmarks/experts.py mixtral-wiki-2m --calibration train.txt --evaluate wikitext2 --gone 2 4 --json out.json

Every row is a run of llm_snp. Two take whole experts as the tools there are do it, the same number in every block and
without a repair: at random, or those of the least mean over their tokens of routing weight times norm of the output
(REAP, arXiv 2510.13999). The others remove as many linear parameters as these. Perplexity of each on every corpus, and
seconds of choosing and pruning. One checkpoint, one set of calibration windows; the dense model is evaluated once.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from perplexity import aligned, check_files, code_state, markdown_table, provenance, write_json
from quality_bench import Bench, add_arguments
from quality_results import Row
from transformers.utils import logging

from llm_snp import SnpError
from llm_snp.cli import BAD_INPUT
from llm_snp.errors import OptionError
from llm_snp.system.progress import Progress

# Seeds of the experts that go at random: their perplexities are averaged.
DRAWS = 3
NEURONS, WHOLE, BOTH = (
    {"method": "best", "attention": "none", "experts": mode} for mode in ("neurons", "whole", "both")
)
AS_OTHERS = {**WHOLE, "allocation": "uniform", "target": "none"}
RANDOM = Row("llm_snp", "experts at random", {**AS_OTHERS, "order": "random"})
ROWS = (
    Row("llm_snp", "experts, REAP", {**AS_OTHERS, "order": "reap"}),
    Row("llm_snp", "experts, no repair", {**WHOLE, "target": "none"}),
    Row("llm_snp", "experts", WHOLE),
    Row("llm_snp", "experts, as many in every block (stock)", {**WHOLE, "format": "stock"}),
    Row("llm_snp", "neurons, no repair", {**NEURONS, "target": "none"}),
    Row("llm_snp", "neurons", NEURONS),
    Row("llm_snp", "neurons, as many in every block (stock)", {**NEURONS, "format": "stock"}),
    Row("llm_snp", "experts and neurons, no repair", {**BOTH, "target": "none"}),
    Row("llm_snp", "experts and neurons, each expert fitted to its own output", {**BOTH, "target": "self"}),
    Row("llm_snp", "experts and neurons, fitted to the dense output by shares", {**BOTH, "target": "dense"}),
    Row("llm_snp", "experts and neurons", BOTH),
    Row("llm_snp", "experts and neurons, as many in every block (stock)", {**BOTH, "format": "stock"}),
    Row("llm_snp", "best: experts, neurons, and what goes of the attention", {"method": "best"}),
)


def measured(bench: Bench, gone: int, progress: Progress) -> dict[str, Any]:
    """All rows where `gone` experts of each block go, or as many linear parameters otherwise."""
    skeleton, family, config = bench.skeleton, bench.family, bench.config
    sites = [family.sites(config, index)[-1] for index in range(len(skeleton))]
    base = sum(family.linear_parameters(block, config) for block in skeleton.blocks)
    of_experts = sum(
        family.site_cost(block, site) / site.experts for block, site in zip(skeleton.blocks, sites, strict=True)
    )
    share, experts = gone * of_experts / base, sites[0].experts
    found: dict[str, Any] = {}
    options = bench.options(RANDOM, share)
    draws = [bench.measure(dataclasses.replace(options, seed=seed), least_influence=False) for seed in range(DRAWS)]
    mean = {name: sum(draw["perplexity"][name] for draw in draws) / DRAWS for name in bench.corpora}
    found[RANDOM.name] = {"perplexity": mean, "achieved": draws[0]["achieved"], "draws": draws}
    progress.say(f"{gone} experts at random: {mean}")
    for row in ROWS:
        found[row.name] = bench.measure(bench.options(row, share), least_influence=False)
        progress.say(f"{share:.1%}, {row.name}: {found[row.name].get('perplexity') or found[row.name]['error']}")
    return {"experts": gone, "of": experts, "share": share, "rows": found}


def table(data: dict[str, Any], markdown: bool) -> str:
    """A line per row, a column per number of experts and corpus, and the seconds."""
    results = sorted(data["results"], key=lambda result: result["experts"])
    names, corpora = list(results[0]["rows"]), list(data["dense"])
    head = [f"{r['experts']} of {r['of']} ({r['share']:.1%})" for r in results]
    dense = " / ".join(f"{data['dense'][corpus]:.2f}" for corpus in corpora)
    lines = [["", *head, "seconds"], ["dense", *[dense] * len(head), ""]]
    for name in names:
        cells, seconds = [], []
        for result in results:
            row = result["rows"][name]
            each = (
                [f"{row['perplexity'][corpus]:.2f}" for corpus in corpora] if "perplexity" in row else ["not possible"]
            )
            cells.append(" / ".join(each))
            seconds.append(sum(row.get("seconds", {}).values()))
        lines.append([name, *cells, " / ".join(f"{value:.0f}" for value in seconds) if any(seconds) else ""])
    return markdown_table(lines) if markdown else aligned(lines)


def page(data: dict[str, Any]) -> str:
    """The table as Markdown, with what it is of."""
    corpora = " / ".join(f"{name} ({found['windows']} windows)" for name, found in data["corpora"].items())
    of, versions = data["calibration"], ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    return (
        f"# Experts of {data['model']['name']}\n\nPerplexity on {corpora}, calibrated on {of['windows']} windows of "
        f"{of['sequence_length']} tokens of {of['source']}, seed {of['seed']}; at random the mean of {DRAWS} draws, "
        "which go without a repair, in every block as many, as with REAP; the other rows remove as many linear "
        "parameters. Seconds: choosing and pruning, by column.\n\n"
        f"{table(data, markdown=True)}\n\n{data['date']}, {versions}, code {data['code']}.\n\n    {data['command']}\n"
    )


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", metavar="MODEL", help="Hub id or directory of a mixture whose blocks all have experts")
    add_arguments(p)
    p.add_argument("--gone", type=int, nargs="+", default=[2, 4], metavar="N", help="experts of a block that go")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the results there, after each number of experts")
    p.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")
    return p


def check(bench: Bench, gone: Sequence[int]) -> None:
    """Raise `OptionError` for a model without experts in every block, and for more of them than can go."""
    mixture, config = bench.family.mixture, bench.config
    if mixture is None or not all(mixture.sparse(config, index) for index in range(len(bench.skeleton))):
        raise OptionError(f"{bench.args.model} has blocks without experts; give a mixture of which each block has some")
    most = getattr(config, mixture.experts) - getattr(config, mixture.picked)
    if not all(1 <= number <= most for number in gone):
        raise OptionError(f"--gone is {', '.join(map(str, gone))}; of this model 1 to {most} experts of a block can go")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    progress = Progress(args.quiet)
    try:
        check_files(args.json, args.markdown)
        bench = Bench(args)
        check(bench, args.gone)
        data = provenance(__file__, arguments) | {"code": code_state(), **bench.facts, "results": []}
        data["dense"] = bench.perplexity(bench.skeleton)["perplexity"]
        progress.say(f"dense: {data['dense']}")
        for gone in args.gone:
            data["results"].append(measured(bench, gone, progress))
            if args.json:
                write_json(args.json, data)
    except (SnpError, torch.OutOfMemoryError) as error:
        print(f"experts: {str(error).splitlines()[0]}", file=sys.stderr)
        return BAD_INPUT
    if args.markdown:
        args.markdown.write_text(page(data), encoding="utf-8")
    print(table(data, markdown=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
