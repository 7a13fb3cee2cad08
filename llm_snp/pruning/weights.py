"""The tensors of a block as the checkpoint has them, and what pruning puts in their place."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.linalg import all_finite
from ..errors import NumericalError

# name within the block -> tensor, on the host and in the checkpoint's dtype
State = dict[str, Tensor]


def linear_weights(state: State, name: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Weight (d, m) and bias (d,) of a linear layer as the checkpoint has them, float64, on `device`."""
    weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
    # Two steps: in one the host would make the float64 copy, and four times as much would travel.
    return weight.to(device).double(), None if bias is None else bias.to(device).double()


def store(state: State, name: str, weight: Tensor, bias: Tensor | None) -> None:
    """Put a layer's new weight and bias into a state, rounded to its dtype. Raises `NumericalError` on overflow."""
    for suffix, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        key = f"{name}.{suffix}"
        rounded = value.to(state[key].dtype)
        if not all_finite(rounded):
            raise NumericalError(
                f"the repaired {key} exceeds what {state[key].dtype} can hold (largest entry "
                f"{value.abs().max().item():.3g}); give a larger --damping"
            )
        state[key] = rounded.cpu().contiguous()
