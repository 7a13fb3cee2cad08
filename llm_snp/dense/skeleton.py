"""The model without its blocks: embeddings in front, final norm and head behind, everything between on `meta`.

The skeleton knows no family. It replaces each block by a recorder and runs the model's own forward once, which tells
what every block is called with (masks, positions); blocks are then loaded and run one at a time.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from ..core.stopwatch import timed
from ..errors import CheckpointError, UnsupportedModelError
from ..system.libraries import ONE_AT_A_TIME, explained
from .checkpoint import Checkpoint
from .claims import check_blocks, check_buffers, expected_tensors
from .experts import one_by_one

# Logits of so many positions at once: with a vocabulary of 50,000 a whole window of them is larger than a block.
HEAD_TOKENS = 512


@dataclass(frozen=True)
class Call:
    """What a block is called with besides the hidden states."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def same_calls(some: list[Call], others: list[Call]) -> bool:
    """Whether all tensors and values are equal. What several blocks share is compared once: a device has to answer."""
    seen: set[tuple[int, int]] = set()
    return all(
        _equal(a.args, b.args, seen) and _equal(a.kwargs, b.kwargs, seen) for a, b in zip(some, others, strict=True)
    )


def _equal(a: Any, b: Any, seen: set[tuple[int, int]]) -> bool:
    if isinstance(a, Tensor):
        if (id(a), id(b)) in seen:
            return True
        seen.add((id(a), id(b)))
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(_equal(a[key], b[key], seen) for key in a)
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(_equal, a, b, [seen] * len(a)))
    return a is b or bool(a == b)


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, Mapping):
        return {key: _on_meta(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_on_meta(item) for item in value)
    return value


class _Recorder(nn.Module):
    """Stands in for a block: notes its call and hands on the hidden states, or `output` where that is set."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        self.input: Tensor | None = None
        self.call = Call()
        self.output: Tensor | None = None
        self.returns_tuple: bool | None = None

    def __getattr__(self, name: str) -> Any:
        """Some models ask their blocks what kind of attention they have."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.input, self.call = hidden, Call(args, kwargs)
        if self.returns_tuple is None:
            # Whether a block returns a tensor or a tuple differs between families and versions: ask it, on meta.
            returned = self.block(hidden.to("meta"), *_on_meta(args), **_on_meta(kwargs))
            self.returns_tuple = isinstance(returned, tuple)
        result = hidden if self.output is None else self.output
        return (result,) if self.returns_tuple else result


@timed("forward")
def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """hidden (B, T, d) through one block, (B, T, d)."""
    output = block(hidden, *call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output


class Skeleton:
    """The outer weights and the blocks of a checkpoint, all on meta, loadable to `device` in `dtype` when needed.

    config: a transformers config; blocks_path: path of the decoder blocks in the causal-LM model; whole: config of the
    same model with blocks as they were before an earlier pruning, from which `load_block` narrows them (default: they
    are). `enter` and `leave` need the outer weights: call them inside `with skeleton.outer_weights()`. Between, only
    blocks are in memory.
    """

    def __init__(
        self,
        config: Any,
        blocks_path: str,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        whole: Any = None,
    ):
        self.config, self.device, self.dtype, self.checkpoint = config, device, dtype, checkpoint
        self.blocks_path = blocks_path
        check_blocks(config, checkpoint.names(), checkpoint.directory)
        claimed = empty_model(config)
        shapes, self.tied, harmless = expected_tensors(claimed)
        self.parameters = sum(parameter.numel() for parameter in claimed.parameters())
        tables = [name for name, buffer in claimed.named_buffers() if not buffer.is_floating_point()]
        checkpoint.audit(shapes, self.tied, harmless, tables)
        check_buffers(claimed, checkpoint.files)
        self.model: Any = empty_model(config, buffers=True)
        self.blocks, self._transposed = linear_blocks(self.model, blocks_path)
        self._whole = self.blocks if whole is None else linear_blocks(empty_model(whole, buffers=True), blocks_path)[0]
        inner = blocks_path + "."
        self.outer = [n for n in checkpoint.names() if n in shapes and n not in self.tied and not n.startswith(inner)]
        self._outer_users = 0
        self.recorders = [_Recorder(block) for block in self.blocks]
        _set_submodule(self.model, blocks_path, nn.ModuleList(self.recorders))
        for name, buffer in self.model.named_buffers():
            if not buffer.is_meta:
                set_module_tensor_to_device(self.model, name, device, value=buffer)
        self.model.eval().requires_grad_(False)

    def __len__(self) -> int:
        return len(self.blocks)

    @contextmanager
    def outer_weights(self) -> Iterator[None]:
        """Hold embeddings, final norm and head on the device."""
        if not self._outer_users:
            for name, tensor in self.checkpoint.tensors(self.outer):
                set_module_tensor_to_device(self.model, name, self.device, value=tensor, dtype=self.dtype)
            self.model.tie_weights()
            self.model.requires_grad_(False)
        self._outer_users += 1
        try:
            yield
        finally:
            self._outer_users -= 1
            if not self._outer_users:
                for name in self.outer:
                    set_module_tensor_to_device(self.model, name, "meta")
                self.model.tie_weights()

    def enter(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        """Token ids (B, T) to the hidden states before the first block (B, T, d) and the call of every block."""
        with torch.no_grad(), explained(_cannot_run):
            self.model.base_model(input_ids=ids.to(self.device), use_cache=False)
        first = self.recorders[0].input
        assert first is not None
        return first, [recorder.call for recorder in self.recorders]

    def features(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Hidden states after the last block (B, T, d) to those behind the final norm, which the head reads."""
        return self._behind_blocks(self.model.base_model, ids, hidden).last_hidden_state  # type: ignore[no-any-return]

    def leave(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Hidden states after the last block (B, T, d) to logits (B, T, vocabulary); differentiable in `hidden`.

        What follows the blocks treats every position alone: T may be any part of a window.
        """
        return self._behind_blocks(self.model, ids, hidden).logits  # type: ignore[no-any-return]

    def _behind_blocks(self, model: Any, ids: Tensor, hidden: Tensor) -> Any:
        """What a model, with its head or without, gives where `hidden` comes out of the last block."""
        self.recorders[-1].output = hidden
        found = model(input_ids=ids.to(self.device), use_cache=False)
        self.recorders[-1].output = None
        return found

    def block_states(self, order: Iterable[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Blocks and their tensors in the given order; the next one is read while the caller works on this one."""
        waiting = list(order)
        with ThreadPoolExecutor(1, "read-block") as reader:
            following = reader.submit(self.block_state, waiting[0]) if waiting else None
            for here, index in enumerate(waiting):
                assert following is not None
                with timed("load"):
                    state = following.result()
                following = reader.submit(self.block_state, waiting[here + 1]) if here + 1 < len(waiting) else None
                yield index, state
                del state

    def block_state(self, index: int) -> dict[str, Tensor]:
        """The tensors of a block, on the host in the dtype of the checkpoint, linear weights as (out, in)."""
        return self.turn(self.checkpoint.block(f"{self.blocks_path}.{index}"))

    def turn(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A block's tensors from the orientation of the checkpoint to (out, in), or back."""
        return {name: tensor.mT.contiguous() if name in self._transposed else tensor for name, tensor in state.items()}

    @timed("load")
    def load_block(
        self, index: int, state: Mapping[str, Tensor], narrow: Callable[[nn.Module], None] | None = None
    ) -> nn.Module:
        """A live block on the device with the given weights; `narrow` changes the shapes of the whole block first."""
        block = _copied((self.blocks if narrow is None else self._whole)[index])
        if narrow is not None:
            narrow(block)
        on_device = {
            name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
            for name, tensor in state.items()
        }
        block.load_state_dict(on_device, assign=True, strict=True)
        return block.to(self.device).eval().requires_grad_(False)


def _copied(module: nn.Module) -> nn.Module:
    """A module with tables of its own: of parameters, buffers, modules and hooks, and so on down.

    What stands in the tables is shared: it is on meta, or only read, and loading replaces it. Of what else a module
    has, such as its config, `copy.deepcopy` would make copies for longer than many a layer runs.
    """
    made = copy.copy(module)
    made.__dict__.update({name: table.copy() for name, table in vars(module).items() if isinstance(table, dict)})
    for name, child in module._modules.items():
        made._modules[name] = None if child is None else _copied(child)
    return made


def empty_model(config: Any, buffers: bool = False) -> Any:
    """The causal-LM model of a config on meta, with its weights tied; with `buffers` these have memory and values.

    Without, nothing is allocated, whatever the config says. Experts have layers of their own (`experts.Experts`).
    Raises `CheckpointError` if there is no such model.
    """
    with explained(_cannot_build), ONE_AT_A_TIME, _parameters_on_meta() if buffers else torch.device("meta"):
        model = AutoModelForCausalLM.from_config(computing(config))
        model.tie_weights()
    one_by_one(model)
    return model


def computing(config: Any) -> Any:
    """A copy without what its owner likes beside the logits, and with the attention and experts that torch has.

    Others are code of the Hub's.
    """
    config = copy.deepcopy(config)
    for name in ("_attn_implementation", "_experts_implementation"):
        if hasattr(config, name):
            setattr(config, name, None)
    config.output_attentions = config.output_hidden_states = False
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False
    config.return_dict = True
    return config


def _cannot_build(cause: str) -> CheckpointError:
    return CheckpointError(f"config.json describes a model that this transformers cannot build ({cause})")


def _cannot_run(cause: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"config.json describes a model that this transformers cannot run ({cause})")


_here = threading.local()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that this thread makes have no memory; buffers, such as the frequencies of rotary embeddings, have.

    accelerate's `init_empty_weights` is for all threads: a model that another one loads would lose its weights.
    """
    _here.on_meta = True
    try:
        yield
    finally:
        _here.on_meta = False


def _to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    if not getattr(_here, "on_meta", False) or parameter.is_meta:
        return None
    empty = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
    empty._is_hf_initialized = True  # type: ignore[attr-defined]  # or transformers would draw what has no memory
    return empty


register_module_parameter_registration_hook(_to_meta)  # type: ignore[arg-type]


def linear_blocks(model: nn.Module, path: str) -> tuple[list[nn.Module], frozenset[str]]:
    """The decoder blocks of an empty model with linear layers only, and the weights that are stored transposed.

    GPT-2 has `Conv1D` layers, which are linear layers with weights (in, out).
    """
    blocks: list[nn.Module] = list(model.get_submodule(path))  # type: ignore[call-overload]
    transposed: set[str] = set()
    for block in blocks:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, Conv1D):
                _set_submodule(block, name, nn.Linear(layer.nx, layer.nf, layer.bias is not None, device="meta"))
                transposed.add(f"{name}.weight")
    return blocks, frozenset(transposed)


def _set_submodule(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
