"""Quantise a pruned model to 8-bit weights with torchao, on a CPU or a GPU, and save it.

    python examples/quantize.py demo-output --output demo-output-int8

Prints the bytes on disk, the perplexity of a text the model writes itself before and after, and whether the saved model
gives the same logits when it is loaded again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("directory", nargs="?", default="demo-output", metavar="DIR", help="default: %(default)s")
    p.add_argument("--output", metavar="DIR", help="keep the quantised model here (default: a temporary directory)")
    args = p.parse_args()
    if not Path(args.directory).is_dir():
        p.error(f"{args.directory} is no directory; give that of a pruned model, or make one with: make demo")

    def load(directory: str, **options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options).eval()

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits.float()

    def perplexity(model: Any) -> float:
        return torch.nn.functional.cross_entropy(logits(model)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp().item()

    def megabytes(directory: str) -> float:
        return sum(file.stat().st_size for file in Path(directory).glob("*.safetensors")) / 1e6

    model = load(args.directory)
    torch.manual_seed(0)
    start = torch.full((4, 1), model.config.bos_token_id)
    ids = model.generate(start, attention_mask=torch.ones_like(start), do_sample=True, min_new_tokens=48, max_length=49)
    quantised = load(args.directory, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    with tempfile.TemporaryDirectory() as folder:
        output = args.output or folder
        quantised.save_pretrained(output)
        AutoTokenizer.from_pretrained(args.directory, trust_remote_code=True).save_pretrained(output)
        again = load(output)
        print(f"size on disk, MB      {megabytes(args.directory):.2f} -> {megabytes(output):.2f}")
        print(f"perplexity            {perplexity(model):.2f} -> {perplexity(quantised):.2f}")
        print(
            f"saved and loaded, largest difference of the logits  {(logits(again) - logits(quantised)).abs().max():.1e}"
        )


if __name__ == "__main__":
    main()
