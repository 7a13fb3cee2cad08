#!/usr/bin/env python3
"""Where a pruned model loses: parts of it in the dense model's place, and what they cost in nats per token.

    python benchmarks/parts.py smollm2 smollm2-30 --evaluate wikitext2 --sequence-length 512 --max-windows 12

Rows: the pruned model; its MLPs alone, its attentions alone, each in otherwise dense blocks; its first blocks alone, by
quarters. The repairs of a part were made for the errors of what stands before it, which is then not there: the rows
need not add up. Models are loaded whole. Importing llm_snp makes its pruned models load.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from perplexity import aligned, check_files, load, provenance, windows_of, write_json
from transformers.utils import logging

from llm_snp import SnpError
from llm_snp.cli import BAD_INPUT
from llm_snp.config import PruneConfig
from llm_snp.dense.hub import locate
from llm_snp.errors import OptionError
from llm_snp.evaluation.perplexity import perplexity_loaded
from llm_snp.families import ATTENTION, MLP, Family, family_of
from llm_snp.pruning.job import window_length
from llm_snp.system.signals import exit_code

QUARTERS = 4


def exchanged(dense: Any, pruned: Any, family: Family, chosen: set[tuple[int, str]]) -> Any:
    """The dense model with the sites (block, name) of the pruned one."""
    model = copy.deepcopy(dense)
    sites = {site.name: site for site in family.sites(dense.config)}
    ours, theirs = model.get_submodule(family.blocks), pruned.get_submodule(family.blocks)
    for index, name in chosen:
        # A site has children of the block to itself: `self_attn`, or `fc1` and `fc2`.
        for child in {layer.split(".")[0] for layer in sites[name].layers}:
            setattr(ours[index], child, theirs[index].get_submodule(child))
    return model


def parts(blocks: int) -> Iterator[tuple[str, set[tuple[int, str]]]]:
    """Name of each row, and the sites that are the pruned model's."""
    everything = {(index, name) for index in range(blocks) for name in (ATTENTION, MLP)}
    yield "all of it", everything
    yield "its MLPs", {site for site in everything if site[1] == MLP}
    yield "its attentions", {site for site in everything if site[1] == ATTENTION}
    for quarter in range(1, QUARTERS):
        upto = blocks * quarter // QUARTERS
        yield f"its first {upto} blocks", {site for site in everything if site[0] < upto}


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Row -> corpus -> nats per token; over the dense model's, but for the row of the dense model itself."""
    (dense, tokenizer), (pruned, _) = (load(name, locate(name), False) for name in (args.dense, args.pruned))
    dense, pruned = dense.float(), pruned.float()
    family, config = family_of(dense.config), dense.config
    kinds, blocks = (type(dense), family.pruned_class), config.num_hidden_layers
    if not isinstance(pruned, kinds) or len(pruned.get_submodule(family.blocks)) != blocks:
        raise OptionError(f"{args.pruned} is no pruned {args.dense}: its class or number of blocks differs")
    length = window_length(PruneConfig(sequence_length=args.sequence_length), config)
    corpora = windows_of(args.evaluate, tokenizer, length, args.max_windows)

    def nats(model: Any) -> dict[str, float]:
        found = {label: perplexity_loaded(model, windows, lambda: None) for label, windows in corpora.items()}
        return {label: result.nll / result.tokens for label, result in found.items()}

    found = {"dense": nats(dense)}
    for name, chosen in parts(blocks):
        lost = nats(exchanged(dense, pruned, family, chosen))
        found[name] = {label: value - found["dense"][label] for label, value in lost.items()}
        print(f"{name} ...", file=sys.stderr)
    return found


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("dense", metavar="DENSE", help="the model that was pruned")
    p.add_argument("pruned", metavar="PRUNED", help="the result")
    p.add_argument("--evaluate", action="append", metavar="TEXT", help="wikitext2, c4 or a file; repeatable")
    p.add_argument("--sequence-length", type=int, default=2048, metavar="T", help="tokens per window (default: 2048)")
    p.add_argument("--max-windows", type=int, metavar="N", help="the first N windows of each text")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(arguments)
    args.evaluate = args.evaluate or ["wikitext2"]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        PruneConfig(sequence_length=args.sequence_length).validate()
        check_files(args.json)
        with torch.no_grad():
            found = measure(args)
    except SnpError as error:
        print(f"parts: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as error:
        print("parts: interrupted", file=sys.stderr)
        return exit_code(error)
    if args.json:
        write_json(args.json, provenance(__file__, arguments) | {"nats": found})
    rows = [("nats per token over dense", *found["dense"])]
    rows += [(name, *(f"{value:.3f}" for value in lost.values())) for name, lost in found.items()]
    print(aligned(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
