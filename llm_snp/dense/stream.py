"""Hidden states of all token windows, moved through the model one block at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..system.processes import Processes
from .skeleton import Call, Skeleton, run_block, same_calls
from .storage import Storage
from .transfers import Transfers

# Tokens that go through a block at once, and on devices of other kinds.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
OTHER_BATCH_TOKENS = 4096
# Batches that wait on a GPU beside the one that is computed: the next one of the pruned and of the dense stream, and
# the last result.
WAITING = 3


class Stream:
    """The hidden states (N, T, d) of this process's windows before some block, in the computing dtype.

    Where they are, the storage knows; where that is not the GPU that computes, they come and go while it does.

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
        self.batch = windows_at_once(skeleton.device, windows.shape[1])
        self.calls: dict[int, list[Call]] = {}
        with skeleton.outer_weights():
            width = skeleton.enter(windows[:1, :1])[0].shape[-1]
            self._states = self.storage.empty((*self.tokens.shape, width), skeleton.dtype)
            self._transfers = transfers(self._states, skeleton.device)
            for rows in self.rows():
                hidden, calls = skeleton.enter(self.tokens[rows])
                known = self.calls.setdefault(hidden.shape[0], calls)
                if not same_calls(known, calls):
                    raise UnsupportedModelError(
                        "the arguments of this model's blocks depend on the text; cannot stream it"
                    )
                self.put(rows, hidden)

    @property
    def states(self) -> Tensor:
        """All hidden states where they are kept, when all that was put there has arrived."""
        if self._transfers is not None:
            self._transfers.settle()
        return self._states

    def copy(self) -> Stream:
        """A second stream that starts where this one is."""
        other = copy.copy(self)
        other._states = self.storage.empty(tuple(self._states.shape), self._states.dtype).copy_(self.states)
        return other

    def rows(self) -> Iterator[slice]:
        """The windows of each batch."""
        for start in range(0, self.tokens.shape[0], self.batch):
            yield slice(start, min(start + self.batch, self.tokens.shape[0]))

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """For each batch: its windows, and their hidden states (B, T, d) on the device; the next ones are on their way.

        Where the device has them anyhow, it is a part of `states`.
        """
        parts = (self._states[rows] for rows in self.rows())
        if self._transfers is None:
            here: Iterable[Tensor] = (part.to(self.skeleton.device) for part in parts)
        else:
            here = self._transfers.bring(parts)
        yield from zip(self.rows(), here, strict=True)

    def batches(self, index: int) -> Iterator[tuple[slice, Tensor, Call]]:
        """For each batch: its windows, their hidden states (B, T, d) on the device, and the call of block `index`."""
        for rows, hidden in self.parts():
            yield rows, hidden, self.calls[hidden.shape[0]][index]

    def put(self, rows: slice, hidden: Tensor) -> None:
        """Replace the hidden states of windows that `parts` or `batches` has given; (B, T, d) is not changed after."""
        if self._transfers is None:
            self._states[rows] = hidden
        else:
            self._transfers.send(hidden, self._states[rows])

    @torch.no_grad()
    def advance(self, index: int, block: nn.Module) -> None:
        """Move all hidden states through block `index`."""
        for rows, hidden, call in self.batches(index):
            self.put(rows, run_block(block, hidden, call))


def windows_at_once(device: torch.device, length: int) -> int:
    """How many windows of `length` tokens go through a block at once."""
    return max(1, BATCH_TOKENS.get(device.type, OTHER_BATCH_TOKENS) // length)


def transfers(states: Tensor, device: torch.device) -> Transfers | None:
    """What moves hidden states to a CUDA device that does not have them."""
    return Transfers(device) if device.type == "cuda" and states.device.type == "cpu" else None
