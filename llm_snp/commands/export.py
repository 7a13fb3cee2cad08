"""`python -m llm_snp export DIR --gguf FILE`: a result as a file for llama.cpp and what stands on it."""

from __future__ import annotations

import argparse
import os
import shlex
from importlib.util import find_spec
from pathlib import Path

from ..config import GGUF_TYPES
from ..errors import OptionError, choose
from ..system.files import disk, size
from ..system.manifest import expect_directory, is_result, manifest
from ..system.output import check_outside_cache
from .flags import expanded

MAGIC = b"GGUF"  # what such a file begins with
HELP = "write a result as a GGUF file, for llama.cpp, Ollama and LM Studio"


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("directory", metavar="DIR", type=expanded, help="the result of a run, perhaps trained on since")
    p.add_argument("--gguf", metavar="FILE", type=expanded, help="the file to write, FILE.gguf")
    p.add_argument(
        "--type",
        default="f16",
        metavar="TYPE",
        help=f"of the weights: {', '.join(GGUF_TYPES)} (default: f16); smaller ones llama-quantize makes of the file",
    )
    p.add_argument(
        "--tokenizer-from",
        metavar="DENSE.gguf",
        type=expanded,
        help="take the tokenizer of this file as it is, that of the dense model, instead of the one in DIR",
    )
    p.add_argument("--overwrite", action="store_true", help="replace FILE, if it is a GGUF file")
    p.add_argument("--quiet", action="store_true", help="no progress on standard error")


def check(args: argparse.Namespace) -> None:
    """Raise `SnpError` for what can be told without reading a weight."""
    from ..dense.hub import find

    if args.gguf is None:
        raise OptionError("export needs --gguf FILE, the file to write")
    choose(args.type, GGUF_TYPES, "--type")
    expect_directory(args.directory)
    find(f"{args.directory.absolute()}")
    if not args.gguf.name or os.path.isdir(args.gguf):
        raise OptionError(f"--gguf {args.gguf} is a directory; give the name of a file")
    if not os.path.isdir(args.gguf.parent):
        raise OptionError(f"--gguf {args.gguf}: there is no directory {args.gguf.parent}; make it first")
    check_outside_cache(args.gguf, "--gguf")
    if os.path.lexists(args.gguf) and not args.overwrite:
        raise OptionError(f"--gguf {args.gguf} exists; give another name, or --overwrite")
    if is_result(args.gguf.parent) and args.gguf.name in manifest(args.gguf.parent):
        raise OptionError(f"--gguf {args.gguf} is part of a result; give another name")
    if os.path.lexists(args.gguf) and not _is_gguf(args.gguf):
        raise OptionError(f"--gguf {args.gguf} is there, and no GGUF file; give another name, or move it")
    if os.path.isfile(args.gguf.parent / "config.json") and args.gguf.suffix.lower() != ".gguf":
        raise OptionError(
            f"--gguf {args.gguf} lies in a model's directory, where it may be taken for a part of the model; give a "
            "name that ends in .gguf"
        )
    if args.tokenizer_from is not None and not os.path.isfile(args.tokenizer_from):
        raise OptionError(f"--tokenizer-from {args.tokenizer_from} is no file; give the GGUF file of the dense model")
    if args.tokenizer_from is not None and os.path.lexists(args.gguf) and args.tokenizer_from.samefile(args.gguf):
        raise OptionError("--tokenizer-from and --gguf are the same file; give another name to one")
    if find_spec("gguf") is None:
        raise OptionError("export needs the package gguf; install it with `pip install gguf`")


def _is_gguf(path: Path) -> bool:
    """Whether it is a file of the kind that --overwrite may replace."""
    with disk(path):
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC


def main(args: argparse.Namespace) -> None:
    """Write the file, and print what it is and what to do with it. Raises `SnpError`."""
    from ..result.gguf.writing import export
    from ..system.progress import Progress

    progress = Progress(args.quiet)
    # What is there when all is written need not be what was there before.
    replace = lambda: args.overwrite and _is_gguf(args.gguf)  # noqa: E731
    written = export(args.directory, args.gguf, args.type, args.tokenizer_from, progress, replace)
    file = shlex.quote(str(args.gguf))
    whole = size(args.gguf.stat().st_size)
    print(f"written  {args.gguf}, {whole}, weights in {args.type}, as llama.cpp's {written.architecture.name}")
    if written.context < written.positions.context:
        print(f"context  {written.context} tokens, one window of the model: llama.cpp knows no windows in this one")
    print(f"run it   llama-completion -m {file} -p 'The city of'")
    print(f"serve    llama-server -m {file}")
