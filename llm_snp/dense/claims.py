"""What a checkpoint claims about itself, held against what its files can hold, before anything is allocated for it.

A config of a stranger may name a billion blocks or a width beyond 2**63, a pickle a tensor of a terabyte in a file of
one kilobyte. The header of a safetensors file is held against the file by safetensors itself. Needs no torch to look at
a config.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, UnsupportedModelError
from ..system.files import size
from ..system.private import within

if TYPE_CHECKING:
    from torch import Tensor, nn

# Fields of configs that count something; None stands for a default that the config's class knows.
BLOCKS = ("num_hidden_layers", "n_layer")
SIZES = (
    *BLOCKS,
    *("hidden_size", "n_embd", "word_embed_proj_dim"),
    *("ffn_dim", "ffn_hidden_size", "intermediate_size", "n_inner"),
    *("moe_intermediate_size", "shared_expert_intermediate_size"),
    *("num_experts", "num_local_experts", "num_experts_per_tok"),
    *("num_attention_heads", "n_head", "num_key_value_heads", "num_kv_heads", "head_dim"),
    *("vocab_size", "max_position_embeddings", "n_positions"),
    "sliding_window",
)
# Some say 0 for no window; and a token is predicted from one before it.
LEAST = {"sliding_window": 0, "max_position_embeddings": 2, "n_positions": 2}
# Far beyond any model there is: torch counts in 64 bits, and products of two sizes must fit.
MOST = 2**31
MOST_BLOCKS = 10_000
PRUNED = "snp_"  # how the types of pruned models begin
DTYPES = ("float16", "bfloat16", "float32", "float64")
# Buffers that are computed, such as causal masks, lie in no file; a model may have so many bytes of them at least.
COMPUTED = 1 << 30
# Older checkpoints have frequencies and causal masks of every layer, which are made anew today.
BUFFERS = (r"\.rotary_emb\.inv_freq$", r"\.(attn|attention)\.(masked_)?bias$")
SHOWN = 80  # characters at most that an error quotes
# What no language model has: transformers would name each label, and fetch what a backbone is called.
NOT_OF_LANGUAGE = ("num_labels", "backbone", "backbone_config")
# Fields of a config by which transformers would take other weights than those that are pruned, or build another model.
ELSEWHERE = (
    *("transformers_weights", "fusion_config", "distributed_config", "kernel_config"),
    *("quantization_config", "compression_config"),  # the weights are plain by now, or were refused
)


def checked_config(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The fields of a config.json, its type as today's tools write it: "float16" for "torch.float16".

    Raises `CheckpointError` for a size that is none, or that no model has, and for a type that weights cannot have;
    `UnsupportedModelError` for a model whose blocks differ already.
    """
    fields = dict(content)
    fields.pop("configuration_files", None)  # other files, for versions of transformers that there are not
    for name in NOT_OF_LANGUAGE:
        fields.pop(name, None)
    if fields.get("per_layer_config") and "block_widths" not in fields:  # a result of ours has both
        raise UnsupportedModelError(
            f"{path} has a per_layer_config, so that the model's blocks differ already; llm_snp prunes models whose "
            "blocks are alike: give the model that it was made of"
        )
    if fields.get("per_layer_config"):
        fields["allow_global_per_layer_attribute_access"] = True  # ours describes the dense model beside it
    kind = fields.get("model_type")
    if fields.get("block_widths") is not None and not (isinstance(kind, str) and kind.startswith(PRUNED)):
        raise UnsupportedModelError(
            f"{path} has block_widths, which models have that llm_snp has pruned, and is of type {shown(kind)}; take "
            "it out, or give the model that it was made of"
        )
    for name in SIZES:
        value = fields.get(name)
        if value is None:
            continue
        most = MOST_BLOCKS if name in BLOCKS else MOST
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(f"{name} is {shown(value)} in {path}; expected int, got {type(value).__name__}")
        least = LEAST.get(name, 1)
        if not least <= value <= most:
            raise CheckpointError(f"{name} is {shown(value)} in {path}; it must be at least {least} and at most {most}")
    for name in ("dtype", "torch_dtype"):
        value = fields.get(name)
        if value is None:
            continue
        plain = value.removeprefix("torch.") if isinstance(value, str) else value
        if plain not in DTYPES:
            raise CheckpointError(f"{name} is {shown(value)} in {path}; expected one of {', '.join(DTYPES)}")
        fields[name] = plain
    return fields


