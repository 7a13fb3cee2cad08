"""The processes of a run, as `torchrun` or `accelerate launch` started them; one process is the same code path.

Each owns a share of the calibration windows. Sums over windows cross, and what the main process alone does (solving,
reading and writing the result) is sent to the others.
"""

from __future__ import annotations

import atexit
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from ..errors import OptionError, ProcessError, SnpError
from .libraries import out_of_memory

T = TypeVar("T")
# While the main process solves, the others wait in a collective; a process that dies is noticed at once all the same.
PATIENCE = timedelta(hours=2)
# What backends say of a process that is gone.
LOST = re.compile(r"gloo|nccl|connection|socket|peer", re.IGNORECASE)


class Processes:
    """This process among `count`; `index` 0 is the main one.

    Every method but `share` is a collective: all processes call it, in the same order. Raises `ProcessError` if one
    of them is gone. As a context it lets the others go if an error leaves it.
    """

    def __init__(self, cpu: bool = False):
        """Join the processes that the environment names (RANK, WORLD_SIZE, ...); without any this is the only one.

        They stay joined until this process ends, because a group cannot be made twice. One that is there already is
        used, and left as it is. Raises `OptionError` if the environment names some, but not which of them this is.
        """
        self.count, self.index, self.local_index = 1, 0, 0
        self._made = False  # whether the group is ours
        asked = os.environ.get("WORLD_SIZE", "1")
        if asked == "1":
            return
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing or not asked.isdecimal():
            raise OptionError(
                f"the environment has WORLD_SIZE={asked}, but not {' and '.join(missing) or 'as a number'}; start "
                "several processes with torchrun or accelerate launch, and one without WORLD_SIZE"
            )
        self._made = not dist.is_initialized()
        with _one_lost(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # accelerate warns where it sets the number of threads
            state = PartialState(cpu=cpu, timeout=PATIENCE)
        if state.num_processes > 1 and not dist.is_initialized():
            raise ProcessError("the processes of this run parted after an error; start them again")
        self.count, self.index = state.num_processes, state.process_index
        self.local_index = state.local_process_index
        if self._made:
            atexit.register(_part)
        # One that ends at once, as with bad input, must not do so while others are still connecting: they would hang.
        self.gather([])

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an error here the others must not wait for this process, even if it lives on."""
        if value is None or not self._made:
            return
        # NCCL would wait for the others when it parts from them; they are ended by what started them.
        atexit.unregister(_part)
        if dist.is_initialized() and dist.get_backend() == dist.Backend.GLOO:
            _part()

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
        """What `make` gives on the main process, on all; a small picklable object. What it raises, all raise."""
        return self._told(*self._try(make))  # type: ignore[return-value]

    def on_main(self, make: Callable[[], T]) -> T | None:
        """What `make` gives on the main process, there; None on the others. An `SnpError` that it raises, all raise."""
        made, error = self._try(make)
        self._told(None, error)
        return made

    def _try(self, make: Callable[[], T]) -> tuple[T | None, SnpError | None]:
        if not self.main:
            return None, None
        try:
            return make(), None
        except SnpError as error:
            return None, error

    def _told(self, made: T | None, error: SnpError | None) -> T | None:
        """What the main process has made, on all, or the error that it met."""
        if self.count > 1:
            with _one_lost():
                made, error = broadcast_object_list([(made, error)])[0]
        if error is not None:
            error.from_main = not self.main
            raise error
        return made

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

    @contextmanager
    def watched(self) -> Iterator[None]:
        """For collectives of a library: what they raise when a process is gone becomes `ProcessError`."""
        try:
            yield
        except (RuntimeError, ConnectionError) as error:
            if self.count == 1 or not LOST.search(str(error)):
                raise
            with _one_lost():
                raise

    def gather(self, objects: list[Any]) -> list[Any]:
        """The lists of all processes, one behind the other, on all."""
        if self.count == 1:
            return objects
        with _one_lost():
            return gather_object(objects)  # type: ignore[no-any-return]


def _part() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _one_lost() -> Iterator[None]:
    """Turn what the backends raise when a process is gone into `ProcessError`."""
    try:
        yield
    except (RuntimeError, ConnectionError) as error:
        if out_of_memory(error):
            raise
        raise ProcessError(
            f"another process of this run has ended or cannot be reached ({_reason(error)}); its own message, if any, "
            "is above"
        ) from error


def _reason(error: BaseException) -> str:
    """The first sentence of what a backend says, without the place in its source."""
    text = re.sub(r"^\[\S+:\d+\] ", "", str(error).strip())
    return re.split(r"\.\s|\n", text)[0][:200] or type(error).__name__
