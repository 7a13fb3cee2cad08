"""Hidden states of all token windows, moved through the model one block at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..system.processes import Processes
from .skeleton import Call, Skeleton, run_block, same_calls
from .storage import Storage

# Tokens that go through a block at once.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


class Stream:
    """The hidden states (N, T, d) of this process's windows before some block, in the computing dtype.

    Where they are, the storage knows.

    windows (M, T) long: those of all processes; tokens (N, T): this process's share, from window `first` on. Windows
    are unpadded and equally long, so what a block is called with depends only on the number of windows in the batch;
    that is checked, and another model is refused with `UnsupportedModelError`.
    """

    def __init__(
        self, skeleton: Skeleton, windows: Tensor, processes: Processes | None = None, storage: Storage | None = None
    ):
        self.skeleton, self.windows = skeleton, windows
        self.processes = processes or Processes()
        self.storage = storage or Storage()
        share = self.processes.share(windows.shape[0])
        self.first, self.tokens = share.start, windows[share.start : share.stop]
        self.batch = max(1, BATCH_TOKENS.get(skeleton.device.type, 4096) // windows.shape[1])
        self.calls: dict[int, list[Call]] = {}
        with skeleton.outer_weights():
            width = skeleton.enter(windows[:1, :1])[0].shape[-1]
            self.states = self.storage.empty((*self.tokens.shape, width), skeleton.dtype)
            for rows in self.rows():
                hidden, calls = skeleton.enter(self.tokens[rows])
                known = self.calls.setdefault(hidden.shape[0], calls)
                if not same_calls(known, calls):
                    raise UnsupportedModelError(
                        "the arguments of this model's blocks depend on the text; cannot stream it"
                    )
                self.states[rows] = hidden

    def copy(self) -> Stream:
        """A second stream that starts where this one is."""
        other = copy.copy(self)
        other.states = self.storage.empty(tuple(self.states.shape), self.states.dtype).copy_(self.states)
        return other

    def rows(self) -> Iterator[slice]:
        """The windows of each batch."""
        for start in range(0, self.tokens.shape[0], self.batch):
            yield slice(start, min(start + self.batch, self.tokens.shape[0]))

    def batches(self, index: int) -> Iterator[tuple[slice, Tensor, Call]]:
        """For each batch: its windows, their hidden states (B, T, d) on the device, and the call of block `index`."""
        for rows in self.rows():
            hidden = self.states[rows].to(self.skeleton.device, non_blocking=True)
            yield rows, hidden, self.calls[hidden.shape[0]][index]

    @torch.no_grad()
    def advance(self, index: int, block: nn.Module) -> None:
        """Move all hidden states through block `index`."""
        for rows, hidden, call in self.batches(index):
            self.states[rows] = run_block(block, hidden, call)
