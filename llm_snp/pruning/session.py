"""What every pass over the model shares: the model, the windows, the options, and where things are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..config import PruneConfig
from ..dense.skeleton import Skeleton
from ..dense.storage import Storage
from ..dense.stream import Stream
from ..families import Family, Site
from ..system.journal import Journal
from ..system.processes import Processes
from ..system.progress import Progress


@dataclass(frozen=True)
class Session:
    """skeleton: the dense model; tokens: all calibration windows (N, T), of which each process streams its share."""

    skeleton: Skeleton
    family: Family
    config: Any
    options: PruneConfig
    tokens: Tensor
    processes: Processes
    storage: Storage
    journal: Journal
    progress: Progress

    @property
    def sites(self) -> tuple[Site, ...]:
        """What is pruned in each block, in this order."""
        return self.family.prunable(self.config, self.options.attention)

    def stream(self, windows: int | None = None) -> Stream:
        """The hidden states of this process's share of the first `windows` windows (all), before the first block."""
        return Stream(self.skeleton, self.tokens[:windows], self.processes, self.storage)
