"""What an error in a layer's output costs the language model: G = E g gᵀ, g the gradient of the loss at that output.

One forward and one backward pass over the dense model, block by block, so the device never holds more than one block.
The storage keeps the inputs of every √L-th of L blocks; on the way back those of the blocks between are computed again
(Chen et al., arXiv 1604.06174), √L at a time, and each block is recomputed with gradients. So many windows take part
that all inputs together are no larger than the calibration hidden states.
Labels are drawn from the model's own predictions, which makes G the Fisher matrix; with the next tokens of the text,
the empirical Fisher matrix, pruned models were worse.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.linalg import all_finite, strips
from ..core.stopwatch import timed
from ..dense.skeleton import HEAD_TOKENS, Skeleton, run_block
from ..dense.stream import Stream
from ..dense.taps import Taps
from ..errors import NumericalError
from ..families import linear
from .session import Session

# Of the matrix, this share of its mean diagonal is added: a few thousand tokens do not fill a d x d matrix, and a
# direction that was not seen is not free.
FISHER_RIDGE = 0.1


def _segment(blocks: int) -> int:
    """Of how many blocks in a row the first one's inputs are kept."""
    return max(1, isqrt(blocks))


def _segments(blocks: int) -> int:
    return ceil(blocks / _segment(blocks))


def inputs_kept(blocks: int) -> int:
    """To how many blocks inputs are kept at once: to the first of each segment, and to all of the one at work."""
    return _segments(blocks) - 1 + _segment(blocks)


def gradient_passes(blocks: int) -> float:
    """How often the windows of the gradient go through the model: forwards, on the way back, and again in between."""
    return 3.0 - _segments(blocks) / blocks


