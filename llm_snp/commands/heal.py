"""`python -m llm_snp heal DIR --text TEXT --tokens N`: train a result on what its teacher predicts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..dense.hub import find
from ..errors import OptionError
from ..healing.options import LORA_RATE, RATE, WIDTH, HealConfig
from ..system.manifest import expect_result
from ..system.rank import name_of_process

HELP = "train a result for a short while to predict what its dense model predicts"


def add_arguments(p: argparse.ArgumentParser) -> None:
    default = HealConfig("", (), 1)
    p.add_argument("directory", metavar="DIR", help="the result of a run")
    p.add_argument(
        "--teacher",
        metavar="MODEL",
        help="whose predictions are learned: directory or Hub id (default: the dense model that DIR was made of)",
    )
    p.add_argument(
        "--text",
        action="append",
        metavar="TEXT",
        help="text to train on: a file (.txt .raw .json .jsonl, plain or .gz .xz; .parquet), a datasets directory, "
        "wikitext2 or c4; repeatable, as TEXT:SHARE with another share of the windows than the others have",
    )
    p.add_argument("--tokens", type=int, metavar="N", help="tokens to train on, such as 1000000")
    p.add_argument("--output", metavar="DIR2", help="directory for the healed model (default: DIR-healed)")
    p.add_argument(
        "--lora", type=int, metavar="R", help="train LoRA matrices of rank R, merged at the end; else all weights"
    )
    p.add_argument(
        "--learning-rate",
        type=float,
        metavar="X",
        help=f"at its peak (default: {RATE:g} for {WIDTH} hidden dimensions, {LORA_RATE:g} with --lora; less in "
        "proportion for wider models)",
    )
    p.add_argument(
        "--batch",
        type=int,
        default=default.batch,
        metavar="N",
        help="windows at a time, of a process (default: %(default)s)",
    )
    p.add_argument(
        "--accumulate",
        type=int,
        default=default.accumulate,
        metavar="N",
        help="batches whose gradients make one step (default: %(default)s)",
    )
    p.add_argument(
        "--sequence-length",
        type=int,
        default=default.sequence_length,
        metavar="T",
        help="tokens per window, capped by the models (default: %(default)s)",
    )
    p.add_argument(
        "--text-loss",
        type=float,
        default=default.text_loss,
        metavar="W",
        help="weight of the text's own loss; the teacher's predictions have 1 - W (default: %(default)g)",
    )
    p.add_argument(
        "--checkpointing", action="store_true", help="compute activations twice instead of keeping them: less memory"
    )
    p.add_argument("--seed", type=int, default=default.seed, help="seed of everything random (default: %(default)s)")
    p.add_argument("--device", default=default.device, help="auto, cpu or cuda (default: %(default)s)")
    p.add_argument(
        "--evaluate",
        action="append",
        metavar="TEXT",
        help="text to measure perplexity on, before and after; repeatable (default: those that the pruning was "
        "measured on, where they are found)",
    )
    p.add_argument("--no-evaluate", action="store_true", help="measure it on held-out windows of --text only")
    p.add_argument("--overwrite", action="store_true", help="replace an earlier result, or an unfinished one, in DIR2")
    p.add_argument("--resume", action="store_true", help="go on with an interrupted run of the same command")
    p.add_argument("--quiet", action="store_true", help="print the final table only")


def options_of(args: argparse.Namespace) -> HealConfig:
    """What the flags say. Raises `OptionError` where one that is needed is missing."""
    if args.tokens is None:
        raise OptionError("heal needs --tokens N, how many to train on; a million takes minutes for a small model")
    values: dict[str, Any] = {name: value for name, value in vars(args).items() if name != "no_evaluate"}
    values["text"] = tuple(args.text or ())
    values["evaluate"] = () if args.no_evaluate else args.evaluate and tuple(args.evaluate)
    return HealConfig(**values)


def check(args: argparse.Namespace) -> None:
    """Raise `SnpError` for options that cannot be used, and for models that are not there."""
    expect_result(Path(args.directory))
    options_of(args).validate()
    if args.teacher is not None:
        find(args.teacher)


def main(args: argparse.Namespace) -> None:
    """Heal, and print what that came to. Raises `SnpError`."""
    from ..healing.run import heal

    lines = heal(options_of(args))
    if not name_of_process():
        print("\n".join(lines))
