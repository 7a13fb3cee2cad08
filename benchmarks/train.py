#!/usr/bin/env python3
"""Train a small model to measure on, where no published checkpoint can be had.

    python benchmarks/train.py llama --text train.txt.xz --output llama-wiki-1m --minutes 15

One pass over the text, or as much of it as fits into the minutes. Tokenizer: that of the embedded OPT. A model this
small is limited by its size soon, so that pruning hurts as it does on a real one.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llm_snp.cli import BAD_INPUT
from llm_snp.dense.hub import EMBEDDED
from llm_snp.dense.readers import documents
from llm_snp.errors import CorpusError, SnpError

LENGTH = 256
# About a million parameters each; of the mixture's two, a token uses one.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
    "mixtral": {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "router_aux_loss_coef": 0.02,
    },
    "gpt2": {"n_embd": 128, "n_inner": 512, "n_layer": 4, "n_head": 4, "n_positions": 512},
}


def batches(text: Path, tokenizer: Any, size: int, seed: int) -> Iterator[Tensor]:
    """Token ids (size, LENGTH) of windows that follow each other in the text, drawn from a buffer of them."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    buffer: list[Tensor] = []
    for paragraph in documents(str(text), "calibration"):
        waiting += tokenizer(paragraph + "\n\n", add_special_tokens=False)["input_ids"]
        while len(waiting) >= LENGTH:
            buffer.append(torch.tensor(waiting[:LENGTH]))
            del waiting[:LENGTH]
        while len(buffer) >= 64 * size:
            picked = torch.randperm(len(buffer), generator=generator)[:size].tolist()
            yield torch.stack([buffer[i] for i in picked])
            buffer = [window for i, window in enumerate(buffer) if i not in set(picked)]


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 1}
    config = AutoConfig.for_model(args.family, vocab_size=len(tokenizer), **SHAPES[args.family], **ids)
    model = AutoModelForCausalLM.from_config(config).train()
    print(f"{args.family}: {model.num_parameters():,} parameters", file=sys.stderr)
    # Or a mixture would send all tokens to a few of its experts.
    balanced = {"output_router_logits": True} if hasattr(config, "num_experts_per_tok") else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.1)
    start, mean, step = time.perf_counter(), 0.0, 0
    for tokens in batches(args.text, tokenizer, args.batch, args.seed):
        # The rate falls with the time that is left: how many steps there will be depends on the machine.
        share = (time.perf_counter() - start) / (60 * args.minutes)
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1.0, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))
        loss = model(input_ids=tokens, labels=tokens, use_cache=False, **balanced).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = 0.98 * mean + 0.02 * loss.item() if step else loss.item()
        step += 1
        if step % 100 == 1:
            print(f"step {step}  {share:.0%} of the time  loss {mean:.3f}", file=sys.stderr)
    if not step:
        raise CorpusError(f"{args.text} is too short for one step; give a longer text, or a smaller --batch")
    model.eval().half().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"{step} steps, {step * args.batch * LENGTH:,} tokens, loss {mean:.3f}: {args.output}")


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("family", choices=SHAPES)
    p.add_argument("--text", type=Path, required=True, metavar="FILE", help="a text, as --calibration takes it")
    p.add_argument("--output", type=Path, required=True, metavar="DIR")
    p.add_argument("--minutes", type=float, default=15.0, metavar="M", help="how long (default: 15)")
    p.add_argument("--batch", type=int, default=16, metavar="B", help=f"windows of {LENGTH} tokens (default: 16)")
    p.add_argument("--rate", type=float, default=3e-3, metavar="R", help="learning rate (default: 3e-3)")
    p.add_argument("--seed", type=int, default=0)
    try:
        train(p.parse_args(arguments))
    except SnpError as error:
        print(f"train: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
