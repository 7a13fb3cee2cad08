"""Generate text with a pruned model: greedy, sampled, by beams, in a padded batch, with a dynamic and a static cache.

    python examples/generate.py demo-output --prompt "The city of"

Prints the texts, whether a batch padded on the left and a static cache give the tokens that a single prompt with a
dynamic cache gives, and how much smaller the KV cache is than the dense model's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging import version
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ("In the morning", "He was born in 1950 and")  # go into a batch with the one that is asked for


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("directory", nargs="?", default="demo-output", metavar="DIR", help="default: %(default)s")
    p.add_argument("--prompt", default="The city of", metavar="TEXT")
    p.add_argument("--tokens", type=int, default=24, metavar="N", help="new tokens (default: %(default)s)")
    args = p.parse_args()
    if not Path(args.directory).is_dir():
        p.error(f"{args.directory} is no directory; give that of a pruned model, or make one with: make demo")

    tokenizer = AutoTokenizer.from_pretrained(args.directory, padding_side="left", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(args.directory, trust_remote_code=True).float().eval()

    def generate(*prompts: str, **options: Any) -> torch.Tensor:
        """New tokens of each prompt, (prompts, tokens)."""
        batch = tokenizer(list(prompts), padding=True, return_tensors="pt").to(model.device)
        options = {"do_sample": False, "min_new_tokens": args.tokens, "max_new_tokens": args.tokens} | options
        return model.generate(**batch, **options)[:, batch.input_ids.shape[1] :]

    greedy = generate(args.prompt)
    torch.manual_seed(0)
    sampled = generate(args.prompt, do_sample=True, top_p=0.9)
    for name, tokens in (("greedy", greedy), ("sampled", sampled), ("beams", generate(args.prompt, num_beams=4))):
        print(f"{name:8} {args.prompt}{tokenizer.decode(tokens[0])!r}")

    batch = generate(args.prompt, *PROMPTS)
    single = torch.cat([greedy, *(generate(prompt) for prompt in PROMPTS)])
    if version.parse(transformers.__version__) < version.parse("4.56"):
        print("static cache: needs transformers 4.56; before, it has one shape for all blocks")
    else:
        static = generate(args.prompt, cache_implementation="static")
        print(f"static cache, tokens as with a dynamic cache   {(static == greedy).float().mean():.0%}")
    print(f"padded batch, tokens as one prompt at a time   {(batch == single).float().mean():.0%}")

    config = model.config  # of the dense model, but for its `block_widths`
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dense = 2 * config.num_hidden_layers * heads * width
    kept = cached_values(model, tokenizer(args.prompt, return_tensors="pt"))
    print(f"KV cache, values per token                     {kept:,} of {dense:,}")


@torch.no_grad()
def cached_values(model: Any, batch: Any) -> int:
    """Keys and values that the cache has of each token."""
    cache = model(**batch, use_cache=True).past_key_values
    if hasattr(cache, "layers"):
        tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    else:  # before transformers 4.54; pairs of keys and values, whatever has them
        tensors = [tensor for layer in cache for tensor in layer]
    return sum(tensor.numel() for tensor in tensors) // batch.input_ids.shape[1]


if __name__ == "__main__":
    main()
