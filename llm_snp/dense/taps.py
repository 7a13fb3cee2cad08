"""Taps into a running block: what named submodules read and give."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor, nn


class _Enough(Exception):
    """Raised inside a block, and caught where it was tapped, when everything that was asked for is known."""


class Taps:
    """Inputs and outputs of named submodules while a block runs.

    with Taps(block, inputs=["fc2"]) as taps: run the block, then read taps.input("fc2"), (tokens, width).
    `inputs` and `outputs` hold the tensors themselves, which are part of the autograd graph; `arguments` all that was
    given by position.

    With `stop` the block ends as soon as all of them are known, and so does the body of the `with`: what comes after
    the attention's consumer, two thirds of a block, is not computed for the attention's moments.
    """

    def __init__(self, block: nn.Module, inputs: Iterable[str] = (), outputs: Iterable[str] = (), stop: bool = False):
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.arguments: dict[str, tuple[Tensor, ...]] = {}
        self._block, self._in, self._out, self._stop = block, tuple(inputs), tuple(outputs), stop
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def input(self, name: str) -> Tensor:
        """Input of a submodule, flattened to (tokens, width)."""
        return self.inputs[name].flatten(0, -2)

    def output(self, name: str) -> Tensor:
        """Output of a submodule, flattened to (tokens, width)."""
        return self.outputs[name].flatten(0, -2)

    def _seen(self) -> None:
        if self._stop and len(self.inputs) == len(set(self._in)) and len(self.outputs) == len(set(self._out)):
            raise _Enough

    def __enter__(self) -> Taps:
        for name in self._in:

            def before(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                self.inputs[name], self.arguments[name] = args[0], args
                self._seen()

            self._hooks.append(self._block.get_submodule(name).register_forward_pre_hook(before))
        for name in self._out:

            def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                self.outputs[name] = output
                self._seen()

            self._hooks.append(self._block.get_submodule(name).register_forward_hook(after))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> bool:
        for hook in self._hooks:
            hook.remove()
        return kind is _Enough
