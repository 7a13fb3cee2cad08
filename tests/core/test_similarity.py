"""Linear CKA from sums over batches, against all features at once in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm_snp.core.moments import Moments
from llm_snp.core.similarity import linear_cka

N, D = 300, 7


def reference(x: Tensor, y: Tensor) -> float:
    x, y = (features.double() - features.double().mean(0) for features in (x, y))
    norm = torch.linalg.matrix_norm
    return (norm(x.T @ y).square() / (norm(x.T @ x) * norm(y.T @ y))).item()


def streamed(x: Tensor, y: Tensor) -> float:
    both = torch.cat([x, y], 1)
    moments = Moments.like(both[:50])
    for part in both.split(50):
        moments.add(part)
    return linear_cka(moments.covariance)


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("noise", [0.1, 1.0, 10.0])
def test_against_all_features_at_once(offset: float, noise: float) -> None:
    """Also where a channel sits far from zero, as some of a language model do."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator) @ torch.randn(D, D, generator=generator)
    y = x @ torch.randn(D, D, generator=generator) + noise * torch.randn(N, D, generator=generator)
    x[:, 2] += offset
    y[:, 4] -= offset
    assert streamed(x, y) == pytest.approx(reference(x, y), rel=1e-4)


def test_what_it_does_not_see() -> None:
    """It is 1 for the same up to a rotation, a scale and a shift, and near 0 for what has nothing in common."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, D, generator=generator)
    rotation, _ = torch.linalg.qr(torch.randn(D, D, generator=generator))
    assert streamed(x, 3.0 * x @ rotation + 5.0) == pytest.approx(1.0, abs=1e-6)
    assert streamed(x, x) == pytest.approx(1.0, abs=1e-6)
    assert streamed(x, x) <= 1.0
    assert streamed(x, torch.randn(N, D, generator=generator)) < 0.1
    assert streamed(x, torch.ones(N, D)) == 0.0
