"""The processes of a run, as `torchrun` or `accelerate launch` started them; one process is the same code path.

Each owns a share of the calibration windows. Sums over windows cross, and what the main process alone does (solving,
reading and writing the result) is sent to the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from .errors import ProcessError

T = TypeVar("T")
# While the main process solves, the others wait in a collective; a process that dies is noticed at once all the same.
PATIENCE = timedelta(hours=2)


class Processes:
    """This process among `count`; `index` 0 is the main one.

    Every method but `share` is a collective: all processes call it, in the same order. Raises `ProcessError` if one
    of them is gone.
    """

    def __init__(self, cpu: bool = False):
        """Join the processes that the environment names (RANK, WORLD_SIZE, ...); without any this is the only one."""
        self.count, self.index, self.local_index = 1, 0, 0
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            with _one_lost():
                state = PartialState(cpu=cpu, timeout=PATIENCE)
            self.count, self.index = state.num_processes, state.process_index
            self.local_index = state.local_process_index

    @property
    def main(self) -> bool:
        return self.index == 0

    def share(self, items: int) -> range:
        """This process's part of `items` things in a row; parts differ by at most one."""
        each, more = divmod(items, self.count)
        start = self.index * each + min(self.index, more)
        return range(start, start + each + (self.index < more))

    def sum(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes, in place."""
        if self.count > 1:
            with _one_lost():
                dist.all_reduce(tensor)

    def same(self, tensor: Tensor) -> None:
        """Overwrite a tensor by that of the main process, in place."""
        if self.count > 1:
            with _one_lost():
                dist.broadcast(tensor, 0)

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` gives on the main process, on all; a small picklable object."""
        made = make() if self.main else None
        if self.count > 1:
            with _one_lost():
                made = broadcast_object_list([made])[0]
        return made  # type: ignore[return-value]

    def tensors_from_main(self, tensors: Mapping[str, Tensor] | None, device: torch.device) -> dict[str, Tensor]:
        """Tensors by name (host) of the main process, on all; they travel by way of `device`."""
        if self.count == 1:
            assert tensors is not None
            return dict(tensors)
        kinds = self.from_main(lambda: {name: (t.shape, t.dtype) for name, t in (tensors or {}).items()})
        found: dict[str, Tensor] = {}
        for name, (shape, dtype) in kinds.items():
            here = torch.empty(shape, dtype=dtype, device=device)
            if self.main:
                assert tensors is not None
                here.copy_(tensors[name])
            self.same(here)
            found[name] = here.cpu()
        return found

    def gather(self, objects: list[Any]) -> list[Any]:
        """The lists of all processes, one behind the other, on all."""
        if self.count == 1:
            return objects
        with _one_lost():
            return gather_object(objects)  # type: ignore[no-any-return]

    def leave(self) -> None:
        """Part from the others at the end of a run."""
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _one_lost() -> Iterator[None]:
    """Turn what the backends raise when a process is gone into `ProcessError`."""
    try:
        yield
    except (RuntimeError, ConnectionError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise ProcessError(
            f"another process of this run has ended or cannot be reached ({reason}); its own message, if any, is above"
        ) from error
