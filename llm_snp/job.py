"""What a run is about: options resolved, model and output found, everything checked that needs no weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .config import PruneConfig
from .errors import OptionError
from .families import Family, family_of
from .hub import EMBEDDED, load_config, locate
from .plan import check_order


@dataclass(frozen=True)
class Job:
    """options: resolved; directory: of the dense model; config: its transformers config; length: tokens per window."""

    options: PruneConfig
    directory: Path
    config: Any
    family: Family
    output: Path
    device: torch.device
    length: int


def open_job(options: PruneConfig, weights: bool, local_index: int = 0) -> Job:
    """Resolve and check `options`; `weights` False fetches a model's config only. Raises `SnpError`.

    local_index: of this process among those on its machine; it takes the GPU of that number.
    """
    options.validate()
    options = options.resolved()
    if options.revision and (options.model is None or os.path.isdir(os.path.expanduser(options.model))):
        raise OptionError("--revision is for models on the Hub, and this one is a local directory; leave it out")
    directory = locate(options.model, options.revision, weights)
    config = load_config(directory)
    family = family_of(config)
    check_order(family, config, options)
    output = Path(options.output).expanduser() if options.output else default_output(options)
    device = resolve_device(options.device, local_index)
    return Job(options, directory, config, family, output, device, window_length(options, config))


def default_output(options: PruneConfig) -> Path:
    """./<model name>-snp-<percent>"""
    path = EMBEDDED if options.model is None else Path(options.model).expanduser()
    name = path.resolve().name if path.exists() else path.name  # a Hub id ends in the model's name, too
    return Path(f"{name}-snp-{100 * options.sparsity:g}")


def resolve_device(name: str, local_index: int = 0) -> torch.device:
    """`auto` and `cuda` are the CUDA device of that index, `auto` is the CPU if there is none.

    Raises `OptionError` for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_index:
        name = f"cuda:{local_index}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"--device {name!r} is no device; give auto, cpu, cuda or cuda:0") from error
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if found <= (device.index or 0):
            raise OptionError(f"--device {name} was asked for, but torch sees {found} CUDA devices; use --device cpu")
    return device


def resolve_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """`auto` computes in the checkpoint's type on a GPU and in float32 on the CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" or stored == torch.float64 else stored
    return getattr(torch, name)  # type: ignore[no-any-return]


def window_length(options: PruneConfig, config: Any) -> int:
    """--sequence-length, capped by the positions the model has."""
    return min(options.sequence_length, getattr(config, "max_position_embeddings", options.sequence_length))
