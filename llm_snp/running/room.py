"""Whether the disks have room for what a run writes, which is asked before the work."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from pathlib import Path

import torch

from ..dense.checkpoint import Checkpoint
from ..dense.data import Windows
from ..dense.skeleton import Skeleton
from ..documents.report import nodes
from ..families import linear
from ..pruning.job import Job
from ..result.carried import Carried
from ..system.output import check_space, same_disk
from .estimate import fisher_bytes, streams_of


class Room:
    """What the run `job` needs of the disk of its output and, if that is another one, of that of `offload`."""

    def __init__(self, job: Job, skeleton: Skeleton, dtype: torch.dtype, offload: Path | None):
        self.job, self.offload, self.blocks, self.itemsize = job, offload, len(skeleton), dtype.itemsize
        self.needed = 0  # by the result, as far as it is not written yet
        block = skeleton.blocks[0]
        self.widths = [linear(block, site.consumer).out_features for site in job.sites(0)]  # what each site writes

    def check(self, checkpoint: Checkpoint, carried: Carried, written: int) -> None:
        """The result is no larger than the dense model; `written` bytes of it are there from an interrupted run.

        Raises `OutputError` if there is too little room.
        """
        job = self.job
        needed = sum(file.stat().st_size for file in checkpoint.files) + sum(map(len, carried.files.values()))
        needed += fisher_bytes(job.options, self.widths, self.blocks) - written
        self.needed = needed
        check_space(job.output, needed)
        streams = streams_of(job.options, job.length, self.blocks, len(self.widths))
        self._check_states(job.options.samples * job.length, streams, "")

    def _check_states(self, tokens: int, streams: float, whose: str) -> None:
        """The hidden states that this machine holds, on the disk of `offload`, which may be that of the result."""
        if self.offload is None:
            return
        states = ceil(tokens * streams * max(self.widths) * self.itemsize / nodes())
        if same_disk(self.offload, self.job.output):
            what = f"the result and the hidden states{whose} need"
            check_space(self.offload, self.needed + states, what, "--offload")
        else:
            check_space(self.offload, states, f"the hidden states{whose} need", "--offload")

    def check_texts(self, evaluation: Mapping[str, Windows]) -> None:
        """The longest text that perplexity is measured on: that pass needs one stream on the disk of `offload`.

        The result is there by then, if the disk is the same. To be called after `check`. Raises `OutputError` if there
        is too little room.
        """
        if evaluation:
            tokens = max(windows.tokens.numel() for windows in evaluation.values())
            self._check_states(tokens, 1, " of a text to evaluate on")
