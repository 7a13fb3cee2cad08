"""Train all weights of a pruned model a little further, with transformers' Trainer and gradient checkpointing.

    python examples/finetune.py demo-output --text README.md --steps 10 --output demo-output-tuned

Prints the loss on the text before and after, and of the saved model loaded again. A real recovery run needs a large and
general text; the loss is measured on the text that is trained on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("directory", nargs="?", default="demo-output", metavar="DIR", help="default: %(default)s")
    p.add_argument("--text", default=__file__, metavar="FILE", help="UTF-8 text (default: this script)")
    p.add_argument("--steps", type=int, default=10, metavar="N", help="default: %(default)s")
    p.add_argument("--length", type=int, default=64, metavar="T", help="tokens of a window (default: %(default)s)")
    p.add_argument("--output", metavar="DIR", help="default: DIR with -tuned behind its name")
    args = p.parse_args()
    if not Path(args.directory).is_dir():
        p.error(f"{args.directory} is no directory; give that of a pruned model, or make one with: make demo")
    output = args.output or f"{Path(args.directory)}-tuned"

    def load(directory: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).float()

    tokenizer = AutoTokenizer.from_pretrained(args.directory, trust_remote_code=True)
    ids = tokenizer(Path(args.text).read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    windows = [{"input_ids": window, "labels": window} for window in ids.unfold(0, args.length, args.length)]

    def loss(model: Any) -> float:
        """Mean over the windows, natural logarithm."""
        model.eval()
        with torch.no_grad():
            losses = [model(**{k: v[None].to(model.device) for k, v in window.items()}).loss for window in windows]
        return torch.stack(losses).mean().item()

    model = load(args.directory)
    print(f"before       {loss(model):.4f}  ({len(windows)} windows of {args.length} tokens)")
    options = TrainingArguments(
        output,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        gradient_checkpointing=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    Trainer(model, options, train_dataset=windows).train()
    print(f"after        {loss(model):.4f}  ({args.steps} steps)")
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"loaded again {loss(load(output)):.4f}  ({output})")


if __name__ == "__main__":
    main()
