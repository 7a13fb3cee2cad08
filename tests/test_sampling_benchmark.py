"""benchmarks/sampling.py: which function of llm_snp a stack is in, and the seconds of each."""

from __future__ import annotations

import sys
import time
from types import FrameType

import pytest
import torch
from launches import REST
from sampling import Sampling, place

from llm_snp.core import linalg
from llm_snp.core.stopwatch import timed


def test_places(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def look(matrix: torch.Tensor) -> tuple[torch.Tensor]:
        frame: FrameType = sys._getframe()
        seen.extend([place(frame), place(frame.f_back)])
        return (matrix,)

    linalg.decomposed(look, torch.eye(2))
    assert seen[0].startswith("core/linalg.py:decomposed > ")
    assert seen[0].endswith("look")
    assert seen[1] == "core/linalg.py:decomposed"
    assert place(None) == place(sys._getframe()) == "outside"


def test_seconds_of_each_phase() -> None:
    with Sampling() as sampling:
        with timed("order"):
            linalg.decomposed(lambda matrix: time.sleep(0.3) or (matrix,), torch.eye(2))
        time.sleep(0.2)
    # A look may fall on the way in or out, and a busy machine sleeps longer than it was asked to.
    inside = {where: seconds for (phase, where), seconds in sampling.found.items() if phase == "order"}
    where = max(inside, key=lambda name: inside[name])
    assert where.startswith("core/linalg.py:decomposed > ")
    assert inside[where] > 0.25
    assert sampling.found[REST, "outside"] > 0.15
