"""A short LoRA recovery run with peft: train adapters, merge them, and save a plain pruned checkpoint again.

    python examples/lora.py demo-output --text README.md --steps 10 --output demo-output-lora

Prints the loss on the text before, after training, after merging, and of the saved model loaded again. Adapters are as
narrow or wide as the layers they sit on, so the merged checkpoint has the widths of the pruned one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("directory", nargs="?", default="demo-output", metavar="DIR", help="default: %(default)s")
    p.add_argument("--text", default=__file__, metavar="FILE", help="UTF-8 text (default: this script)")
    p.add_argument("--steps", type=int, default=10, metavar="N", help="default: %(default)s")
    p.add_argument("--length", type=int, default=64, metavar="T", help="tokens of a window (default: %(default)s)")
    p.add_argument("--output", metavar="DIR", help="default: DIR with -lora behind its name")
    args = p.parse_args()
    if not Path(args.directory).is_dir():
        p.error(f"{args.directory} is no directory; give that of a pruned model, or make one with: make demo")
    output = args.output or f"{Path(args.directory)}-lora"

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

    pruned = load(args.directory)
    print(f"before       {loss(pruned):.4f}  ({len(windows)} windows of {args.length} tokens)")
    adapted = get_peft_model(pruned, LoraConfig(r=8, lora_alpha=16, target_modules=LAYERS, task_type="CAUSAL_LM"))
    trained, total = adapted.get_nb_trainable_parameters()
    options = TrainingArguments(
        output,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    Trainer(adapted, options, train_dataset=windows).train()
    print(f"trained      {loss(adapted):.4f}  ({args.steps} steps, {trained:,} of {total:,} parameters)")
    merged = adapted.merge_and_unload()
    print(f"merged       {loss(merged):.4f}")
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"loaded again {loss(load(output)):.4f}  ({output})")


if __name__ == "__main__":
    main()
