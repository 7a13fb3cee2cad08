"""Compile a pruned model with torch.compile, and time it against the same model run eagerly.

    python examples/compile.py demo-output --length 128 --runs 20

The model becomes one graph without breaks (fullgraph=True), though every block has other widths. Prints the largest
difference of the logits at two lengths, and the median time of a forward pass.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("directory", nargs="?", default="demo-output", metavar="DIR", help="default: %(default)s")
    p.add_argument("--length", type=int, default=128, metavar="T", help="tokens (default: %(default)s)")
    p.add_argument("--runs", type=int, default=20, metavar="N", help="timed runs of each (default: %(default)s)")
    args = p.parse_args()
    if not Path(args.directory).is_dir():
        p.error(f"{args.directory} is no directory; give that of a pruned model, or make one with: make demo")

    model = AutoModelForCausalLM.from_pretrained(args.directory, trust_remote_code=True).float().eval()
    if torch.cuda.is_available():
        model = model.cuda()
    elif not shutil.which(os.environ.get("CXX", "g++")):
        sys.exit("torch.compile needs a C++ compiler on the CPU, and there is no g++; install one or set CXX")
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    ids = torch.randint(4, model.config.vocab_size, (1, args.length), generator=torch.Generator().manual_seed(0))

    def logits(model: Callable[..., torch.Tensor], length: int) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids[:, :length].to(device), use_cache=False).logits

    def median_milliseconds(model: Callable[..., torch.Tensor]) -> float:
        times = []
        for _ in range(args.runs):
            start = time.perf_counter()
            logits(model, args.length).sum().item()  # waits for the device
            times.append(time.perf_counter() - start)
        return 1000 * statistics.median(times)

    device = model.device
    start = time.perf_counter()
    for length in (args.length, args.length // 2):
        difference = (logits(compiled, length) - logits(model, length)).abs().max()
        print(f"{length} tokens, largest difference of the logits  {difference:.1e}")
    print(f"compiled in {time.perf_counter() - start:.1f} s")
    eager, fast = median_milliseconds(model), median_milliseconds(compiled)
    print(f"median of {args.runs} runs at {args.length} tokens: eager {eager:.2f} ms, compiled {fast:.2f} ms")


if __name__ == "__main__":
    main()
