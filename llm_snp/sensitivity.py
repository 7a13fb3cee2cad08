"""What an error in a layer's output costs the language model: G = E g gᵀ, g the gradient of the loss at that output.

One forward and one backward pass over the dense model, block by block: block inputs are kept on the host, each block
is loaded again and recomputed with gradients on the way back, so the device never holds more than one block. The
windows are chosen so that all block inputs together are no larger than the calibration hidden states.
Labels are the next tokens of the calibration text (the empirical Fisher matrix).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import NumericalError
from .families import Site, linear
from .skeleton import Skeleton, run_block
from .stream import Stream, Taps

# Of the matrix, this share of its mean diagonal is added: a few thousand tokens do not fill a d x d matrix, and a
# direction that was not seen is not free.
FISHER_RIDGE = 0.3
Sensitivity = dict[tuple[int, str], Tensor]


def gradient_windows(samples: int, blocks: int) -> int:
    """How many windows the gradient is taken over: their inputs to all blocks fit into the hidden states' size."""
    return max(1, samples // blocks)


def measure_sensitivity(
    skeleton: Skeleton, tokens: Tensor, sites: tuple[Site, ...], matrix: bool, progress: Callable[[], None]
) -> Sensitivity:
    """G (d, d) float64 of every (block, site); tokens (N, T).

    matrix False gives tr(G) / d · I, one number per layer. Units: nats² per squared output unit and token. The loss
    is the sum over a window's predicted tokens, so g at a position counts all later tokens it influences.
    """
    stream = Stream(skeleton, tokens)
    inputs: list[Tensor] = []
    for i in range(len(skeleton)):
        inputs.append(stream.states.clone())
        stream.advance(i, skeleton.load_block(i, skeleton.block_state(i)))
        progress()
    gradient = stream.states
    for rows in stream.rows():
        gradient[rows] = _loss_gradient(skeleton, tokens[rows], stream.states[rows])
    sensitivity: Sensitivity = {}
    consumers = [site.consumer for site in sites]
    for i in reversed(range(len(skeleton))):
        block = skeleton.load_block(i, skeleton.block_state(i))
        stream.states = inputs.pop()
        sums: dict[str, Tensor] = {}
        for rows, hidden, call in stream.batches(i):
            hidden.requires_grad_(True)
            with torch.enable_grad(), Taps(block, outputs=consumers) as taps:
                output = run_block(block, hidden, call)
                outputs = [taps.outputs[name] for name in consumers]
                *at_outputs, at_input = torch.autograd.grad(
                    output, [*outputs, hidden], gradient[rows].to(hidden.device)
                )
            for name, g in zip(consumers, at_outputs, strict=True):
                g = g.flatten(0, -2).float()
                outer = g.mT @ g if matrix else g.square().sum()
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=g.device)) + outer.double()
            # Last: where a consumer's output is added to the residual stream, its gradient shares this memory.
            gradient[rows] = at_input.cpu()
        for site in sites:
            mean = sums[site.consumer] / tokens.numel()
            if not torch.isfinite(mean).all():
                raise NumericalError(
                    f"the loss gradient at {site.consumer} of block {i} overflows the type it is computed in; "
                    "use --dtype float32 or bfloat16, or --sensitivity relative"
                )
            sensitivity[i, site.name] = _normalised(mean, block, site)
        progress()
    return sensitivity


def _loss_gradient(skeleton: Skeleton, ids: Tensor, hidden: Tensor) -> Tensor:
    """Gradient (B, T, d) of the summed next-token loss at the last block's output."""
    gradients = []
    for one, state in zip(ids, hidden, strict=True):  # one window at a time: logits are the largest tensor there is
        state = state[None].to(skeleton.device).requires_grad_(True)
        with torch.enable_grad():
            logits = skeleton.leave(one[None], state)[0, :-1].float()
            loss = F.cross_entropy(logits, one[1:].to(skeleton.device), reduction="sum")
            gradients.append(torch.autograd.grad(loss, state)[0].cpu())
    return torch.cat(gradients)


def _normalised(summed: Tensor, block: torch.nn.Module, site: Site) -> Tensor:
    d = linear(block, site.consumer).out_features
    if summed.dim() == 0:
        return torch.eye(d, dtype=torch.float64, device=summed.device) * (summed / d)
    summed.diagonal().add_(FISHER_RIDGE * summed.diagonal().mean())
    return summed
