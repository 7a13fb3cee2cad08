"""Export a pruned model to ONNX with torch.onnx, and run it with onnxruntime.

    python examples/onnx_export.py demo-output --output demo-output.onnx

The graph maps token ids and an attention mask of any batch size and length to logits, without a KV cache. Prints the
largest difference from the logits of torch at two lengths, the second with padding on the left.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import onnxruntime
import torch
from transformers import AutoModelForCausalLM


class Logits(torch.nn.Module):
    """The model as a function of two tensors."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("directory", nargs="?", default="demo-output", metavar="DIR", help="default: %(default)s")
    p.add_argument("--output", metavar="FILE", help="default: DIR.onnx")
    args = p.parse_args()
    if not Path(args.directory).is_dir():
        p.error(f"{args.directory} is no directory; give that of a pruned model, or make one with: make demo")
    output = args.output or f"{Path(args.directory)}.onnx"

    model = AutoModelForCausalLM.from_pretrained(args.directory, trust_remote_code=True).float().eval()
    function = Logits(model).eval()

    def inputs(batch: int, length: int, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.ones(batch, length, dtype=torch.int64)
        mask[0, :padding] = 0
        return torch.randint(4, model.config.vocab_size, (batch, length)), mask

    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=model.config.max_position_embeddings)}
    torch.onnx.export(
        function,
        inputs(2, 16),
        output,
        input_names=["input_ids", "attention_mask"],
        output_names=["logits"],
        dynamic_shapes=(axes, axes),
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(output)
    for batch, length, padding in ((1, 7, 0), (3, 40, 5)):
        ids, mask = inputs(batch, length, padding)
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            difference = (torch.from_numpy(found) - function(ids, mask))[mask.bool()].abs().max()
        print(f"batch {batch}, {length} tokens, {padding} padded: largest difference of the logits  {difference:.1e}")
    size = sum(file.stat().st_size for file in Path(output).parent.glob(f"{Path(output).name}*"))
    print(f"{output}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
