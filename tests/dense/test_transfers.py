"""Copies beside the computation, on simulated streams."""

from __future__ import annotations

import pytest
import torch
from simulated_streams import SIZE, Line, Machine, Simulated

from llm_snp.dense import stream
from llm_snp.dense.transfers import Transfers


def right(seed: int, ignored: str = "") -> bool:
    """Whether all is right after passes that replace everything, one that only reads, and one that ends early.

    One, two and six parts: what is sent last may be what is brought next.
    """
    return all(passes(parts, seed, ignored) for parts in (1, 2, 6))


def passes(parts: int, seed: int, ignored: str) -> bool:
    machine = Machine(seed, ignored)
    transfers = Simulated(machine)
    host = torch.arange(parts * SIZE, dtype=torch.float32).view(parts, SIZE)
    expected = 3 * (3 * host + 1) + 1
    for _ in range(2):
        for row, x in enumerate(transfers.bring(host)):
            transfers.send(machine.compute(lambda x: 3 * x + 1, x), host[row])
    transfers.settle()
    replaced = torch.equal(host, expected)
    seen = [machine.compute(lambda x: -x, x) for x in transfers.bring(host)]
    transfers.settle()
    host.fill_(7.0)
    abandoned = transfers.bring(host)
    next(abandoned)
    del abandoned
    later = [machine.compute(lambda x: x + 1, seen[0]) for _ in range(2)]
    machine.computing.synchronize()
    return replaced and torch.equal(torch.stack(seen), -expected) and all(torch.equal(y, seen[0] + 1) for y in later)


def test_whatever_runs_first() -> None:
    assert all(right(seed) for seed in range(150))


@pytest.mark.parametrize(
    "wait",
    [
        "arriving waits for leaving",
        "arriving waits for compute",
        "compute waits for event of arriving",
        "compute waits for arriving",
        "leaving waits for compute",
        "compute waits for event of leaving",
        "host waits for arriving",
        "host waits for leaving",
    ],
)
def test_no_wait_is_idle(wait: str) -> None:
    """Without it some order gives another result: the simulation would show one that is missing."""
    assert not all(right(seed, wait) for seed in range(150))


def test_copies_overlap_with_computing() -> None:
    """While a part is computed the next one may arrive and the last result leave, and nothing beyond them."""
    machine = Machine(0)
    machine.some = lambda: None  # type: ignore[method-assign]
    transfers = Simulated(machine)
    host = torch.zeros(6, SIZE)
    for row, x in enumerate(transfers.bring(host)):
        transfers.send(machine.compute(lambda x: x + 1, x), host[row])
    _, arriving, leaving = machine.lines

    def go(*lines: Line) -> None:
        while any(line.ready for line in lines):
            next(line for line in lines if line.ready).step()

    go(machine.computing, leaving)
    assert host.sum() == 0  # nothing has arrived
    go(arriving)  # the first two parts: the third waits for the first to be done
    go(machine.computing)
    go(arriving)
    assert host.sum() == 0
    go(leaving)
    assert host[0].sum() == SIZE
    assert host[2:].sum() == 0
    go(*machine.lines)
    assert host.sum() == 6 * SIZE


def test_only_a_gpu_that_does_not_have_them_is_brought_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "Transfers", lambda device: device)
    gpu, cpu, host = torch.device("cuda:0"), torch.device("cpu"), torch.zeros(1)
    assert stream.transfers(host, gpu) == gpu
    assert stream.transfers(host, cpu) is None
    assert stream.transfers(torch.zeros(1, device="meta"), gpu) is None  # they are where they are needed


def test_windows_at_once() -> None:
    lengths = (512, 2048, 16384, 20000)
    found = {kind: [stream.windows_at_once(torch.device(kind), n) for n in lengths] for kind in ("cpu", "cuda", "meta")}
    assert found == {"cpu": [4, 1, 1, 1], "cuda": [32, 8, 1, 1], "meta": [8, 2, 1, 1]}


def test_torch_has_what_is_asked_of_it() -> None:
    for name in ("wait_stream", "wait_event", "record_event", "synchronize"):
        assert callable(getattr(torch.cuda.Stream, name))
    assert callable(torch.cuda.current_stream)
    assert callable(torch.cuda.stream)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pinned", [True, False])
def test_on_a_gpu(pinned: bool) -> None:
    host = torch.arange(64 * 4096, dtype=torch.float32).view(64, 4096)
    host = host.pin_memory() if pinned else host
    expected = host * 8 + 7
    transfers = Transfers(torch.device("cuda", torch.cuda.current_device()))
    for _ in range(3):
        for row, x in enumerate(transfers.bring(host)):
            transfers.send(2 * x + 1, host[row])
    transfers.settle()
    assert torch.equal(host, expected)
