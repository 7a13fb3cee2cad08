"""The figures of `--dry-run` against what a run does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LENGTH, SAMPLES, Prune, save, tiny_opt
from tiny_models import KNOWN, save_tiny
from torch.utils.flop_counter import FlopCounterMode

from llm_snp.config import PruneConfig
from llm_snp.core.stopwatch import Stopwatch, timed
from llm_snp.running.estimate import Estimate
from llm_snp.running.preview import preview

pytestmark = pytest.mark.cpu


class CountedPhases(Stopwatch):
    """Counts the operations of each phase instead of its seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        counter = FlopCounterMode(display=False)
        try:
            with counter:
                yield
        finally:  # a block that ends early is an exception
            self.operations[name] = self.operations.get(name, 0.0) + counter.get_total_flops()


def estimated(model: Path, **options: Any) -> Estimate:
    size: dict[str, Any] = {"samples": SAMPLES, "sequence_length": LENGTH, "device": "cpu"}
    return preview(PruneConfig(str(model), **(size | options))).estimate


CHOICES: list[dict[str, Any]] = [
    {"method": "best", "attention": "dims"},
    {"method": "best", "attention": "heads", "target": "self", "sensitivity": "scalar"},
    {"method": "best", "attention": "dims", "target": "self", "allocation": "uniform"},
    {"method": "best", "attention": "dims", "allocation": "uniform"},
    {"method": "snp", "allocation": "uniform"},
    {"method": "snp", "target": "dense", "allocation": "uniform"},
]


GROUPED = {"method": "best", "allocation": "uniform"}


@pytest.mark.parametrize(
    ("options", "grouped"),
    [*((options, False) for options in CHOICES), *((GROUPED | {"attention": m}, True) for m in ("dims", "queries"))],
    ids=lambda o: "-".join(map(str, o.values())) if isinstance(o, dict) else ("llama" if o else "opt"),
)
def test_operations_are_those_that_torch_counts(
    prune: Prune, tmp_path: Path, options: dict[str, Any], grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, backward and moments, as far as torch counts them: it does not know the CPU's fused attention."""
    # Low strips, as of a wide site: of a product of moments half is multiplied, as the formula has it.
    monkeypatch.setattr("llm_snp.core.linalg.STRIP_ROWS", 8)
    model = tmp_path / "model"
    save_tiny("llama-tied", model) if grouped else save(tiny_opt(ffn_dim=128), model)
    # Short windows, so that attention is little; one of eight dims or neurons goes, so that every block is pruned but
    # costs about what the dense one does.
    size: dict[str, Any] = {"samples": 96, "sequence_length": 4, "sparsity": 0.125}
    with CountedPhases() as counted:
        prune(model, tmp_path / "out", **size, **options)
    found = estimated(model, output=str(tmp_path / "other"), **size, **options).operations
    assert found["backward"] == pytest.approx(counted.operations.get("backward", 0.0), rel=0.2)
    if options.get("allocation") == "uniform":  # otherwise some blocks stay whole, and cost less
        for phase in ("forward", "moments"):
            assert found[phase] == pytest.approx(counted.operations[phase], rel=0.2), phase


@pytest.mark.skipif("mixtral" not in KNOWN, reason="this transformers does not have experts as they are needed")
@pytest.mark.parametrize("mode", ["neurons", "whole"])
def test_operations_of_a_mixture(prune: Prune, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those experts that work on a token; all of them, to rank them."""
    monkeypatch.setattr("llm_snp.core.linalg.STRIP_ROWS", 8)
    model = save_tiny("mixtral", tmp_path / "model")
    of: dict[str, Any] = {"samples": 96, "sequence_length": 4, "sparsity": 0.24, "attention": "none", "experts": mode}
    with CountedPhases() as counted:
        prune(model, tmp_path / "out", allocation="uniform", **of)
    found = estimated(model, output=str(tmp_path / "other"), allocation="uniform", **of).operations
    for phase in ("forward", "moments", *(["order"] if mode == "whole" else [])):
        assert found[phase] == pytest.approx(counted.operations[phase], rel=0.25), phase


def test_host_memory_grows_with_what_is_kept_in_it(dense: Path, tmp_path: Path) -> None:
    inside, outside = estimated(dense), estimated(dense, offload=str(tmp_path))
    states = 2 * SAMPLES * LENGTH * 32 * 4
    assert inside.host - outside.host == states
    assert outside.disk - inside.disk == states
    one, two = estimated(dense, target="self", sensitivity="relative"), estimated(dense, sensitivity="relative")
    assert two.host - one.host >= states / 2


def test_a_gpu_takes_the_blocks_from_the_host(dense: Path) -> None:
    options = PruneConfig(str(dense), samples=SAMPLES, sequence_length=LENGTH)
    cpu, cuda = (preview(options, torch.device(kind)).estimate for kind in ("cpu", "cuda"))
    assert cpu.device == 0
    assert cuda.device > 0
    assert cuda.host < cpu.host
    assert cuda.operations == cpu.operations


def test_hidden_states_that_stay_on_a_gpu_are_in_its_memory(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of others the next batch of two streams, and the last result."""
    options = PruneConfig(str(dense), samples=SAMPLES, sequence_length=LENGTH, dtype="float32")
    found = []
    for stays in (True, False):
        monkeypatch.setattr("llm_snp.running.estimate.stays_on", lambda gpu, size, stays=stays: stays)
        found.append(preview(options, torch.device("cuda")).estimate)
    states = 2 * SAMPLES * LENGTH * 32 * 4
    waiting = 3 * 16384 * 32 * 4
    assert found[0].device - found[1].device == states - waiting
    assert found[1].host - found[0].host == states


def test_the_stopwatch_gives_each_phase_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))

    @timed("inner")
    def inner() -> None:
        pass

    inner()  # nothing is running: nothing is measured
    with Stopwatch() as watch:
        with timed("outer"):
            inner()
        inner()
    assert watch.seconds == {"outer": (1.0 - 0.0) + (6.0 - 3.0), "inner": (3.0 - 1.0) + (15.0 - 10.0)}
