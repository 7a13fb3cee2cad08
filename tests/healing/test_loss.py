"""The distillation loss against its definition in float64, and what it does to its arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_snp.healing import loss
from llm_snp.healing.loss import divergence

BATCH, LENGTH, VOCABULARY = 3, 7, 50


def made_up(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a student and a teacher, and token ids."""
    source = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(BATCH, LENGTH, VOCABULARY, generator=source) for _ in range(2))
    return student.to(dtype), teacher.to(dtype), torch.randint(VOCABULARY, (BATCH, LENGTH), generator=source)


def reference(student: Tensor, teacher: Tensor, ids: Tensor, text: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, KL and NLL by their definitions, dense and in float64."""
    found, wanted = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    kl = (wanted.exp() * (wanted - found)).sum()
    nll = F.nll_loss(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    return (1 - text) * kl / (BATCH * LENGTH) + text * nll / (BATCH * (LENGTH - 1)), kl, nll


@pytest.mark.parametrize("text", [0.0, 0.3])
@pytest.mark.parametrize("entries", [1, 3 * VOCABULARY, 1 << 24], ids=["a row", "strips", "all"])
def test_loss_and_gradient_are_those_of_the_definition(
    text: float, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "ENTRIES", entries)
    student, teacher, ids = made_up()
    exact = student.double().requires_grad_()
    expected, kl, nll = reference(exact, teacher, ids, text)
    (2 * expected).backward()
    student.requires_grad_()
    found = divergence(student, teacher.clone(), ids, text)
    (2 * found.loss).backward()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    own = F.cross_entropy(teacher[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    assert found.sums.tolist() == pytest.approx([kl.item(), nll.item(), own.item()], rel=1e-6)
    torch.testing.assert_close(student.grad, exact.grad.float(), rtol=1e-4, atol=1e-7)


def test_predictions_that_agree_have_no_divergence() -> None:
    student, _, ids = made_up()
    student.requires_grad_()
    found = divergence(student, student.detach().clone(), ids, 0.0)
    found.loss.backward()
    assert abs(found.loss.item()) < 1e-6
    assert student.grad.abs().max() < 1e-7


def test_16_bit_logits_are_compared_in_float32() -> None:
    student, teacher, ids = made_up(torch.bfloat16)
    expected = reference(student, teacher, ids, 0.2)[0].item()
    found = divergence(student.requires_grad_(), teacher, ids, 0.2)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(expected, rel=1e-6)
    assert student.grad.dtype == torch.bfloat16


def test_the_gradient_takes_the_teacher_s_place_and_only_if_there_is_one() -> None:
    student, teacher, ids = made_up()
    before = teacher.clone()
    divergence(student, teacher, ids, 0.0)
    assert torch.equal(teacher, before)
    found = divergence(student.requires_grad_(), teacher, ids, 0.0)
    found.loss.backward()
    assert torch.equal(student.grad, teacher)
