"""benchmarks/launches.py: phases, kernels and idle shares, of made-up events and of torch's profiler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import launches
import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from llm_snp.core import elimination
from llm_snp.core.stopwatch import timed


def test_idle_shares() -> None:
    """Nested phases, kernels at the same time, over a border, within another, in no phase."""
    phases = [("rest", (0.0, 100.0)), ("order", (10.0, 60.0)), ("forward", (20.0, 30.0)), ("order", (70.0, 80.0))]
    kernels = [
        (2.0, 4.0),  # rest
        (12.0, 16.0),
        (13.0, 18.0),  # order, six together
        (14.0, 15.0),
        (25.0, 35.0),  # five in forward, where it began, and five in order
        (72.0, 77.0),
        (95.0, 110.0),  # goes on when all is over
        (120.0, 130.0),
    ]
    found = launches.busy(phases, reversed(kernels))
    micro = {name: tuple(1e6 * p[kind] for kind in ("seconds", "running")) for name, p in found.items()}
    assert micro == {
        "rest": pytest.approx((40.0, 7.0)),
        "order": pytest.approx((50.0, 16.0)),
        "forward": pytest.approx((10.0, 5.0)),
    }
    assert {name: p["kernels"] for name, p in found.items()} == {"rest": 2, "order": 4, "forward": 1}
    assert found["order"]["idle"] == pytest.approx(1 - 16 / 50)


def test_a_kernel_longer_than_those_after_it() -> None:
    found = launches.busy([("a", (0.0, 10.0)), ("b", (10.0, 20.0))], [(1.0, 15.0), (2.0, 3.0), (12.0, 14.0)])
    assert [1e6 * found[name]["running"] for name in "ab"] == pytest.approx([9.0, 5.0])


def event(name: str, start: float, end: float, device: DeviceType = DeviceType.CUDA) -> Any:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=device)


def test_what_is_a_kernel_and_what_a_phase() -> None:
    events = [
        event("phase: order", 0.0, 10.0, DeviceType.CPU),
        event("phase: order", 2.0, 9.0),  # the device's own view of the same
        event("aten::mm", 1.0, 2.0, DeviceType.CPU),
        event("cudaLaunchKernel", 1.0, 2.0, DeviceType.CPU),
        event("sm90_gemm", 2.0, 5.0),
        event("Memcpy HtoD (Pinned -> Device)", 4.0, 8.0),
        event("Memset (Device)", 8.0, 9.0),
    ]
    assert launches.ranges(events) == ([("order", (0.0, 10.0))], [(2.0, 5.0)])


def test_the_phases_of_a_profile() -> None:
    """As torch's profiler has them; operations of the CPU stand in for kernels."""
    a = torch.randn(128, 128)
    with launches.Busy() as watch:
        with timed("outer"):
            _ = a @ a
            with timed("inner"):
                _ = a @ a, a @ a
        _ = a @ a
    assert watch.found.keys() == {"rest", "outer", "inner"}
    assert all(p["idle"] == 1.0 and p["seconds"] > 0.0 for p in watch.found.values())
    events = watch._profile.events()
    products = [event("mm", e.time_range.start, e.time_range.end) for e in events if e.name == "aten::mm"]
    phases, _ = launches.ranges(events)
    found = launches.busy(phases, launches.ranges(products)[1])
    assert {name: p["kernels"] for name, p in found.items()} == {"rest": 1, "outer": 1, "inner": 2}
    assert all(0.0 < p["idle"] < 1.0 for p in found.values())


def test_a_profile_without_phases_has_none() -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        torch.ones(2).sum()
    assert launches.busy(*launches.ranges(profiled.events())) == {}


def test_kernels_reads_and_units() -> None:
    x = torch.randn(40, 12, dtype=torch.float64)
    h, e = torch.linalg.inv(x.mT @ x), x.mT @ x
    with launches.Launches() as counted:
        with timed("order"):
            elimination.eliminate(h, e)
        with timed("moments"):
            y = x.view(20, 24).mT + 1.0
        y.sum().item()
    assert counted.units == 12
    assert counted.kernels["elimination"] > 12 * 11
    assert counted.kernels["order"] == 3  # two copies, and what is below zero
    assert counted.kernels["moments"] == 1
    assert (counted.kernels["rest"], counted.reads) == (1, {"rest": 1})
    before = dict(counted.kernels)
    elimination.eliminate(h, e)
    assert counted.kernels == before
