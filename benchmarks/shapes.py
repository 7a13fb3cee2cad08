"""Checkpoints with random weights in the published OPT shapes, and text to run them on.

Nothing is downloaded. The tokenizer is that of the embedded model; the vocabulary size is that of the real shape.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import OPTConfig

from llm_snp.config import PruneConfig
from llm_snp.dense.hub import EMBEDDED
from llm_snp.dense.skeleton import empty_model

WORDS = 4000


@dataclass(frozen=True)
class Shape:
    """blocks, hidden (d), ffn (m), heads: of facebook/opt-*; all share vocabulary 50272 and 2048 positions."""

    blocks: int
    hidden: int
    ffn: int
    heads: int
    vocabulary: int = 50272
    positions: int = 2048


SHAPES = {
    "opt-125m": Shape(12, 768, 3072, 12),
    "opt-1.3b": Shape(24, 2048, 8192, 32),
    "opt-2.7b": Shape(32, 2560, 10240, 32),
    "opt-6.7b": Shape(32, 4096, 16384, 32),
    "opt-13b": Shape(40, 5120, 20480, 40),
    "opt-30b": Shape(48, 7168, 28672, 56),
    "opt-66b": Shape(64, 9216, 36864, 72),
}


def config_of(shape: Shape, blocks: int | None = None) -> OPTConfig:
    """The transformers config; `blocks` for fewer of them."""
    return OPTConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        word_embed_proj_dim=shape.hidden,
        ffn_dim=shape.ffn,
        num_attention_heads=shape.heads,
        num_hidden_layers=blocks or shape.blocks,
        max_position_embeddings=shape.positions,
        architectures=["OPTForCausalLM"],
    )


def make_config(directory: Path, shape: Shape, dtype: torch.dtype, blocks: int | None = None) -> None:
    """config.json and tokenizer: all that a dry run needs."""
    directory.mkdir(parents=True, exist_ok=True)
    fields = config_of(shape, blocks).to_dict() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    fields.pop("dtype", None)
    (directory / "config.json").write_text(json.dumps(fields))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, directory)


def make_checkpoint(
    directory: Path, shape: Shape, dtype: torch.dtype, blocks: int | None = None, seed: int = 0
) -> None:
    """One model.safetensors with normal weights (std 0.02) and unit norms, as OPT is initialised."""
    make_config(directory, shape, dtype, blocks)
    model = empty_model(config_of(shape, blocks))
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if "layer_norm" in name:
            tensors[name] = torch.full(parameter.shape, float(name.endswith("weight")), dtype=dtype)
        else:
            tensors[name] = (0.02 * torch.randn(parameter.shape, generator=generator)).to(dtype)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def run_options(folder: Path, shape: str, args: argparse.Namespace) -> PruneConfig:
    """Options of a run on `folder`/<shape> with the text of `make_text`, from the arguments that benchmarks share."""
    return PruneConfig(
        str(folder / shape),
        args.sparsity,
        str(folder / "pruned"),
        calibration=str(folder / "text.txt"),
        samples=args.samples,
        sequence_length=args.sequence_length,
        method=args.method,
        allocation=args.allocation,
        evaluate=(),
        overwrite=True,
        quiet=True,
    )


def make_text(file: Path, tokens: int, seed: int = 0) -> None:
    """Random words, at least `tokens` tokens of them."""
    source = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    stock = ["".join(source.choices(letters, k=source.randint(2, 9))) for _ in range(WORDS)]
    file.write_text(" ".join(source.choices(stock, k=tokens)), encoding="utf-8")
