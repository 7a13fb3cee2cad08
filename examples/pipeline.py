"""Write text with the transformers pipeline, for several prompts at once.

python examples/pipeline.py demo-output --prompt "The city of" --prompt "In the morning"
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import pipeline


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("directory", nargs="?", default="demo-output", metavar="DIR", help="default: %(default)s")
    p.add_argument("--prompt", action="append", metavar="TEXT", help="repeatable")
    p.add_argument("--tokens", type=int, default=24, metavar="N", help="new tokens (default: %(default)s)")
    args = p.parse_args()
    if not Path(args.directory).is_dir():
        p.error(f"{args.directory} is no directory; give that of a pruned model, or make one with: make demo")

    writer = pipeline("text-generation", model=args.directory, trust_remote_code=True)
    prompts = args.prompt or ["The city of", "In the morning"]
    for (result,) in writer(prompts, batch_size=1, do_sample=False, max_new_tokens=args.tokens):
        print(result["generated_text"].strip())
        print("---")


if __name__ == "__main__":
    main()