def check_blocks(config: Any, names: list[str], directory: Path) -> None:
    """Raise `CheckpointError` if a config has more blocks than its checkpoint has tensors."""
    if config.num_hidden_layers > len(names):
        raise CheckpointError(
            f"config.json in {directory} says {config.num_hidden_layers} blocks, but the weights are {len(names)} "
            "tensors; they belong to different models"
        )


def check_buffers(model: nn.Module, files: list[Path]) -> None:
    """Raise `CheckpointError` if a model (on meta) has more in buffers, which are computed, than is reasonable."""
    needed = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    most = max(COMPUTED, sum(file.stat().st_size for file in files))
    if needed > most:
        raise CheckpointError(
            f"config.json in {files[0].parent} describes a model with tables of {size(needed)} beside its "
            f"weights, which are smaller; is the number of positions right?"
        )


def expected_tensors(model: nn.Module) -> tuple[dict[str, tuple[int, ...]], dict[str, str], list[str]]:
    """Of a model: its tensors' shapes, the tied names with the name each shares, and keys it declares harmless."""
    shapes: dict[str, tuple[int, ...]] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shapes[name] = tuple(parameter.shape)
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
        first.setdefault(id(parameter), name)
    persistent = model.state_dict(keep_vars=True).keys()
    shapes |= {name: tuple(buffer.shape) for name, buffer in model.named_buffers() if name in persistent}
    harmless = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return shapes, tied, [*harmless, *BUFFERS]


def made_anew(name: str) -> bool:
    """Whether a tensor of an older checkpoint is computed today; it may have a type that no weight has."""
    return any(re.search(pattern, name) for pattern in BUFFERS)


def is_beside(name: str) -> bool:
    """Whether a file that another one names lies beside that: a plain name, on every system."""
    return PurePosixPath(name).name == name and PureWindowsPath(name).name == name


def check_weight_name(file: Any, index: Path) -> str:
    """The name of a weight file in an index: a plain one, of a file beside it. Raises `CheckpointError` for a path."""
    if not isinstance(file, str) or "\0" in file or file in ("", ".", ".."):
        raise CheckpointError(f"{index} names {shown(file)} as a weight file; expected the name of one beside it")
    if not is_beside(file):
        raise CheckpointError(
            f"{index} names {shown(file)} as a weight file, which is a path; only files beside the index are read"
        )
    return file


def check_within(path: Path, directory: Path) -> None:
    """Raise `CheckpointError` for weights or a config that are a link out of their directory, but to the Hub's cache.

    Who unpacks a stranger's archive makes the links in it, and what they lead to would go into a result under the
    stranger's name and terms.
    """
    if not within(path, directory):
        raise CheckpointError(
            f"{path} is a link to {path.resolve()}, outside of {directory}; copy it there, or give the directory that "
            "has it"
        )


def check_archive(path: Path) -> None:
    """Raise `CheckpointError` if a zip file would unpack to more than it is: torch stores tensors as they are."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > path.stat().st_size:
        raise CheckpointError(f"{path} is compressed, which no weight file is; save it anew with torch.save")


def check_pickled(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The state dict that a .bin file holds, without its parameters' gradients.

    Raises `CheckpointError` if it is something else, or has a tensor that claims more than the file holds.
    """
    import torch
    from torch import Tensor

    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in loaded.items()
    ):
        raise CheckpointError(
            f"{path} is not the state dict of a model: expected tensors by name; save model.state_dict()"
        )
    size = path.stat().st_size
    for name, tensor in loaded.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu" or tensor.is_complex():
            raise CheckpointError(f"{shown(name)} in {path} is no plain tensor; save model.state_dict() of the model")
        if math.prod(tensor.shape) * tensor.element_size() > size:
            raise CheckpointError(
                f"{shown(name)} in {path} has shape {tuple(tensor.shape)}, which is more than the file's {size} bytes"
            )
    return {name: tensor.detach() for name, tensor in loaded.items()}


def shown(value: Any) -> str:
    """A stranger's value, at no great length."""
    if isinstance(value, int) and abs(value) >= 2**64:  # Python refuses to write out very long ones
        return f"a number of {value.bit_length()} bits"
    text = ascii(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 4] + " ..."
