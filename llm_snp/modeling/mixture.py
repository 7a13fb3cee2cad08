"""Decoder blocks with experts: several gated MLPs, of which a router picks some for each token.

All experts of a block have as many neurons, because transformers keeps each of their layers in one tensor.
A pruned checkpoint carries a copy of this: it imports torch and transformers only.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .rotary import NarrowHeads, narrow_gated, narrow_grouped


def as_in_files(config_class: Any) -> None:
    """Let transformers make one tensor of those of all experts, and several again, as it does for the stock model."""
    conversions = get_checkpoint_conversion_mapping(config_class.__base__.model_type)
    register_checkpoint_conversion_mapping(config_class.model_type, conversions, overwrite=True)


def narrow_mixture_block(
    narrowed: type[NarrowHeads], block: Any, heads: int, neurons: int, shared: int | None = None, **left: int
) -> None:
    """A block with `self_attn` (grouped queries) and a gated `mlp`, or experts in its place.

    neurons: of the MLP, or of each expert; shared: of the MLP beside the experts, where there is one; left: what is
    left of the heads, as in `lose`.
    """
    narrow_grouped(block.self_attn, narrowed, heads, **left)
    if not hasattr(block.mlp, "experts"):
        narrow_gated(block.mlp, neurons)
        return
    if shared is not None:
        narrow_gated(block.mlp.shared_expert, shared)
    experts = block.mlp.experts
    if not hasattr(experts, "gate_up_proj"):  # each with layers of its own, while it is pruned
        for expert in experts.children():
            narrow_gated(expert, neurons)
        return
    gate_up, down = experts.gate_up_proj, experts.down_proj
    if neurons > down.shape[2]:
        raise ValueError(f"cannot narrow experts of {down.shape[2]} neurons to {neurons}")
    gate, up = gate_up.detach().chunk(2, dim=1)
    both = gate_up.new_empty(len(gate), 2 * neurons, gate.shape[2])
    both[:, :neurons], both[:, neurons:] = gate[:, :neurons], up[:, :neurons]
    experts.gate_up_proj = nn.Parameter(both, gate_up.requires_grad)
    experts.down_proj = nn.Parameter(down.detach()[..., :neurons].clone(), down.requires_grad)
    experts.intermediate_dim = neurons
