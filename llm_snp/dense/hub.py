"""Where a model is: a local directory, or files fetched from the Hugging Face Hub."""

from __future__ import annotations

import json
import os
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, HubError

if TYPE_CHECKING:  # where a model is can be told without torch
    import torch

# What travels besides the weights.
SIDE_FILES = ("*.json", "*.txt", "*.model", "tokenizer*", "README.md")
# Weights as transformers names them. Some repositories have them a second time, in another layout.
SAFETENSORS = ("model.safetensors", "model-*-of-*.safetensors")
BIN = "pytorch_model*.bin"
REASON = 200  # characters at most that an error quotes
# Whatever the Hub says of it, nothing else can be a repository there: user/name, or one of the old ones without a user.
HUB_ID = re.compile(r"([\w.-]+/)?[\w.-]+")
EMBEDDED = Path(__file__).parent.parent / "demo" / "opt-wiki-1m"


def locate(model: str | None, revision: str | None = None, weights: bool = True) -> Path:
    """The local directory of a model: the embedded one for None, a directory as it is, or a Hub id after download.

    Of a repository with safetensors and .bin weights only the safetensors are fetched; `weights` False fetches the
    config and the tokenizer only. Raises `CheckpointError` for a local path that is no model, `HubError` if the Hub
    cannot be reached, has no such repository or refuses.
    """
    return find(model) or _download(str(model), revision, weights)


def find(model: str | None) -> Path | None:
    """The local directory of a model, the embedded one for None; None for what may be on the Hub.

    Needs no network and no large library. Raises `CheckpointError` for a local path that is no model, and for what can
    be neither a path nor on the Hub.
    """
    if model is None:
        return EMBEDDED
    path = Path(os.path.expanduser(model))
    # os.path.exists is also False for what cannot be a path, such as a name that is too long.
    if os.path.exists(path) or model.startswith((".", "/", "~")) or model.count("/") > 1:
        return _local(path)
    if not HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model} is neither a local directory nor a valid Hub id")
    return None


def _local(path: Path) -> Path:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a model directory or a Hub id such as facebook/opt-125m")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; expected a model directory with config.json and weights")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is not a model directory: it has no config.json")
    return path


def _download(model: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        patterns = list(SIDE_FILES)
        if weights:
            try:
                files = HfApi().list_repo_files(model, revision=revision)
                has_safetensors = any(fnmatch(file, pattern) for file in files for pattern in SAFETENSORS)
                patterns += SAFETENSORS if has_safetensors else [BIN]
            except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
                raise
            except Exception:
                patterns += [*SAFETENSORS, BIN]  # offline: take what an earlier run fetched
        return _local(Path(snapshot_download(model, revision=revision, allow_patterns=patterns)))
    except CheckpointError as error:
        raise CheckpointError(f"{model} on the Hub is no transformers model: it has no config.json") from error
    except GatedRepoError as error:
        raise HubError(f"{model} is gated: accept its licence on the Hub, then run `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{model} has no revision {revision!r} on the Hub; check the branch, tag or commit") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{model} is neither a local directory nor a repository on the Hub that you may read; check the spelling, "
            "or run `hf auth login` if it is private"
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{model} is neither a local directory nor a valid Hub id") from error
    except Exception as error:
        # Which library's errors the Hub's client lets through (requests, httpx, ...) changes with its version.
        raise HubError(
            f"{model} is no local directory, and could not be had from the Hugging Face Hub ({_reason(error)}); check "
            "the network, or give a directory with the model's files"
        ) from error


def load_config(directory: Path) -> Any:
    """The transformers config of a model directory. Raises `CheckpointError` if it cannot be read."""
    from transformers import AutoConfig

    path = directory / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not JSON: {_reason(error)}") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise CheckpointError(f'{path} is no config of transformers: it names no "model_type"')
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # the config classes check their fields, each with errors of its own
        raise CheckpointError(
            f"{path} is no config of model type {content['model_type']!r} that this transformers can read "
            f"({_reason(error)})"
        ) from error


def config_dtype(config: Any) -> torch.dtype:
    """The type of a checkpoint's weights as its config has it (`dtype` in transformers 5, `torch_dtype` before)."""
    import torch

    found = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
    return found if isinstance(found, torch.dtype) else getattr(torch, found)


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory. Raises `CheckpointError` if it has none that loads."""
    from transformers import AutoTokenizer

    advice = "copy the tokenizer files of the original model beside the weights"
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        ids = tokenizer("the", add_special_tokens=False)["input_ids"]
    except Exception as error:  # files that are not what the tokenizer class expects fail in many ways
        raise CheckpointError(f"{directory} has no tokenizer that loads ({_reason(error)}); {advice}") from error
    # Without files transformers 5 gives a tokenizer with an empty vocabulary and no error.
    if not ids:
        raise CheckpointError(f"{directory} has no tokenizer: it has no vocabulary file; {advice}")
    return tokenizer


# Of a model card's metadata, what is still true of the pruned model.
CARRIED = ("license", "license_name", "license_link", "language", "tags", "datasets")


def card_metadata(directory: Path) -> dict[str, Any]:
    """Licence, language, tags and datasets of the card (README.md) of a model directory, as far as it has them."""
    from huggingface_hub import metadata_load

    path = directory / "README.md"
    try:
        found = (metadata_load(path) if path.is_file() else None) or {}
    except Exception:  # a card is for people: one that cannot be read takes nothing from the model
        return {}
    return {name: found[name] for name in CARRIED if found.get(name)}


def _reason(error: BaseException) -> str:
    """What a library says, on one line and not at length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text if len(text) <= REASON else text[: REASON - 4] + " ..."
