"""Where a model is: a local directory, or files fetched from the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import CheckpointError, HubError

# What travels besides the weights.
SIDE_FILES = ("*.json", "*.txt", "*.model", "tokenizer*")
EMBEDDED = Path(__file__).parent / "demo" / "opt-wiki-1m"


def locate(model: str | None, revision: str | None = None, weights: bool = True) -> Path:
    """The local directory of a model: the embedded one for None, a directory as it is, or a Hub id after download.

    Of a repository with safetensors and .bin weights only the safetensors are fetched; `weights` False fetches the
    config and the tokenizer only. Raises `CheckpointError` for a local path that is no model, `HubError` if the Hub
    cannot be reached, has no such repository or refuses.
    """
    if model is None:
        return EMBEDDED
    path = Path(model)
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        return _local(path.expanduser())
    return _download(model, revision, weights)


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
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        patterns = list(SIDE_FILES)
        if weights:
            try:
                files = HfApi().list_repo_files(model, revision=revision)
                has_safetensors = any(file.endswith(".safetensors") for file in files)
                patterns.append("*.safetensors" if has_safetensors else "pytorch_model*.bin")
            except (OSError, HfHubHTTPError) as error:
                if isinstance(error, (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError)):
                    raise
                patterns += ["*.safetensors", "pytorch_model*.bin"]  # offline: take what an earlier run fetched
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
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
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise HubError(
            f"{model} is no local directory, and the Hugging Face Hub could not be reached; check the network, "
            "or give a directory with the model's files"
        ) from error


def load_config(directory: Path) -> Any:
    """The transformers config of a model directory. Raises `CheckpointError` if it cannot be read."""
    from transformers import AutoConfig

    try:
        json.loads((directory / "config.json").read_text())
        return AutoConfig.from_pretrained(directory)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{directory / 'config.json'} is not JSON: {error}") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{directory / 'config.json'} is no config this transformers knows: {str(error).splitlines()[0]}"
        ) from error


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory. Raises `CheckpointError` if it has none that loads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{directory} has no tokenizer that loads ({(str(error).splitlines() or [''])[0]}); copy the tokenizer "
            "files of the original model beside the weights"
        ) from error
