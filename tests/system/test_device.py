"""What is decided by the kind of device, on machines without one: torch is made to answer as with two GPUs."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm_snp.core import moments
from llm_snp.core.stopwatch import Stopwatch
from llm_snp.errors import OptionError
from llm_snp.evaluation import clock, harness, speed, widths
from llm_snp.system.device import device_facts, resolve_device, resolve_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """There are two GPUs, it seems; what was asked of them."""
    found: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            found.append("record")

        def elapsed_time(self, end: Event) -> float:
            return 250.0  # ms

    @contextmanager
    def device(where: torch.device) -> Any:
        found.append(where)
        yield

    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_name": lambda where: f"GPU {where.index}",
        "synchronize": lambda: found.append("synchronize"),
        "Event": Event,
        "device": device,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return found


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    ("name", "index", "expected"),
    [("auto", 0, "cuda"), ("auto", 1, "cuda:1"), ("cuda", 1, "cuda:1"), ("cuda:0", 1, "cuda:0"), ("cpu", 1, "cpu")],
)
def test_which_gpu(name: str, index: int, expected: str) -> None:
    assert resolve_device(name, index) == torch.device(expected)


@pytest.mark.usefixtures("asked")
def test_a_gpu_that_is_not_there() -> None:
    for name, index in (("cuda:2", 0), ("auto", 2)):
        with pytest.raises(OptionError, match="cuda:2 was asked for, but torch sees 2 CUDA devices"):
            resolve_device(name, index)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto", 1) == CPU


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_type_to_compute_in(stored: torch.dtype) -> None:
    assert resolve_dtype("auto", CPU, stored) == torch.float32
    assert resolve_dtype("auto", GPU, stored) == stored
    for name in ("float16", "bfloat16", "float32"):
        assert resolve_dtype(name, GPU, stored) == resolve_dtype(name, CPU, stored) == getattr(torch, name)


def test_float64_is_computed_in_float32() -> None:
    assert resolve_dtype("auto", GPU, torch.float64) == resolve_dtype("auto", CPU, torch.float64) == torch.float32


@pytest.mark.usefixtures("asked")
def test_facts() -> None:
    facts = device_facts(GPU, torch.bfloat16)
    assert (facts["name"], facts["type"], facts["dtype"]) == ("GPU 1", "cuda", "bfloat16")
    assert device_facts(CPU, torch.float32)["type"] == "cpu"


def test_a_gpu_is_timed_by_its_own_events(asked: list[Any]) -> None:
    """Which are recorded on it, around nothing but the action."""
    assert clock.timed(lambda: asked.append("action") or 7, GPU) == (7, 0.25)
    assert asked == [GPU, "synchronize", "record", "action", "record", "synchronize"]
    asked.clear()
    assert clock.timed(lambda: 7, CPU)[0] == 7
    assert asked == []


def test_the_stopwatch_waits_for_a_gpu(asked: list[Any]) -> None:
    with Stopwatch() as watch, watch.phase("order"):
        asked.append("order")
    assert asked == ["synchronize", "order", "synchronize"]


def test_the_random_numbers_of_the_device_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []

    @contextmanager
    def fork_rng(devices: list[torch.device]) -> Any:
        kept.append(devices)
        yield

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    for device in (GPU, CPU):
        with harness.own_random_numbers(device):
            pass
    assert kept == [[GPU], []]


@pytest.mark.parametrize(
    ("device", "dtype", "noted"),
    [(GPU, torch.float16, True), (GPU, torch.bfloat16, True), (GPU, torch.float32, False), (CPU, torch.float16, False)],
)
def test_odd_head_dimensions_matter_to_flash_attention(device: torch.device, dtype: torch.dtype, noted: bool) -> None:
    result: dict[str, Any] = {"notes": []}
    speed._add_widths(result, None, [16, 12], device, dtype)
    assert [note.startswith("head dimensions of 12 are no multiples of 8") for note in result["notes"]] == [
        True
    ] * noted


def test_more_widths_are_tried_on_a_gpu() -> None:
    mlp = widths.Mlp((1001, 901), 64, 1)
    tried = {}
    for kind in ("cpu", "cuda"):
        tried[kind] = set(widths.WidthTiming(mlp, torch.device(kind), torch.float16, 1, 8, 2).candidates)
    assert tried == {"cpu": {1, *widths.MULTIPLES}, "cuda": {1, *widths.CUDA_MULTIPLES}}


@pytest.mark.parametrize(
    ("cuda", "dtype", "gives", "short"),
    [
        (True, torch.float16, True, True),
        (True, torch.bfloat16, True, True),
        (True, torch.float32, True, False),
        (True, torch.float16, False, False),
        (False, torch.float16, True, False),
    ],
)
def test_what_is_left_to_matrix_units(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, dtype: torch.dtype, gives: bool, short: bool
) -> None:
    monkeypatch.setattr(moments, "_gives_sums", lambda device, dtype: gives)
    x: Any = SimpleNamespace(is_cuda=cuda, dtype=dtype, device=GPU)
    assert moments._by_matrix_units(x) == short
