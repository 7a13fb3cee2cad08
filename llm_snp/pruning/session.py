"""What every pass over the model shares: the model, the windows, the options, and where things are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..config import PruneConfig
from ..dense.skeleton import Skeleton
from ..dense.storage import Storage
from ..dense.stream import Stream
from ..families import Family, Site, linear
from ..system.journal import Journal
from ..system.processes import Processes
from ..system.progress import Progress
from .kinds import sites_of

# What a repair follows of the dense residual stream is 1 / (1 + CHANCE q), q the parameters that all such repairs fit
# for each output and token. Set by one model and one q: SmolLM2, 30 %, 36 windows of 512, q = 3.4. There the mean loss
# over dense on three other texts was 0.57 nats with 0.4 of the correction (ridge 2e-2), 0.69 with all of it (1e-3) and
# 0.58 with none (target `self`, 0.1).
CHANCE = 0.5


@dataclass(frozen=True)
class Session:
    """skeleton: the model that is pruned; tokens: all calibration windows (N, T), of which each process streams its
    share.
    """

    skeleton: Skeleton
    family: Family
    config: Any
    options: PruneConfig
    tokens: Tensor
    processes: Processes
    storage: Storage
    journal: Journal
    progress: Progress

    def sites(self, index: int) -> tuple[Site, ...]:
        """What is pruned in a block, in this order."""
        return sites_of(self.family, self.config, self.options, index)

    def stream(self, windows: int | None = None) -> Stream:
        """The hidden states of this process's share of the first `windows` windows (all), before the first block."""
        return Stream(self.skeleton, self.tokens[:windows], self.processes, self.storage)

    def share(self, site: Site) -> float:
        """How much of its correction towards the dense residual stream a repair of `site` makes; 1 for other targets.

        All these repairs fit the same residual of the same tokens, one after the other: each leaves less of it on the
        calibration windows, of which a part is chance, and those parts add up to what is lost on other text. QEP
        (arXiv 2504.09629) halves the correction whatever the model and the text; here it is the smaller, the more
        inputs there are for the tokens.
        """
        if self.options.target != "residual" or site.stream is None:
            return 1.0
        inputs = sum(
            linear(block, other.consumer).in_features * len(other.members)
            for index, block in enumerate(self.skeleton.blocks)
            for other in self.sites(index)
            if other.stream is not None
        )
        return 1.0 / (1.0 + CHANCE * inputs / self.tokens.numel())
