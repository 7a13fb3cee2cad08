"""Decoder blocks with experts: several gated MLPs, of which a router picks some for each token.

All experts of a block have as many neurons, because transformers keeps each of their layers in one tensor.
A pruned checkpoint carries a copy of this: it imports torch and transformers only.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .narrowing import convert_as
from .rotary import NarrowHeads, narrow_gated, narrow_grouped


def as_in_files(config_class: Any) -> None:
    """Let transformers make one tensor of those of all experts, and several again, as it does for the stock model."""
    convert_as(config_class.model_type, config_class.__base__.model_type)


def narrow_mixture_block(
    narrowed: type[NarrowHeads],
    block: Any,
    heads: int,
    neurons: int,
    shared: int | None = None,
    experts: int | None = None,
    **left: int,
) -> None:
    """A block with `self_attn` (grouped queries) and a gated `mlp`, or experts in its place.

    neurons: of the MLP, or of each expert; shared: of the MLP beside the experts, where there is one; experts: how many
    there are, None for all; left: what is left of the heads, as in `lose`.
    """
    narrow_grouped(block.self_attn, narrowed, heads, **left)
    if not hasattr(block.mlp, "experts"):
        narrow_gated(block.mlp, neurons)
        return
    if shared is not None:
        narrow_gated(block.mlp.shared_expert, shared)
    if experts is not None:
        _fewer_rows(block.mlp.gate, experts)
    if not hasattr(block.mlp.experts, "gate_up_proj"):  # each with layers of its own, while it is pruned
        if experts is not None:
            block.mlp.experts = block.mlp.experts[:experts]
        for expert in block.mlp.experts.children():
            narrow_gated(expert, neurons)
        return
    _narrow_experts(block.mlp.experts, neurons, experts)


def _fewer_rows(router: Any, experts: int) -> None:
    """A router with a row for each expert."""
    weight = router.weight
    if not router.top_k <= experts <= len(weight):
        raise ValueError(f"cannot leave {experts} of {len(weight)} experts, of which {router.top_k} work on a token")
    router.weight = nn.Parameter(weight.detach()[:experts].clone(), weight.requires_grad)
    router.num_experts = experts


def _narrow_experts(module: Any, neurons: int, experts: int | None) -> None:
    """All experts of a block in transformers 5: one tensor for each layer."""
    gate_up, down = module.gate_up_proj, module.down_proj
    if neurons > down.shape[2]:
        raise ValueError(f"cannot narrow experts of {down.shape[2]} neurons to {neurons}")
    gate, up = gate_up.detach()[:experts].chunk(2, dim=1)
    both = gate_up.new_empty(len(gate), 2 * neurons, gate.shape[2])
    both[:, :neurons], both[:, neurons:] = gate[:, :neurons], up[:, :neurons]
    module.gate_up_proj = nn.Parameter(both, gate_up.requires_grad)
    module.down_proj = nn.Parameter(down.detach()[:experts, :, :neurons].clone(), down.requires_grad)
    module.intermediate_dim, module.num_experts = neurons, len(gate)
