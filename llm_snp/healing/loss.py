"""What a student's predictions lack of its teacher's: KL divergence over the whole vocabulary, and the text's own loss.

The loss is (1 - w) KL(teacher ‖ student) + w NLL(text), each a mean over positions (Hinton, Vinyals, Dean, arXiv
1503.02531, at temperature 1). Softmaxes are float32 and of a strip of positions at a time, whatever the vocabulary:
what is held for all positions is the logits of both models in the type that they have, and the gradient takes the place
of the teacher's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.linalg import strips

ENTRIES = 1 << 24  # of a strip of logits: 64 MB in float32
NO_LABEL = -1  # what the last position of a window predicts is not there


@dataclass(frozen=True)
class Divergence:
    """loss: to be minimised; sums (3) float64, in nats: KL over all positions, and over those that have a label the
    text's NLL for the student and for the teacher.
    """

    loss: Tensor
    sums: Tensor


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor, text: float) -> tuple[Tensor, Tensor]:
        positions, vocabulary = student.shape
        labelled = (labels != NO_LABEL).float()
        own, other = text / labelled.sum().clamp(min=1.0), (1.0 - text) / positions
        sums = torch.zeros(3, dtype=torch.float64, device=student.device)
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = teacher if teacher.dtype == student.dtype else torch.empty_like(student)
        for part in strips(positions, max(1, ENTRIES // vocabulary)):
            found = student[part].float().log_softmax(-1)
            wanted = teacher[part].float().log_softmax(-1)
            target = wanted.exp()
            at, known = labels[part].clamp(min=0)[:, None], labelled[part][:, None]
            sums[2] -= (wanted.gather(1, at) * known).sum(dtype=torch.float64)
            sums[0] += wanted.sub_(found).mul_(target).sum(dtype=torch.float64)
            sums[1] -= (found.gather(1, at) * known).sum(dtype=torch.float64)
            if gradient is not None:
                probability = found.exp_()
                slope = target.sub_(probability).mul_(-other)
                if text:
                    slope.addcmul_(probability, known * own).scatter_add_(1, at, -known * own)
                gradient[part] = slope.to(gradient.dtype)
        ctx.gradient = gradient
        loss = sums[0] * other + sums[1] * own
        ctx.mark_non_differentiable(sums)
        return loss.float(), sums

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.gradient.mul_(slopes[0]), None, None, None


def divergence(student: Tensor, teacher: Tensor, ids: Tensor, text: float) -> Divergence:
    """Of logits (B, T, V) of both models over token ids (B, T); text: the weight w of the text's own loss, 0 to 1.

    `teacher` is overwritten where `student` needs a gradient, and can be used for nothing else after.
    """
    labels = torch.full_like(ids, NO_LABEL)
    labels[:, :-1] = ids[:, 1:]
    flat = (student.flatten(0, 1), teacher.flatten(0, 1), labels.flatten())
    loss, sums = _Divergence.apply(*flat, text)  # type: ignore[no-untyped-call]
    return Divergence(loss, sums)
