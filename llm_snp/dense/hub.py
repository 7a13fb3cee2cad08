"""Where a model is: a local directory, or files fetched from the Hugging Face Hub."""

from __future__ import annotations

import json
import os
import stat
from contextlib import nullcontext
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from ..errors import CheckpointError, HubError
from ..system.files import scratch, write_text
from ..system.libraries import explained, parse_json, reason
from ..system.private import HUB_ID
from .claims import check_within, checked_config
from .rotary import older_fields
from .terms import called_terms

if TYPE_CHECKING:  # where a model is can be told without torch
    import torch

# What travels besides the weights; terms of use have names of all kinds.
SIDE_FILES = (
    "*.json",
    "*.txt",
    "*.model",
    "tokenizer*",
    "*.jinja",
    "README.md",
    "[Ll][Ii][Cc][Ee][Nn][CcSs][Ee]*",
    "[Nn][Oo][Tt][Ii][Cc][Ee]*",
)
# Weights as transformers names them. Some repositories have them a second time, in another layout.
SAFETENSORS = ("model.safetensors", "model-*-of-*.safetensors")
BIN = "pytorch_model*.bin"
# Where its files are themselves: uv may install links to its cache (`--link-mode=symlink`).
EMBEDDED = (Path(__file__).parent.parent / "demo" / "opt-wiki-1m" / "config.json").resolve().parent


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
    if "\0" in model:
        raise CheckpointError(f"{model!a} is neither a local directory nor a valid Hub id")
    path = Path(os.path.expanduser(model))
    # os.path.lexists is also False for what cannot be a path, such as a name that is too long.
    if os.path.lexists(path) or model.startswith((".", "/", "~")) or model.count("/") > 1:
        return _local(path)
    if not HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model} is neither a local directory nor a valid Hub id")
    return None


def _local(path: Path) -> Path:
    try:
        path.stat()
        if not path.is_dir():
            raise CheckpointError(f"{path} is a file; expected a model directory with config.json and weights")
        if not stat.S_ISREG((path / "config.json").stat().st_mode):
            raise CheckpointError(f"{path / 'config.json'} is no file; expected a model directory with config.json")
    except (FileNotFoundError, NotADirectoryError) as error:
        if error.filename == str(path / "config.json"):
            raise CheckpointError(f"{path} is not a model directory: it has no config.json") from error
        raise CheckpointError(
            f"{path} does not exist; give a model directory or a Hub id such as facebook/opt-125m"
        ) from error
    except OSError as error:  # no permission, a circle of links, a name that is too long
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror}") from error
    return path


def check_token() -> None:
    """Raise `HubError` for a token that cannot be read, or cannot be one: no request could be made with it."""
    from huggingface_hub import constants, get_token

    def refusal(cause: str) -> HubError:
        return HubError(
            f"the token for the Hugging Face Hub cannot be read from {constants.HF_TOKEN_PATH} ({cause}); remove what "
            "is there and run `hf auth login`, or set HF_TOKEN"
        )

    with explained(refusal):
        token = get_token() or ""
    if not token.isascii() or not token.isprintable() or " " in token:
        raise HubError(
            "the token for the Hugging Face Hub has characters that no token has; check HF_TOKEN, or run "
            "`hf auth login`"
        )


def _download(model: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def refusal(cause: str) -> HubError:
        return HubError(
            f"{model} is no local directory, and could not be had from the Hugging Face Hub ({cause}); check the "
            "network, or give a directory with the model's files"
        )

    check_token()
    # Which library's errors the Hub's client lets through (requests, httpx, ...) changes with its version.
    with explained(refusal):
        try:
            patterns = list(SIDE_FILES)
            if weights:
                try:
                    files = HfApi().list_repo_files(model, revision=revision)
                    has_safetensors = any(fnmatch(file, pattern) for file in files for pattern in SAFETENSORS)
                    patterns += SAFETENSORS if has_safetensors else [BIN]
                    patterns += [file for file in files if "/" not in file and called_terms(PurePath(file))]
                except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
                    raise
                except Exception:  # all of the client's errors: see `explained`; what else is wrong fails below
                    patterns += [*SAFETENSORS, BIN]  # offline: take what an earlier run fetched
            return _local(Path(snapshot_download(model, revision=revision, allow_patterns=patterns)))
        except CheckpointError as error:
            raise CheckpointError(f"{model} on the Hub is no transformers model: it has no config.json") from error
        except GatedRepoError as error:
            raise HubError(f"{model} is gated: accept its licence on the Hub, then run `hf auth login`") from error
        except RevisionNotFoundError as error:
            raise HubError(
                f"{model} has no revision {revision!r} on the Hub; check the branch, tag or commit"
            ) from error
        except RepositoryNotFoundError as error:
            raise HubError(
                f"{model} is neither a local directory nor a repository on the Hub that you may read; check the "
                "spelling, or run `hf auth login` if it is private"
            ) from error
        except HFValidationError as error:
            raise CheckpointError(f"{model} is neither a local directory nor a valid Hub id") from error


def transformers_is(*least: int) -> bool:
    """Whether transformers has this version at least, such as (4, 56): what a config has says of another's only."""
    return Version(version("transformers")).release[: len(least)] >= least


def load_config(directory: Path) -> Any:
    """The transformers config of a model directory. Raises `CheckpointError` if it cannot be read."""
    from transformers import AutoConfig

    path = directory / "config.json"
    check_within(path, directory)
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {reason(error)}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or reason(error)}") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise CheckpointError(f'{path} is no config of transformers: it names no "model_type"')
    fields = checked_config(content, path)
    if not transformers_is(5):  # it would pass what 5 has saved over without a word
        fields = older_fields(fields) | fields
    kind = content["model_type"]

    def refusal(cause: str) -> CheckpointError:
        return CheckpointError(f"{path} is no config of model type {kind!r} that this transformers can read ({cause})")

    with nullcontext(directory) if fields == content else scratch() as folder, explained(refusal):
        if fields != content:  # transformers reads configs from files only
            write_text(folder / "config.json", json.dumps(fields))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config.name_or_path = ""  # or the result's config.json would have it
        config.to_json_string()  # what can be read must also be possible to write, at the end
        return config


def config_dtype(config: Any) -> torch.dtype:
    """The type of a checkpoint's weights as its config has it (`dtype` in transformers 5, `torch_dtype` before)."""
    import torch

    found = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
    return found if isinstance(found, torch.dtype) else getattr(torch, found)
