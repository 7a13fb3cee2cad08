"""Writes tiny models, results made of them, and the logits of those, for another version of transformers to read.

python tests/versions/write_models.py DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import LENGTH, SAMPLES, VOCABULARY, logits, paragraphs
from tiny_models import KNOWN, MODELS, save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from llm_snp import prune

USUAL = ("opt", "gpt2", "gpt_neox", "olmo3")  # without positions, or with those that they have in every version
FORMATS = {"auto": 0.5, "stock": 0.3}  # and what is removed
# Not repaired: training helps then.
OPTIONS = {"target": "none", "samples": SAMPLES, "sequence_length": LENGTH, "quiet": True}


def computed(directory: Path, ids: Tensor) -> Tensor:
    """Logits. With the attention that does in all versions all that a config asks for (Gemma 2's soft caps)."""
    return logits(AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").float().eval(), ids)


def write(folder: Path) -> None:
    """The text FOLDER/text.txt, and for each tiny model FOLDER/NAME/dense, a result of every format, and logits.pt."""
    folder.mkdir(parents=True)
    text = folder / "text.txt"
    text.write_text("\n\n".join(paragraphs(60, seed=1)))
    ids = torch.randint(4, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(7))
    for name in KNOWN:
        place, found = folder / name, {}
        dense = save_tiny(name, place / "dense", **({} if MODELS[name][0] in USUAL else {"rope_theta": 500.0}))
        for kind, share in FORMATS.items():
            prune(dense, share, output=place / kind, format=kind, calibration=text, evaluate=(text,), **OPTIONS)
            found[kind] = computed(place / kind, ids)
        torch.save({"ids": ids, **found}, place / "logits.pt")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
