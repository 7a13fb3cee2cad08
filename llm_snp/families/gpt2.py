"""GPT-2: query, key and value in one layer, one after the other; weights stored transposed (Conv1D)."""

from __future__ import annotations

from typing import Any

from ..modeling.gpt2 import SnpGPT2LMHeadModel
from .attention import ATTENTION, Shape
from .base import Family, field
from .checks import whole_heads
from .sites import MLP, Rows, Site


def _sites(config: Any, shape: Shape) -> tuple[Site, ...]:
    heads, width = shape.keys, shape.values
    qkv = tuple(Rows("attn.c_attn", width, part * heads * width) for part in range(3))
    nonnegative = config.activation_function == "relu"
    return (
        Site(ATTENTION, "heads", heads, width, qkv, "attn.c_proj", "ln_1"),
        Site(MLP, "neurons", shape.neurons, 1, (Rows("mlp.c_fc"),), "mlp.c_proj", "ln_2", nonnegative),
    )


GPT2 = Family(
    model_type="gpt2",
    blocks="transformer.h",
    layout=_sites,
    pruned_class=SnpGPT2LMHeadModel,
    stock={"neurons": field("n_inner")},
    # The first checkpoints on the Hub were saved from the base model.
    renames=((r"^(h|wte|wpe|ln_f)\b", r"transformer.\1"),),
    check=whole_heads(),
)
