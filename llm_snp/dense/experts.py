"""The experts of a mixture, each with linear layers of its own, as they lie in a checkpoint.

transformers keeps each layer of all experts of a block in one tensor. Here it is read, pruned and written expert by
expert, and what an expert's last layer reads is already scaled by its routing weight p: with h the expert's neurons,
W (p h) = p (W h). So the moments of that input over the tokens routed to the expert are those of h weighted by p², and
its output is what the expert adds to the block's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError

# The largest models there are have a quarter of that; each is a few objects in memory, whatever its size.
MOST_EXPERTS = 100_000


class Expert(nn.Module):
    """A gated MLP. hidden (n, d), weight (n, 1): of its routing; gives (n, d)."""

    def __init__(self, width: int, neurons: int, activation: Any):
        super().__init__()
        self.gate_proj = nn.Linear(width, neurons, bias=False, device="meta")
        self.up_proj = nn.Linear(width, neurons, bias=False, device="meta")
        self.down_proj = nn.Linear(neurons, width, bias=False, device="meta")
        self.act_fn = activation

    def forward(self, hidden: Tensor, weight: Tensor) -> Tensor:
        inner = self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden)
        return self.down_proj(inner * weight.to(inner.dtype))  # type: ignore[no-any-return]


class Experts(nn.ModuleList):
    """In the place of a block's experts in transformers 5, called as they are."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (N, d); the experts (N, k) of each token, and their weights. Gives (N, d).

        An expert to which no token is routed is called with none, so that a tap sees it.
        """
        found = torch.zeros_like(hidden_states)
        if hidden_states.is_meta:  # where nobody is routed anywhere
            return found
        for expert, (tokens, places) in zip(self, routes(top_k_index, len(self)), strict=True):
            found.index_add_(0, tokens, expert(hidden_states[tokens], top_k_weights[tokens, places, None]))
        return found


def routes(index: Tensor, experts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For each expert the tokens that are routed to it, ascending, and the place it has among those of each token.

    index (N, k) long: the experts of each token.
    """
    for expert in range(experts):
        tokens, places = (index == expert).nonzero(as_tuple=True)
        yield tokens, places


def one_by_one(model: nn.Module) -> None:
    """Put `Experts` in the place of those of a model on meta, if it has any.

    Raises `UnsupportedModelError` for more than any model has.
    """
    found: list[tuple[nn.Module, str, Any]] = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(getattr(child, "gate_up_proj", None), nn.Parameter)
        and isinstance(getattr(child, "down_proj", None), nn.Parameter)
    ]
    count = sum(child.down_proj.shape[0] for _, _, child in found)
    if count > MOST_EXPERTS:
        raise UnsupportedModelError(
            f"config.json describes a model of {count} experts, and no model has more than {MOST_EXPERTS}; is the "
            "number of experts right?"
        )
    for parent, name, child in found:
        experts, width, neurons = child.down_proj.shape
        setattr(parent, name, Experts(Expert(width, neurons, child.act_fn) for _ in range(experts)))
