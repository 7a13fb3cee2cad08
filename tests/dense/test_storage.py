"""Where hidden states are kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from llm_snp.dense import storage
from llm_snp.dense.storage import Storage, stays_on

GPU = torch.device("cuda:0")


@pytest.mark.parametrize(
    ("memory", "size", "stays"),
    [
        (80 << 30, 1 << 30, True),  # opt-1.3b: 128 windows of 2048 tokens
        (80 << 30, 5 << 29, False),  # opt-13b
        (24 << 30, 1 << 30, False),
        (24 << 30, 3 << 28, True),
        (24 << 30, (3 << 28) + 1, False),
    ],
)
def test_small_states_stay_on_the_gpu(monkeypatch: pytest.MonkeyPatch, memory: int, size: int, stays: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory))
    assert stays_on(GPU, size) == stays


def test_a_gpu_that_is_not_there_is_taken_to_be_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert stays_on(GPU, storage.STAYING)
    assert not stays_on(GPU, storage.STAYING + 1)


def test_what_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the GPU, or page-locked on the host for one, or plain."""
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(torch, "empty", lambda shape, **options: asked.append(options))
    for fits in (True, False):
        monkeypatch.setattr(storage, "stays_on", lambda gpu, size, fits=fits: fits)
        Storage(gpu=GPU).empty((2, 3), torch.float16)
    Storage().empty((2, 3), torch.float32)
    assert asked == [
        {"dtype": torch.float16, "device": GPU},
        {"dtype": torch.float16, "pin_memory": True},
        {"dtype": torch.float32, "pin_memory": False},
    ]
