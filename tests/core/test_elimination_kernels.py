"""The Triton kernels of the elimination against its operations: on a GPU, or on the CPU in Triton's interpreter,

    pip install triton && TRITON_INTERPRET=1 python -m pytest tests/core/test_elimination_kernels.py

Without either they cannot be run, and these tests are skipped; what decides whether they are used is tested anyhow.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_elimination import inverse, problem
from torch import Tensor

from llm_snp.core import elimination

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it is imported
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None or not (torch.cuda.is_available() or INTERPRETED),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels, with tiles so narrow that a small problem has several."""
    from llm_snp.core import elimination_kernels

    monkeypatch.setattr(elimination_kernels, "COLUMNS", 16)
    monkeypatch.setattr(elimination_kernels, "ROWS", 4)
    return elimination_kernels


def matrices(m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    c, weight, g = problem(m, seed=m)
    h, e = inverse(c), weight.mT @ g @ weight
    return h.to(DEVICE, dtype).contiguous(), e.to(DEVICE, dtype).contiguous()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("m", "group", "panel"), [(21, 1, 8), (16, 1, 16), (15, 3, 6), (16, 4, 4)])
def test_the_same_ranking(kernels: Any, m: int, group: int, panel: int, dtype: torch.dtype) -> None:
    """Sizes that fill no tile, panels that end within it, and columns that are gone but still there."""
    h, e = matrices(m, dtype)
    expected, costs = elimination._eliminate(h.clone(), e.clone(), group, panel, None)
    removed, found = elimination._eliminate(h, e, group, panel, kernels)
    assert removed.tolist() == expected.tolist()
    accuracy = 1e-10 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(found, costs, rtol=accuracy, atol=accuracy * costs.sum().item() / m)


@needs_triton
def test_copies_of_a_unit(kernels: Any) -> None:
    """Of two that are alike the first goes; the other is then as dear as both were."""
    c, weight, _ = problem(12)
    index = torch.cat([torch.arange(12), torch.arange(6)])
    c, weight = c[index][:, index], weight[:, index]
    c.diagonal().add_(1e-6 * c.diagonal().mean())
    h, e = inverse(c).to(DEVICE).contiguous(), (weight.mT @ weight).to(DEVICE).contiguous()
    removed, increments = elimination._eliminate(h, e, 1, 8, kernels)
    assert sorted(removed.tolist()) == list(range(18))
    assert {unit % 12 for unit in removed[:6].tolist()} == set(range(6))
    assert increments[:6].sum() < 1e-4 * increments.sum()


@needs_triton
def test_too_wide_groups_are_left_to_torch(kernels: Any) -> None:
    assert kernels.takes_groups(64, 32, torch.float64)
    assert not kernels.takes_groups(65, 32, torch.float64)
    assert not kernels.takes_groups(128, 32, torch.float32)
    assert not kernels.takes_groups(4, 2048, torch.float32)


def test_no_kernels_on_a_cpu() -> None:
    assert elimination.fused(torch.device("cpu"), torch.float64) is None


def stand_in(**changes: Any) -> Any:
    """Kernels that are torch's own operations, but for `changes`."""

    def groups(h: Tensor, e: Tensor, g: int) -> tuple[Tensor, Tensor]:
        return elimination._eliminate(h, e, g, 32, None)

    parts = {"remove_columns": elimination._panel, "remove_groups": groups, "REFUSALS": (RuntimeError, OSError)}
    return SimpleNamespace(**parts | {"takes_groups": lambda *_: True} | changes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_kernels_are_used_only_if_they_agree(dtype: torch.dtype) -> None:
    """No compiler, no driver, another ranking, another cost: torch's operations then."""
    device = torch.device("cpu")

    def refuses(*_: Any) -> Any:
        raise RuntimeError("no driver")

    def other_ranking(*arguments: Any) -> tuple[Tensor, Tensor]:
        removed, costs = elimination._eliminate(*arguments, 32, None)
        return removed.flip(0), costs

    def other_cost(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        picked, cost, factors = elimination._panel(*arguments)
        return picked, 1.01 * cost, factors

    assert elimination.agree(stand_in(), device, dtype)
    assert not elimination.agree(stand_in(remove_columns=refuses), device, dtype)
    assert not elimination.agree(stand_in(remove_groups=refuses), device, dtype)
    assert not elimination.agree(stand_in(remove_groups=other_ranking), device, dtype)
    assert not elimination.agree(stand_in(remove_columns=other_cost), device, dtype)


def test_the_small_problem_has_no_close_calls() -> None:
    """It is ranked alike in both types, so rounding cannot make kernels and operations disagree about it."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 96, generator=generator, dtype=torch.float64) for n in (192, 8))
    h, e = torch.linalg.inv(x.mT @ x), w.mT @ w
    for group in (1, 4):
        exact, _ = elimination.eliminate(h, e, group, 32)
        single, _ = elimination.eliminate(h.float(), e.float(), group, 32)
        assert torch.equal(exact, single)
