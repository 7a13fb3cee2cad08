"""Which architecture of llama.cpp a model becomes, its tensors there, and why it can be none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import pi
from typing import Any

import gguf
import torch
from torch import Tensor

from ...dense.checkpoint import Checkpoint
from ...dense.skeleton import Skeleton
from ...errors import UnsupportedModelError
from ...families import EXPERTS, GGUF, SHARED, Family, Gguf, Heads, Positions, expert_of, heads_of, positions_of

OUTPUT, EMBEDDING, ROPE_FACTORS = "output.weight", "token_embd.weight", "rope_freqs.weight"
# What the engine counts in blocks.
COUNTED = ("heads", "neurons", EXPERTS, SHARED)
# Of each type of scaling, the parameters that have a place in the file.
SCALING = {
    "default": set(),
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}


@dataclass(frozen=True)
class Output:
    """A tensor of the file: its name there, its shape (rows first), those it is made of, and how.

    stacked: it is a stack of its sources, of which `make` gets one after the other.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    make: Callable[[Sequence[Tensor]], Tensor]
    stacked: bool = False


@dataclass(frozen=True)
class Layout:
    """A model as a file has it.

    queries, keys, neurons: of each block; neurons of one of its experts, where it has some. heads: as in its config;
    their width holds for all blocks. experts: how many each block has (0: none), picked: how many of them work on a
    token, shared: neurons of the MLP beside them.
    """

    architecture: Gguf
    config: Any
    heads: Heads
    positions: Positions
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    neurons: tuple[int, ...]
    experts: int
    picked: int
    shared: int
    outputs: tuple[Output, ...]

    @property
    def context(self) -> int:
        """Tokens for which the file is right: where the engine knows no windows, as many as one has."""
        window = self.positions.window
        sees_all = self.architecture.period is None and window is not None
        return min(self.positions.context, window) if sees_all and window else self.positions.context

    @property
    def vocabulary(self) -> int:
        """Tokens that have an embedding."""
        return next(output.shape[0] for output in self.outputs if output.name == EMBEDDING)

    @property
    def rotary(self) -> int:
        """Dimensions of a head that positions turn."""
        return int(self.heads.width * self.positions.share)


def layout(family: Family, config: Any, skeleton: Skeleton) -> Layout:
    """How llama.cpp can have the model. Raises `UnsupportedModelError` with the option that helps, if one does."""
    rows = GGUF.get(family.model_type, ())
    if not rows:
        raise UnsupportedModelError(
            f"llama.cpp has no architecture for models of type {family.model_type!r}; serve this one with transformers"
        )
    blocks = _widths(family, config)
    reasons, by_width = [], False
    for row in rows:
        of_model = _config_fault(row, config, blocks) or _mixture_fault(row, family, config)
        reason = of_model or _width_fault(row, config, blocks)
        if reason is None:
            return _arrange(row, family, config, skeleton)
        by_width = by_width or of_model is None
        reasons.append(reason)
    advice = "prune the dense model with --format stock for it" if by_width else "serve this one with transformers"
    raise UnsupportedModelError(f"llama.cpp cannot have this model: {', and '.join(dict.fromkeys(reasons))}; {advice}")


def _widths(family: Family, config: Any) -> list[dict[str, int]]:
    """Of each block, what is `COUNTED`. Raises `UnsupportedModelError` if it has lost something else."""
    whole = family.widths(config, {})
    blocks = getattr(config, "block_widths", None) or [whole] * config.num_hidden_layers
    found = "queries" if any("queries" in block for block in blocks) else None
    inside = {unit for block in blocks for unit in block if unit not in (*COUNTED, "queries")}
    if any(block.get(unit) != whole.get(unit) for unit in inside for block in blocks):
        found = "directions"
    blocks = [{unit: block[unit] for unit in COUNTED if unit in block} for block in blocks]
    if any(0 in block.values() for block in blocks):
        raise UnsupportedModelError(
            "this model has lost attention or MLP layers as a whole, which is not written for llama.cpp; prune the "
            "dense model with --structures layers --format stock, which takes whole blocks"
        )
    if found:
        what = "single query heads" if found == "queries" else "directions inside its heads"
        blockwise = "blockwise, which takes key/value heads with all their query heads, or with --format "
        if not any(row.blockwise for row in GGUF[family.model_type]):
            blockwise = ""
        raise UnsupportedModelError(
            f"this model has lost {what}, which llama.cpp cannot express; prune the dense model with --format "
            f"{blockwise}stock"
        )
    return blocks


