"""What ranking all units greedily costs, next to one Cholesky factorisation and next to removal one by one.

    OMP_NUM_THREADS=1 python benchmarks/elimination.py [--units 4096] [--naive-units N] [--runs 3] [--json FILE]

`--order greedy` is affordable because `llm_snp.core.elimination.eliminate` delays its updates in panels: all units
are ranked by their exact cost at a small multiple of the factorisation that the repair needs anyway. The usual
implementations of optimal brain surgeon update two full matrices after each removal instead, and therefore remove
several units at a time or only part of them. All three are timed here on the same matrix, on one thread in float64;
the goal is at most 15 factorisations, and at least 10 times faster than one by one.
The matrix is the covariance of ReLU activations with a power-law spectrum behind them, as in a trained fc1.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from llm_snp.core.elimination import COMPACT_AT, PANEL_COLUMNS, eliminate
from llm_snp.core.linalg import damped_cholesky

DAMPING = 1e-3
T = TypeVar("T")


def activations_covariance(units: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Damped covariance (m, m) of m ReLU units fed by m / 4 features, and W (m / 4, m); float64."""
    g = torch.Generator().manual_seed(seed)
    width = max(1, units // 4)
    spectrum = torch.arange(1, width + 1).pow(-0.5)
    features = torch.randn(2 * units, width, generator=g) * spectrum
    hidden = features @ torch.randn(width, units, generator=g)
    active = torch.relu(hidden - 0.7 * hidden.std(0)) * torch.randn(units, generator=g).mul(0.5).exp()
    covariance = active.mT.cov(correction=0).double()
    covariance.diagonal().add_(DAMPING * covariance.diagonal().mean())
    return covariance, torch.randn(width, units, generator=g).double()


def one_by_one(inverse: Tensor, energy: Tensor, removals: int, compact_at: float) -> tuple[Tensor, Tensor]:
    """The same ranking with both matrices updated in place after each removal.

    As fast as it gets without panels: each matrix is passed over once per removal, rank one and rank two, the updates
    need no copies and nothing is read back. compact_at 0: on the full matrices to the end; otherwise removed columns
    are taken out as `eliminate` does it. Returns the first `removals` units removed, and their increments.
    """
    h, e = inverse.clone(), energy.clone()
    present = torch.arange(len(h))
    gone = torch.zeros(len(h), dtype=torch.bool)
    removed, increments = torch.empty(removals, dtype=torch.long), h.new_empty(removals)
    for j in range(removals):
        score = (e.diagonal() / h.diagonal()).masked_fill_(gone, torch.inf)
        unit = score.argmin().view(1)
        removed[j : j + 1] = present[unit]
        increments[j : j + 1] = score[unit]
        gone.index_fill_(0, unit, True)
        h_row, e_row = h.index_select(0, unit), e.index_select(0, unit)
        k = h_row / h_row.index_select(1, unit)
        q = e_row.addmm_(e_row.index_select(1, unit), k, alpha=-0.5)
        h.addr_(h_row[0], k[0], alpha=-1)
        e.addmm_(torch.cat([q, k]).mT, torch.cat([k, q]), alpha=-1)
        left = len(inverse) - j - 1
        if 0 < left <= compact_at * len(h):
            keep = (~gone).nonzero().squeeze(1)
            present, gone = present[keep], gone[keep]
            h, e = (matrix[keep.view(-1, 1), keep] for matrix in (h, e))
    return removed, increments


def one_by_one_work(units: int, removals: int, compact_at: float) -> int:
    """Matrix entries that `one_by_one` passes over."""
    size, entries = units, 0
    for j in range(removals):
        entries += size * size
        left = units - j - 1
        if left <= compact_at * size:
            size = left
    return entries


def timed(call: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=4096, help="size of the matrix")
    parser.add_argument("--naive-units", type=int, help="removals one by one (default: all); fewer are extrapolated")
    parser.add_argument("--runs", type=int, default=3, help="medians are over so many; one by one runs once")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    options = parser.parse_args()
    torch.set_num_threads(1)

    units = options.units
    naive_units = min(units, options.naive_units or units)
    covariance, weight = activations_covariance(units)
    factor, used = damped_cholesky(covariance, 0.0)
    assert used == 0.0
    inverse, energy = torch.cholesky_inverse(factor), weight.mT @ weight

    torch.linalg.cholesky(covariance)
    eliminate(inverse[:512, :512], energy[:512, :512])
    cholesky_times, blocked_times = [], []
    for _ in range(options.runs):  # in turns, so that a slow minute of the machine hits both
        cholesky_times.append(timed(lambda: torch.linalg.cholesky(covariance))[0])
        seconds, (removed, increments) = timed(lambda: eliminate(inverse, energy))
        blocked_times.append(seconds)
        cholesky_times.append(timed(lambda: torch.linalg.cholesky(covariance))[0])
    naive = {}
    for how, compact_at in (("on full matrices", 0.0), ("compacted as well", COMPACT_AT)):
        call = partial(one_by_one, inverse, energy, naive_units, compact_at)
        seconds, (naive_removed, naive_increments) = timed(call)
        work = one_by_one_work(units, units, compact_at) / one_by_one_work(units, naive_units, compact_at)
        naive[how] = seconds * work

    cholesky, blocked = statistics.median(cholesky_times), statistics.median(blocked_times)
    same = (removed[:naive_units] == naive_removed).double().mean().item()
    half = naive_units // 2
    same_half = len(set(removed[:half].tolist()) & set(naive_removed[:half].tolist())) / max(1, half)
    difference = ((increments[:naive_units] - naive_increments) / naive_increments).abs().max().item()
    whole = increments.sum().item() / (energy * covariance).sum().item() - 1
    rows = [("one Cholesky factorisation", cholesky), (f"all units, panels of {PANEL_COLUMNS}", blocked)]
    rows += [(f"one by one, {how}", seconds) for how, seconds in naive.items()]

    print(f"{units} units, float64, one thread of {cpu()}, torch {torch.__version__}, median of {options.runs}\n")
    width = max(len(name) for name, _ in rows)
    print(f"{'':{width}} {'seconds':>9} {'/ Cholesky':>11} {'/ panels':>10}")
    for name, seconds in rows:
        print(f"{name:{width}} {seconds:9.3f} {seconds / cholesky:11.1f} {seconds / blocked:10.2f}")
    if naive_units < units:
        print(f"One by one is EXTRAPOLATED from {naive_units} removals, by the matrix entries passed over.")
    print(f"\nSame unit at the same place: {same:.2%} of {naive_units}; same first half: {same_half:.2%}.")
    print(f"Increments differ by at most {difference:.1e} of each; their sum is tr(M C) to {abs(whole):.1e}.")
    if options.json:
        result = {
            "units": units,
            "runs": options.runs,
            "cpu": cpu(),
            "torch": torch.__version__,
            "panel": PANEL_COLUMNS,
            "cholesky_seconds": cholesky_times,
            "blocked_seconds": blocked_times,
            "one_by_one_seconds": naive,
            "one_by_one_measured_removals": naive_units,
            "blocked_per_cholesky": blocked / cholesky,
            "one_by_one_per_blocked": {how: seconds / blocked for how, seconds in naive.items()},
            "same_unit_same_place": same,
            "same_first_half": same_half,
            "largest_increment_difference": difference,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def cpu() -> str:
    """The processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