def gradient_windows(samples: int, blocks: int) -> int:
    """How many windows the gradient is taken over: the inputs kept of them fit into the hidden states' size."""
    return max(1, samples // inputs_kept(blocks))


def read_sensitivity(session: Session, index: int) -> dict[str, Tensor]:
    """G (d, d) float64 of every site of a block, as `measure_sensitivity` left it; empty if there was no need.

    One number per layer (`scalar`) becomes tr(G) / d · I.
    """
    if not session.options.needs_gradient:
        return {}
    device, block = session.skeleton.device, session.skeleton.blocks[index]
    stored = session.journal.read_tensors(_name(index), device)
    found = {}
    for site in session.sites(index):
        mean, d = stored[site.name].to(device, torch.float64), linear(block, site.consumer).out_features
        if session.options.sensitivity == "scalar":
            mean = torch.eye(d, dtype=torch.float64, device=device) * (mean / d)
        else:
            mean.diagonal().add_(FISHER_RIDGE * mean.diagonal().mean())
        found[site.name] = mean
    return found


def measure_sensitivity(session: Session) -> None:
    """Leave G of every block and site in the journal, float32: a matrix (d, d), or its trace for `scalar`.

    Units: nats² per squared output unit and token. The loss is the sum over a window's predicted tokens, so g at a
    position counts all later tokens it influences. Raises `NumericalError` if a gradient overflows.
    """
    skeleton, options, processes = session.skeleton, session.options, session.processes
    blocks = range(len(skeleton))
    if all(session.journal.has(_name(i)) for i in blocks):
        session.progress.say("sensitivity: measured by the interrupted run")
        return
    count = gradient_windows(session.tokens.shape[0], len(skeleton))
    session.progress.say(f"gradient of the loss on {count} windows, labels drawn from the model's own predictions")
    with session.progress.phase("sensitivity", 2 * len(skeleton)) as step:
        stream = session.stream(count)
        kept: list[Stream] = []
        for i, state in skeleton.block_states(blocks):
            if i % _segment(len(skeleton)) == 0:
                kept.append(stream.copy())
            stream.advance(i, skeleton.load_block(i, state))
            step()
        _begin_backward(stream, options.seed)
        gradients = stream
        for i, block, inputs in _backwards(skeleton, kept):
            sites = session.sites(i)
            modules = [site.output for site in sites]
            sums: dict[str, Tensor] = {}
            for site in sites:
                d = linear(block, site.consumer).out_features
                shape = (d, d) if options.sensitivity == "fisher" else (1,)
                sums[site.output] = torch.zeros(shape, dtype=torch.float64, device=skeleton.device)
            for (rows, hidden, call), (_, gradient) in zip(inputs.batches(i), gradients.parts(), strict=True):
                hidden.requires_grad_(True)
                with torch.enable_grad(), Taps(block, outputs=modules) as taps:
                    output = run_block(block, hidden, call)
                    outputs = [taps.outputs[name] for name in modules]
                    with timed("backward"):
                        *at_outputs, at_input = torch.autograd.grad(output, [*outputs, hidden], gradient)
                with timed("moments"):
                    for name, g in zip(modules, at_outputs, strict=True):
                        g = g.flatten(0, -2).float()
                        sums[name] += g.mT @ g if options.sensitivity == "fisher" else g.square().sum()
                # Last: where a consumer's output is added to the residual stream, its gradient shares this memory.
                gradients.put(rows, at_input)
            found = {}
            for site in sites:
                processes.sum(sums[site.output])
                found[site.name] = (sums[site.output] / stream.windows.numel()).float().cpu()
                if not all_finite(found[site.name]):
                    raise NumericalError(
                        f"the loss gradient at {site.output} of block {i} overflows the type it is computed in; "
                        "use --dtype float32 or bfloat16, or --sensitivity relative"
                    )
            session.journal.write_tensors(_name(i), found)
            del inputs  # the storage has room for so many and no more
            step()


def _backwards(skeleton: Skeleton, kept: list[Stream]) -> Iterator[tuple[int, nn.Module, Stream]]:
    """Each block from the last to the first, loaded, with its inputs.

    kept: inputs of the first block of each segment, which are used up.
    """
    size = _segment(len(skeleton))
    segments = [range(start, min(start + size, len(skeleton))) for start in range(0, len(skeleton), size)]
    visits = [
        (i, again) for s in reversed(segments) for again, part in ((True, s[:-1]), (False, s[::-1])) for i in part
    ]
    inputs: list[Stream] = []
    for (i, again), (_, state) in zip(visits, skeleton.block_states([i for i, _ in visits]), strict=True):
        block = skeleton.load_block(i, state)
        if not inputs:
            inputs.append(kept.pop())
        if again:
            inputs.append(inputs[-1].copy())
            inputs[-1].advance(i, block)
        else:
            yield i, block, inputs.pop()


def _name(index: int) -> str:
    return f"sensitivity-{index:05d}"


def _begin_backward(stream: Stream, seed: int) -> None:
    """Replace the hidden states after the last block by the gradient of the loss there."""
    with stream.skeleton.outer_weights():
        for rows, hidden in stream.parts():
            gradient = torch.empty_like(hidden)
            for window, ids in enumerate(stream.tokens[rows]):
                generator = torch.Generator().manual_seed(1_000_003 * seed + stream.first + rows.start + window)
                gradient[window] = _loss_gradient(stream.skeleton, ids, hidden[window], generator)
            stream.put(rows, gradient)


def _loss_gradient(skeleton: Skeleton, ids: Tensor, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient (T, d) of a window's summed loss at the last block's output; ids (T,), hidden (T, d) on the device.

    Labels are drawn on the CPU's random numbers, so that every device draws the same.
    """
    gradient = torch.zeros_like(hidden)
    for part in strips(ids.shape[0] - 1, HEAD_TOKENS):  # logits are the largest tensor there is
        state = hidden[None, part].requires_grad_(True)
        with torch.enable_grad():
            logits = skeleton.leave(ids[None, part], state)[0].float()
            draw = torch.rand(logits.shape[0], 1, generator=generator).to(logits.device)
            below = logits.detach().softmax(-1).cumsum(-1)
            labels = torch.searchsorted(below, draw).squeeze(1).clamp_max(logits.shape[-1] - 1)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            gradient[part] = torch.autograd.grad(loss, state)[0][0]
    return gradient