def _width_fault(row: Gguf, config: Any, blocks: Sequence[Mapping[str, int]]) -> str | None:
    """What of the widths the architecture does not do."""
    if not row.blockwise and any(block != blocks[0] for block in blocks):
        counted = "heads, neurons and experts" if EXPERTS in blocks[0] else "heads and of neurons"
        return f"its {row.name} has one number of {counted} for all blocks"
    if not row.heads and _queries(config, blocks[0]) * heads_of(config).width != config.hidden_size:
        return f"its {row.name} has as many heads as fill the model's width"
    return None


def _queries(config: Any, block: Mapping[str, int]) -> int:
    """Query heads of a block; what is counted are key/value heads, or query heads where these all read a single one."""
    heads = heads_of(config)
    return block["heads"] * (heads.queries // heads.keys if heads.keys > 1 else 1)


def _config_fault(row: Gguf, config: Any, blocks: Sequence[Mapping[str, int]]) -> str | None:
    """What of a config the architecture does not do."""
    for name, values in row.takes.items():
        found = getattr(config, name, None)
        if found not in values:
            return f"its {row.name} takes {name} {_said(values[0])}, not {_said(found)}"
    positions, heads = positions_of(config), heads_of(config)
    if not row.grouped and heads.keys != heads.queries:
        return f"its {row.name} has as many key/value heads as query heads"
    kind, parameters = positions.scaling["rope_type"], set(positions.scaling) - {"rope_type"}
    if row.rotary != "none":
        if kind not in row.scalings:
            return f"its {row.name} does not do positions of type {kind!r}"
        used = {name for name in parameters if positions.scaling[name] is not None}
        if kind in SCALING and used - SCALING[kind] - {"original_max_position_embeddings", "truncate"}:
            return f"its {row.name} does not do {', '.join(sorted(used - SCALING[kind]))} of positions"
        for name in sorted(used & SCALING.get(kind, set())):
            if not _fits(name, found := positions.scaling[name]):
                return f"its {row.name} takes a number as {name} of positions, not {_said(found)}"
        if row.rotary == "whole" and positions.share != 1.0:
            return f"its {row.name} turns all of a head"
    if row.period is not None and positions.window is not None:
        sees_all = [index for index, slides in enumerate(positions.slides) if not slides]
        if sees_all != list(range(row.period - 1, len(positions.slides), row.period)):
            return f"its {row.name} has windows in all blocks but every {row.period}th"
    if row.scale is not None:
        large = config.num_hidden_layers == row.large
        expected = config.hidden_size // _queries(config, blocks[0]) if large else heads.width
        if getattr(config, row.scale) != expected:
            return f"its {row.name} takes {row.scale} {expected}, not {getattr(config, row.scale)}"
    return None


def _mixture_fault(row: Gguf, family: Family, config: Any) -> str | None:
    """What of the blocks of a mixture of experts the architecture does not do."""
    blocks = range(config.num_hidden_layers)
    dense = [] if family.mixture is None else [i for i in blocks if not family.mixture.sparse(config, i)]
    return f"its {row.name} has experts in every block, and this model none in block {dense[0]}" if dense else None


def _fits(name: str, value: Any) -> bool:
    """Whether a parameter of positions is a number that a file has room for: of tokens a whole one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 2**31:
        return False
    return name != "original_max_position_embeddings" or value == int(value)


def _said(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _arrange(row: Gguf, family: Family, config: Any, skeleton: Skeleton) -> Layout:
    heads, positions = heads_of(config), positions_of(config)
    outputs = {output.name: output for output in _outputs(row, family, heads, skeleton)}
    blocks = range(config.num_hidden_layers)

    def rows(index: int, part: str, count: int) -> int:
        """Heads of a block: from the shape of their layer, where that is one of its own."""
        found = shapes.get(f"blk.{index}.attn_{part}.weight")
        return count if found is None else found[0] // heads.width

    shapes = {output.name: output.shape for output in outputs.values()}
    queries = tuple(rows(index, "q", heads.queries) for index in blocks)
    keys = tuple(rows(index, "k", heads.keys) for index in blocks)
    sizes = family.shape(config, 0)
    down = "ffn_down_exps" if sizes.experts else "ffn_down"
    neurons = tuple(shapes[f"blk.{index}.{down}.weight"][-1] for index in blocks)
    mixture = sizes.experts, sizes.picked, sizes.shared
    if row.fused == "parts":
        outputs = {output.name: output for output in _joined(outputs, blocks)}
    if row.output and OUTPUT not in outputs:
        embedding = outputs[EMBEDDING]
        outputs[OUTPUT] = Output(OUTPUT, embedding.shape, embedding.sources, embedding.make)
    if positions.scaling["rope_type"] == "llama3" and row.rotary != "none":
        factors = rope_factors(positions, heads.width)
        outputs[ROPE_FACTORS] = Output(ROPE_FACTORS, tuple(factors.shape), (), lambda tensors: factors)
    return Layout(row, config, heads, positions, queries, keys, neurons, *mixture, tuple(outputs.values()))


def _outputs(row: Gguf, family: Family, heads: Heads, skeleton: Skeleton) -> Iterator[Output]:
    """The tensors of the checkpoint by their names in the file, each as the engine wants it."""
    checkpoint = skeleton.checkpoint
    architecture = {name: known for known, name in gguf.MODEL_ARCH_NAMES.items()}[row.name]
    # An architecture that wants query, key and value as one has no names for them alone.
    named = gguf.MODEL_ARCH.LLAMA if row.fused == "parts" else architecture
    stacks: dict[str, dict[int, str]] = {}  # the tensors of experts, by the name of all of them
    for name in checkpoint.names():
        if (of_expert := expert_of(name)) is not None:
            stacks.setdefault(of_expert[1], {})[of_expert[0]] = name
    alone = [name for name in checkpoint.names() if expert_of(name) is None and name not in skeleton.tied]
    for name in (*alone, *stacks):
        found = None
        for known in dict.fromkeys((architecture, named)):
            names = gguf.get_tensor_name_map(known, len(skeleton))
            found = found or names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UnsupportedModelError(f"llama.cpp's {row.name} has no place for {name}")
        if name in stacks:
            members = tuple(stacks[name][expert] for expert in sorted(stacks[name]))
            shape = (len(members), *checkpoint.shape(members[0]))
            yield Output(found, shape, members, lambda tensors: tensors[0], stacked=True)
            continue
        turned = row.transposed and name.startswith(f"{family.blocks}.")
        yield _output(row, found, name, checkpoint, heads, turned)


def _output(row: Gguf, found: str, name: str, checkpoint: Checkpoint, heads: Heads, transposed: bool) -> Output:
    shape = checkpoint.shape(name)
    part = found.split(".")[-2]
    if part in ("attn_q", "attn_k") and row.interleaved:
        return Output(found, shape, (name,), lambda tensors: interleaved(tensors[0], heads.width))
    if part == "attn_qkv" and row.fused in ("heads", "groups"):
        return Output(found, shape, (name,), lambda tensors: sorted_out(tensors[0], heads))
    if part.endswith("norm") and found.endswith(".weight") and row.norm_offset:
        return Output(found, shape, (name,), lambda tensors: tensors[0].float() + row.norm_offset)
    if transposed and len(shape) == 2:
        return Output(found, shape[::-1], (name,), lambda tensors: tensors[0].T)
    return Output(found, shape, (name,), lambda tensors: tensors[0])


def _joined(outputs: Mapping[str, Output], blocks: Sequence[int]) -> Iterator[Output]:
    """The same with query, key and value of each block as one."""
    parts = {f"blk.{index}.attn_{part}.weight" for index in blocks for part in "qkv"}
    yield from (output for name, output in outputs.items() if name not in parts)
    for index in blocks:
        three = [outputs[f"blk.{index}.attn_{part}.weight"] for part in "qkv"]
        shape = (sum(output.shape[0] for output in three), three[0].shape[1])
        sources = tuple(name for output in three for name in output.sources)
        yield Output(f"blk.{index}.attn_qkv.weight", shape, sources, lambda tensors: torch.cat(list(tensors)))


def interleaved(rows: Tensor, width: int) -> Tensor:
    """Rows (heads · w, ...) of query or key with the rotary pairs (i, i + w/2) side by side."""
    halves = rows.view(-1, 2, width // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def sorted_out(rows: Tensor, heads: Heads) -> Tensor:
    """Rows (key/value heads · (queries each + 2) · w, ...) as all queries, then all keys, then all values."""
    groups = rows.view(heads.keys, heads.queries // heads.keys + 2, heads.width, *rows.shape[1:])
    parts = groups[:, :-2], groups[:, -2:-1], groups[:, -1:]
    return torch.cat([part.reshape(-1, *rows.shape[1:]) for part in parts])


def rope_factors(positions: Positions, width: int) -> Tensor:
    """(w/2,) by what the angles of each rotary pair are divided in Llama 3.1 (`rope_type` "llama3")."""
    scaling = positions.scaling
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    turns = positions.base ** -(torch.arange(0, width, 2).double() / width) / (2 * pi)  # per token
    turns *= scaling["original_max_position_embeddings"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
