"""The file itself: metadata in front, then tensor by tensor; it is there whole or not at all."""

from __future__ import annotations

import re
import shutil
import struct
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType
from torch import Tensor

from ...config import GGUF_TYPES
from ...dense.checkpoint import Checkpoint
from ...dense.hub import load_config
from ...dense.skeleton import Skeleton
from ...documents.shareable import hub_id, shareable
from ...documents.writing import read_report
from ...errors import CheckpointError, DiskFullError, UnsupportedModelError
from ...families import FAMILIES, Family
from ...system.files import disk, size, written_aside
from ...system.manifest import check_as_written, has_report
from ...system.private import public_name
from ...system.progress import Progress
from ...version import __version__
from .layout import Layout, Output, layout
from .tokens import add_tokenizer, copy_tokenizer

TYPES = {name: GGMLQuantizationType[name.upper()] for name in GGUF_TYPES}
FILE_TYPES = {name: LlamaFileType["ALL_F32" if name == "f32" else f"MOSTLY_{name.upper()}"] for name in GGUF_TYPES}
LARGEST = {GGMLQuantizationType.F16: float(np.finfo(np.float16).max)}
# Read position by position, or routers: what the engine has in 32 bits whatever the others have.
ALWAYS_F32 = ("position_embd.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
STRIPPING = re.compile(r"phi-?3", re.IGNORECASE)  # what llama.cpp looks for in a model's name
SCALINGS = {"linear": RopeScalingType.LINEAR, "yarn": RopeScalingType.YARN}


def export(
    directory: Path,
    path: Path,
    kind: str,
    tokenizer_from: Path | None,
    progress: Progress,
    replace: Callable[[], bool] = lambda: False,
) -> Layout:
    """Write the result in `directory` as the GGUF file `path`, with weights of type `kind`.

    replace: asked at the end, whether a file that is there by then goes. One tensor is in memory at a time: of a layer
    of all experts of a block as it is written, and one expert's as it was read. The file has another name until it is
    whole. Raises `CheckpointError` for a directory that is no result or is damaged, `UnsupportedModelError` for what
    llama.cpp cannot have, `OptionError` for a tokenizer that cannot be taken over, and `OutputError` if the disk does
    not take it, or a file is there that stays.
    """
    report = read_report(directory) if has_report(directory) else None
    config = load_config(directory)
    family = _family(directory, config, report is not None)
    if report is not None:
        check_as_written(directory, report)
    skeleton = _skeleton(directory, family, config)
    arranged = layout(family, config, skeleton)
    writer = GGUFWriter(None, arranged.architecture.name)
    add_fields(writer, arranged)
    if tokenizer_from is None:
        tokens = add_tokenizer(writer, directory, arranged.vocabulary)
    else:
        tokens = copy_tokenizer(writer, tokenizer_from, arranged.vocabulary)
    add_facts(writer, directory, report, kind, strips=_strips(arranged, tokens))
    needed = 0
    for output in arranged.outputs:
        stored, count = _stored(output, TYPES[kind])
        writer.add_tensor_info(output.name, output.shape, np.dtype(np.float32), count, stored)
        needed += count
    _check_room(path, needed)
    with (
        written_aside(path, replace) as aside,
        closing(writer),
        progress.phase("export", len(arranged.outputs), unit="tensor") as step,
    ):
        writer.write_header_to_file(aside)
        try:
            writer.write_kv_data_to_file()
        except (OverflowError, struct.error) as error:
            raise CheckpointError(f"{directory}/config.json has a number that no GGUF file holds ({error})") from error
        writer.write_ti_data_to_file()
        for output in arranged.outputs:
            writer.write_tensor_data(_data(output, skeleton.checkpoint, TYPES[kind]))
            step()
    return arranged


def _family(directory: Path, config: Any, reported: bool) -> Family:
    """Of a result, or of one that was trained on and saved elsewhere, which has no report."""
    for family in FAMILIES.values():
        if config.model_type == family.pruned_model_type or (reported and config.model_type == family.model_type):
            return family
    raise CheckpointError(
        f"{directory} has no report.json and its model is not a pruned one ({config.model_type}); give the directory "
        "that a run of llm_snp has written (for any other model llama.cpp has convert_hf_to_gguf.py)"
    )


def _skeleton(directory: Path, family: Family, config: Any) -> Skeleton:
    checkpoint = Checkpoint(directory, family.renames)
    return Skeleton(config, family.blocks, checkpoint, torch.device("cpu"), torch.float32)


def _strips(arranged: Layout, tokens: Sequence[str]) -> bool:
    """Whether the model is one whose special tokens take the spaces behind them along."""
    marks = arranged.architecture.tokens
    return bool(marks) and set(marks) <= set(tokens)


def engine_name(name: str, strips: bool) -> str:
    """A model's name, with what llama.cpp tells by it: only what is called phi-3 has tokens that take spaces along."""
    if not strips:
        return STRIPPING.sub("phi", name)
    return name if STRIPPING.search(name) else f"{name} (phi-3)"


def add_facts(writer: GGUFWriter, directory: Path, report: dict[str, Any] | None, kind: str, strips: bool) -> None:
    """What the file is, for people and for the programs that list models."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(FILE_TYPES[kind])
    if report is None:
        writer.add_name(engine_name(public_name(directory.resolve()), strips))
        return
    report = shareable(report)
    model, sparsity = report["model"], report["sparsity"]
    writer.add_name(engine_name(Path(report["output"]).name, strips))
    writer.add_description(
        f"{model['name']} with {sparsity['achieved']:.2%} of its blocks' linear parameters removed, by llm_snp "
        f"{__version__}"
    )
    writer.add_float32("llm_snp.sparsity", sparsity["achieved"])
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, Path(model["name"]).name)
    if known := hub_id(model):
        writer.add_base_model_organization(0, known.rpartition("/")[0])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{known}")
    card = model.get("card") or {}
    for name, add in (("license", "license"), ("license_name", "license_name"), ("license_link", "license_link")):
        if isinstance(found := card.get(name), str):
            getattr(writer, f"add_{add}")(found)
    writer.add_tags(["llm_snp", "pruned", "text-generation"])
    languages = card.get("language") or []
    if languages:
        writer.add_languages([languages] if isinstance(languages, str) else languages)


def add_fields(writer: GGUFWriter, of: Layout) -> None:
    """Sizes, positions, and what else the architecture asks of a config."""
    row, config, positions = of.architecture, of.config, of.positions

    def counts(values: tuple[int, ...]) -> int | list[int]:
        return list(values) if row.blockwise else values[0]

    writer.add_block_count(len(of.neurons))
    writer.add_context_length(of.context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(counts(of.neurons))
    writer.add_head_count(counts(of.queries))
    writer.add_head_count_kv(counts(of.keys))
    writer.add_key_length(of.heads.width)
    writer.add_value_length(of.heads.width)
    writer.add_vocab_size(of.vocabulary)
    if of.experts:
        writer.add_expert_count(of.experts)
        writer.add_expert_used_count(of.picked)
        writer.add_expert_feed_forward_length(of.neurons[0])
    if of.shared:
        writer.add_expert_shared_feed_forward_length(of.shared)
    for name, source in row.fields.items():
        if (value := getattr(config, source, None)) is not None:
            getattr(writer, f"add_{name}")(value)
    for name, value in row.constants.items():
        getattr(writer, f"add_{name}")(value)
    if row.period is not None and positions.window is not None:
        writer.add_sliding_window(positions.window)
        writer.add_sliding_window_pattern(row.period)
        writer.add_rope_freq_base_swa(positions.local)
    if row.rotary != "none":
        writer.add_rope_dimension_count(of.rotary)
        writer.add_rope_freq_base(positions.base)
        _add_scaling(writer, positions.scaling)


def _add_scaling(writer: GGUFWriter, scaling: Any) -> None:
    kind = SCALINGS.get(scaling["rope_type"])
    if kind is None:  # the factors of Llama 3.1 are a tensor
        return
    writer.add_rope_scaling_type(kind)
    writer.add_rope_scaling_factor(scaling["factor"])
    adders: dict[str, Callable[[Any], None]] = {
        "original_max_position_embeddings": lambda tokens: writer.add_rope_scaling_orig_ctx_len(int(tokens)),
        "beta_fast": writer.add_rope_scaling_yarn_beta_fast,
        "beta_slow": writer.add_rope_scaling_yarn_beta_slow,
    }
    for name, add in adders.items():
        if scaling.get(name) is not None:
            add(scaling[name])


def _stored(output: Output, wanted: GGMLQuantizationType) -> tuple[GGMLQuantizationType, int]:
    """The type a tensor gets, and its bytes: 32 bits for what is no matrix, 16 for rows that groups do not divide."""
    if len(output.shape) < 2 or output.name.endswith(ALWAYS_F32):
        wanted = GGMLQuantizationType.F32
    group, size = gguf.GGML_QUANT_SIZES[wanted]
    if output.shape[-1] % group:
        wanted = GGMLQuantizationType.F16
        group, size = gguf.GGML_QUANT_SIZES[wanted]
    return wanted, int(np.prod(output.shape)) // group * size


def _data(output: Output, checkpoint: Checkpoint, wanted: GGMLQuantizationType) -> Any:
    """A tensor's bytes. Raises `UnsupportedModelError` for numbers that its type does not reach."""
    stored, _ = _stored(output, wanted)
    if not output.stacked:
        read = dict(checkpoint.tensors(output.sources))
        return _bytes(output, [read[name] for name in output.sources], stored)
    place = {name: index for index, name in enumerate(output.sources)}
    stack = None
    for name, tensor in checkpoint.tensors(output.sources):  # in the order of files
        part = _bytes(output, [tensor], stored)
        stack = np.empty((len(place), *part.shape), part.dtype) if stack is None else stack
        stack[place[name]] = part
    return stack


def _bytes(output: Output, sources: Sequence[Tensor], stored: GGMLQuantizationType) -> Any:
    values = output.make(sources).float().contiguous().numpy()
    if (largest := float(np.abs(values).max(initial=0))) > LARGEST.get(stored, np.inf):
        raise UnsupportedModelError(
            f"{output.name} has numbers up to {largest:.0f}, and 16-bit floats end at 65504; give --type bf16"
        )
    return gguf.quants.quantize(values, stored)


def _check_room(path: Path, needed: int) -> None:
    """Raise `DiskFullError` before anything is written, if that is plain to see."""
    with disk(path):
        free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise DiskFullError(
            f"{path} needs {size(needed)}, and its disk has {size(free)} left; free some space or give another "
            "directory"
        )
