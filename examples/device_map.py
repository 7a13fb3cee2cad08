"""Spread a pruned model over devices with accelerate: GPU, host memory, and what does not fit on disk.

    python examples/device_map.py demo-output --share 0.75

Each of them is allowed `--share` of the model's bytes; accelerate keeps a part of it free for what comes in from disk.
Prints where the modules went, and the largest difference of the logits from those of the model loaded whole.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("directory", nargs="?", default="demo-output", metavar="DIR", help="default: %(default)s")
    p.add_argument("--share", type=float, default=0.75, metavar="S", help="of the model (default: %(default)s)")
    args = p.parse_args()
    if not Path(args.directory).is_dir():
        p.error(f"{args.directory} is no directory; give that of a pruned model, or make one with: make demo")

    def load(**options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(args.directory, trust_remote_code=True, **options).eval()

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids.to(first)).logits.float().cpu()

    first = "cuda:0" if torch.cuda.is_available() else "cpu"  # model.device may be "meta": its weights are on disk
    whole = load().to(first)
    ids = torch.randint(4, whole.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    expected, limit = logits(whole), int(args.share * whole.get_memory_footprint())
    limits = dict.fromkeys((*range(torch.cuda.device_count()), "cpu"), limit)

    with tempfile.TemporaryDirectory() as folder:
        for name, options in (
            ("auto", {"device_map": "auto"}),
            ("with limits", {"device_map": "auto", "max_memory": limits, "offload_folder": folder}),
        ):
            model = load(**options)
            # Where everything fits on one device there is no map.
            places = Counter(str(place) for place in getattr(model, "hf_device_map", {"": first}).values())
            print(f"{name:12} " + ", ".join(f"modules on {place}: {count}" for place, count in places.items()))
            print(f"{'':12} largest difference of the logits  {(logits(model) - expected).abs().max():.1e}")


if __name__ == "__main__":
    main()
