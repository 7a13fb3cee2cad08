#!/usr/bin/env python3
"""What a peer's own code, Torch-Pruning, costs at equal size: all widths or neurons only, on the windows of `real.py`.

    pip install --no-deps torch-pruning==1.6.1
    python benchmarks/peers.py smollm2 --calibration wiki.txt --calibration wikitext2 --calibration c4 \\
        --evaluate wikitext2 --evaluate c4 --samples 64 --sequence-length 512 --sparsity 0.3 --json peers.json

The columns are those of `real.py`: calibration windows, other windows of the same texts, and each `--evaluate` text, in
nats per token over the dense model. Every row is pruned by that package with the settings of its own example for
language models (examples/LLMs/prune_llm.py), as much in every block; its ratio is searched such that the share of the
blocks' linear parameters that goes is as near to --sparsity as the rounding of the package allows. None of the rows
repairs what is left. For models with the layers of Llama.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import quality
import torch
from perplexity import aligned, code_state, load, markdown_table, provenance, write_json
from quality_bench import Bench, add_arguments
from real import OWN_TEXT
from torch import nn
from transformers.utils import logging

from llm_snp import SnpError
from llm_snp.cli import BAD_INPUT
from llm_snp.config import DTYPES
from llm_snp.errors import OptionError
from llm_snp.evaluation.perplexity import perplexity_loaded
from llm_snp.system.progress import Progress

PACKAGE = "torch-pruning==1.6.1"
FINEST = 2**-11  # step at which the search of a ratio ends: less than a neuron of 1536
ROUND_TO = 4  # widths that are left are multiples of it, as in the package's example
TRACED = 8  # tokens of the text on which the package traces the model


@dataclasses.dataclass(frozen=True)
class Peer:
    """A row. neurons: only those of the MLPs go; gradients: they are judged by first-order Taylor, not by magnitude."""

    name: str
    neurons: bool
    gradients: bool


PEERS = (
    Peer("all widths, magnitude", neurons=False, gradients=False),
    Peer("neurons, magnitude", neurons=True, gradients=False),
    Peer("neurons, Taylor", neurons=True, gradients=True),
)


def nearest(removed: Callable[[float], float], asked: float) -> tuple[float, float]:
    """The ratio at which the share `removed` is nearest to `asked`, and that share: of those that a bisection tries.

    `removed` must not fall where the ratio grows; it may have steps.
    """
    low, high, tried = 0.0, 1.0, {}
    while high - low > FINEST:
        ratio = (low + high) / 2
        tried[ratio] = removed(ratio)
        low, high = (ratio, high) if tried[ratio] < asked else (low, ratio)
    return min(tried.items(), key=lambda item: abs(item[1] - asked))


def linear_parameters(model: Any) -> int:
    """Weights of the linear layers of all blocks, which `--sparsity` is a share of."""
    return sum(module.weight.numel() for module in model.model.layers.modules() if isinstance(module, nn.Linear))


def check_layers(model: Any, name: str) -> None:
    """Raise `OptionError` for a model whose layers are not those of Llama, which are handled here by their names."""
    blocks = getattr(getattr(model, "model", None), "layers", ())
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    parts = [(getattr(block, "self_attn", None), getattr(block, "mlp", None)) for block in blocks]
    if not parts or not all(
        hasattr(part, layer)
        for pair in parts
        for part, layers in zip(pair, (attention, mlp), strict=True)
        for layer in layers
    ):
        raise OptionError(f"{name} does not have the layers of Llama; only such models can be compared here")


def pruned(package: Any, model: Any, peer: Peer, ratio: float, tokens: torch.Tensor) -> Any:
    """A copy of the model, pruned by the package, of which every width of a kind loses the share `ratio`.

    tokens: ids (1, T) on which it is traced. Gradients of the model are used, not changed.
    """
    model, dense = copy.deepcopy(model), model
    for parameter, original in zip(model.parameters(), dense.parameters(), strict=True):
        parameter.grad = original.grad  # which copies do not have
    attentions, config = [block.self_attn for block in model.model.layers], model.config
    left = [model.lm_head, *([model.model.embed_tokens, *attentions] if peer.neurons else [])]
    heads = {a.q_proj: config.num_attention_heads for a in attentions}
    heads |= {layer: config.num_key_value_heads for a in attentions for layer in (a.k_proj, a.v_proj)}
    importance = package.importance
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it lists each norm, whose weight it prunes as it should
        package.pruner.BasePruner(
            model,
            example_inputs=tokens,
            # Today's name of the class that the example has, with its arguments.
            importance=importance.GroupTaylorImportance()
            if peer.gradients
            else importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
            pruning_ratio=ratio,
            head_pruning_ratio=ratio,
            ignored_layers=left,
            num_heads={} if peer.neurons else heads,
            prune_num_heads=True,
            prune_head_dims=False,
            round_to=ROUND_TO,
            output_transform=lambda output: output.logits,
            # Its defaults are dictionaries that all calls share, and would keep every copy of the model.
            in_channel_groups={},
            out_channel_groups={},
        ).step()
    settle(model)
    return model


def settle(model: Any) -> None:
    """Take the numbers that attentions and the configuration hold from the weights: the package changes only these."""
    config, blocks = model.config, model.model.layers
    for block in blocks:
        attention = block.self_attn
        queries, keys = (layer.out_features // attention.head_dim for layer in (attention.q_proj, attention.k_proj))
        attention.num_key_value_groups = queries // keys
    config.num_attention_heads, config.num_key_value_heads = queries, keys
    config.hidden_size, config.intermediate_size = blocks[0].mlp.up_proj.weight.shape[::-1]
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # the same columns of the same matrix went from both


def take_gradients(model: Any, windows: torch.Tensor) -> None:
    """Gradients of the mean loss of each of the windows (N, T), summed."""
    for ids in windows:
        row = ids[None].to(model.device)
        model(input_ids=row, labels=row).loss.backward()


def evaluated(bench: Bench, model: Any) -> dict[str, float]:
    """Perplexity on every corpus. Raises `NumericalError` if the logits are not finite."""
    return {name: perplexity_loaded(model, windows, lambda: None).perplexity for name, windows in bench.corpora.items()}


def measured(package: Any, bench: Bench, model: Any, peer: Peer, asked: float) -> dict[str, Any]:
    """A row: what went and what is left of it, seconds of judging and pruning once, and perplexities."""
    base, tokens = linear_parameters(model), bench.calibration.tokens[:1, :TRACED].to(model.device)

    def removed(ratio: float) -> float:
        return 1 - linear_parameters(pruned(package, model, peer, ratio, tokens)) / base

    began = time.perf_counter()
    if peer.gradients:
        take_gradients(model, bench.calibration.tokens)
    judged = time.perf_counter() - began
    ratio, share = nearest(removed, asked)
    began = time.perf_counter()
    result = pruned(package, model, peer, ratio, tokens)
    seconds = judged + time.perf_counter() - began
    model.zero_grad()
    result.zero_grad()
    whole = [sum(p.numel() for p in m.parameters()) for m in (result, model)]
    config = result.config
    return {
        "ratio": ratio,
        "achieved": share,
        "achieved_whole": 1 - whole[0] / whole[1],
        "left": {
            "width": config.hidden_size,
            "neurons": config.intermediate_size,
            "query_heads": config.num_attention_heads,
        },
        "seconds": round(seconds, 3),
        "perplexity": evaluated(bench, result),
    }


def table(data: dict[str, Any], markdown: bool) -> str:
    """A line per row: what went, what is left, and nats per token over the dense model on each corpus."""
    dense = data["dense"]
    lines = [["", "of the blocks", "of the model", "width / neurons / query heads", "loss over dense", "seconds"]]
    lines.append(["dense, perplexity", "", "", "", " / ".join(f"{value:.2f}" for value in dense.values()), ""])
    for name, row in data["rows"].items():
        nats = (math.log(row["perplexity"][corpus] / value) for corpus, value in dense.items())
        left, loss = " / ".join(map(str, row["left"].values())), " / ".join(f"{value:.3f}" for value in nats)
        gone = [f"{row[share]:.1%}" for share in ("achieved", "achieved_whole")]
        lines.append([name, *gone, left, loss, f"{row['seconds']:.0f}"])
    return markdown_table(lines, "---:") if markdown else aligned(lines)


def heading(data: dict[str, Any]) -> str:
    """What the table shows."""
    of, corpora = data["calibration"], " / ".join(f"{n} ({c['windows']} windows)" for n, c in data["corpora"].items())
    return (
        f"Torch-Pruning's own code at {data['sparsity']:.0%} of the blocks' linear parameters, as near as its rounding "
        f"allows; it repairs nothing. Loss over dense, nats per token, on {corpora}; windows of "
        f"{of['sequence_length']} tokens. Calibration: {of['windows']} windows of {of['source']}, seed {of['seed']}, "
        "which only Taylor looks at. Columns two and three: the share of the blocks' linear and of all parameters that "
        "went. Seconds: judging and pruning, without the search of the ratio."
    )


def page(data: dict[str, Any]) -> str:
    """The table as Markdown, with where it comes from."""
    versions, device = ", ".join(f"{name} {number}" for name, number in data["versions"].items()), data["device"]
    return (
        f"# Peers on {data['model']['name']}\n\n{heading(data)}\n\n{table(data, markdown=True)}\n\n{data['date']}, "
        f"{device['name']}, {device['dtype']}, {device['threads']} threads; {versions}, code {data['code']}.\n\n"
        f"    {data['command']}\n"
    )


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", metavar="MODEL", help="Hub id or directory of a model with the layers of Llama")
    add_arguments(p)
    p.add_argument("--sparsity", type=float, default=0.3, metavar="S", help="the budget (default: 0.3)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:i (default: auto)")
    p.add_argument("--dtype", default="auto", choices=DTYPES, help="type to compute in (default: auto)")
    p.add_argument(
        "--own-text", type=int, default=OWN_TEXT, metavar="N", help="as for quality.py (default: %(default)s)"
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write the results there, after each row")
    p.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")
    p.set_defaults(jobs=1, plot=None)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(arguments)
    try:
        package = importlib.import_module("torch_pruning")
    except ImportError as error:
        print(f"peers: Torch-Pruning cannot be imported ({error}): pip install --no-deps {PACKAGE}", file=sys.stderr)
        return BAD_INPUT
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    progress = Progress(args.quiet)
    try:
        quality.check(argparse.Namespace(**vars(args) | {"sparsity": [args.sparsity]}))
        progress.say("load ...")
        bench = Bench(args)
        model, _ = load(args.model, bench.directory, trust_remote_code=False)
        check_layers(model, args.model)
        model = model.to(bench.skeleton.device, bench.skeleton.dtype)
        model.config._attn_implementation = "eager"  # the package cannot trace grouped queries through the fused one
        model.config.use_cache = False  # nor a cache
        data = provenance(__file__, arguments) | {"code": code_state(), **bench.facts, "sparsity": args.sparsity}
        data["versions"][PACKAGE.split("==")[0]] = version(PACKAGE.split("==")[0])
        data |= {"dense": evaluated(bench, model), "rows": {}}
        progress.say(f"dense: {data['dense']}")
        for peer in PEERS:
            data["rows"][peer.name] = row = measured(package, bench, model, peer, args.sparsity)
            progress.say(f"{peer.name}, {row['achieved']:.1%}: {row['perplexity']}")
            if args.json:
                write_json(args.json, data)
    except (SnpError, torch.OutOfMemoryError) as error:
        print(f"peers: {str(error).splitlines()[0]}", file=sys.stderr)
        return BAD_INPUT
    if args.markdown:
        args.markdown.write_text(page(data), encoding="utf-8")
    print(heading(data), table(data, markdown=False), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
