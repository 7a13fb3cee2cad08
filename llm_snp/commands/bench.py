"""`python -m llm_snp bench DIR`: how fast and how large a pruned model is, beside the dense one."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ..config import DEVICES, DTYPES, NEW, PROMPT, RUNS
from ..dense.hub import config_dtype, find, load_config, locate
from ..errors import OptionError, SnpError, at_least, choose
from ..result.origin import COPIED, find_dense, is_dense_of
from ..system.manifest import check_as_written, has_report, is_result
from ..system.private import in_cache

HELP = "time a pruned model beside the dense one, and count their memory"


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("directory", metavar="DIR", help="a pruned result, or any causal language model")
    p.add_argument(
        "--against",
        metavar="MODEL",
        help="what to compare with: directory or Hub id (default: the model that DIR was made of)",
    )
    p.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at a time (default: 1)")
    p.add_argument(
        "--prompt",
        type=int,
        metavar="T",
        help=f"tokens of the prefill (default: {PROMPT}, or what the model has positions for)",
    )
    p.add_argument("--new", type=int, default=NEW, metavar="T", help=f"tokens to decode (default: {NEW})")
    p.add_argument("--runs", type=int, default=RUNS, metavar="N", help=f"measurements of each (default: {RUNS})")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:i (default: auto)")
    p.add_argument("--dtype", default="auto", help=f"type to compute in: {', '.join(DTYPES)} (default: auto)")


def check(args: argparse.Namespace) -> None:
    """Raise `SnpError` for options that cannot be used, or local models that are not there."""
    choose(args.device.split(":")[0], DEVICES, "--device")
    choose(args.dtype, DTYPES, "--dtype")
    for name in ("batch", "prompt", "new", "runs"):
        if getattr(args, name) is not None:
            at_least(getattr(args, name), 1, f"--{name}")
    find(args.directory)
    if args.against is not None:
        find(args.against)


def main(args: argparse.Namespace) -> None:
    """Measure, print the table, and keep the figures in DIR's report if they are about it and its dense model.

    Raises `SnpError` for what cannot be measured.
    """
    from ..documents.writing import check_way, read_report, rehearse, store
    from ..evaluation.speed import measure_speed, measurements
    from ..evaluation.speed_table import speed_table
    from ..result.own_code import has_own_code
    from ..system.device import resolve_device, resolve_dtype
    from ..system.progress import Progress

    device = resolve_device(args.device)
    directory = locate(args.directory)
    config = load_config(directory)
    report = read_report(directory) if has_report(directory) else None
    if report is not None:
        check_as_written(directory, report)
    dense, its_own = _against(args.against, directory, report)
    # A repository's files in the cache of the Hub are not ours to change.
    own = report if its_own and not in_cache(directory) else None
    if own is not None and not os.access(directory, os.W_OK):
        print(f"kept     the report of {directory}, which is not writable, as it is")
        own = None
    if own is not None:
        check_way(directory, own)
        rehearse(directory, own)
    for path in (directory, dense):
        if args.prompt is not None and path is not None:
            _check_prompt(args.prompt, path)
    dtype = resolve_dtype(args.dtype, device, config_dtype(config))
    prompt = PROMPT if args.prompt is None else args.prompt
    with Progress().phase("speed", measurements(dense, args.runs), unit="run") as step:
        speed = measure_speed(directory, dense, device, dtype, args.batch, prompt, args.new, args.runs, step)
    if args.against is not None:
        print(f"dense    stands for {dense}, which was asked for")
    print("\n".join(speed_table(speed)))
    if own is not None:
        if dense is None and is_result(directory) and "dense" in read_report(directory).get("speed", {}):
            print(f"kept     the earlier figures in {directory}, which compare with the dense model")
            return
        store(directory, own, "speed", speed, own_code=has_own_code(directory))
        print(f"stored   in the report of {directory}")


def _against(against: str | None, directory: Path, report: dict[str, Any] | None) -> tuple[Path | None, bool]:
    """The model to compare with, and whether it is what DIR was made of, or would be.

    Says why if there is none. Raises `SnpError` if what was asked for is not there.
    """
    if report is None and against is None:
        print(
            f"alone    {directory} has no report.json that names its dense model; --against gives one to compare with"
        )
        return None, False
    if report is None:
        return locate(against), False
    if against is not None:
        given = locate(against)
        return given, is_dense_of(against, given, directory, report)
    try:
        return find_dense(directory, report), True
    except SnpError as error:
        print(f"alone    the dense model is not there to compare with: {' '.join(str(error).split())}; {COPIED}")
        return None, True


def _check_prompt(prompt: int, directory: Path) -> None:
    from ..evaluation.speed import positions

    limit = positions(load_config(directory))
    if limit is not None and prompt >= limit:
        raise OptionError(
            f"--prompt is {prompt}, but {directory} has {limit} positions, of which new tokens need some; give at most "
            f"{limit - 1}"
        )
