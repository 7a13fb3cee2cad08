"""Freed tensors leave the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from llm_snp.system.allocator import give_back_freed_memory

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024

if {set}:
    assert give_back_freed_memory()
for _ in range(3):  # the C library learns from what is freed
    tensors = [torch.ones(20 << 18) for _ in range(20)]  # 20 MB each
    pin = torch.ones(1 << 18)
    del tensors
kept = torch.ones(1)
print(resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of Linux's C library")
def test_memory_goes_back() -> None:
    used = {}
    for chosen in (False, True):
        done = subprocess.run([sys.executable, "-c", PROGRAM.format(set=chosen)], check=True, capture_output=True)
        used[chosen] = float(done.stdout)
    assert used[True] <= used[False] + 20
