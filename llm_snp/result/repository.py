"""A repository on the Hugging Face Hub: what it has, whether a result may go there, and why the Hub refuses."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..dense.hub import check_token
from ..documents.writing import CARD
from ..errors import HubError, OptionError
from ..system.files import scratch
from ..system.manifest import REPORT, has_edited_card, is_result, manifest, some, strays

# The errors of the library by which the Hub's client speaks HTTP: requests, httpx or httpx2, by its version.
HTTP_ERRORS: tuple[type[Exception], ...] = tuple(
    base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)
)
# What the client lets through: those, its own, those of the network and of uploads, and what comes of odd answers.
CLIENT_ERRORS: tuple[type[Exception], ...] = (
    *(*HTTP_ERRORS, OSError, RuntimeError),
    *(ValueError, LookupError, TypeError, AttributeError),
)
ATTRIBUTES = ".gitattributes"  # the Hub puts it into every new repository
BARE = re.compile(rb"\s*(---\n.*?\n---\s*)?", re.DOTALL)  # a card that has metadata at most
REASON = 300  # characters at most that an error quotes


def check_push(repo: str, overwrite: bool = False, private: bool = False, edited: bool = False) -> None:
    """Raise unless a result can be pushed to `repo` ("user/name"), as far as can be told before there is one.

    edited: whether there is one, finished, whose card a person has edited.

    Raises `OptionError` for a name that is none, `HubError` if there is no token, the Hub refuses it or cannot be
    reached, the token may not write for this user or organisation, or, without `overwrite`, the repository has files,
    or, with it, files that are no result's, or is not `private` where that was asked for.
    """
    look_at(HfApi(), repo, overwrite, private, edited)


def check_card(card: str) -> None:
    """Raise `OptionError` for a model card that the Hub would not take, `HubError` if it cannot be asked."""
    try:
        ModelCard(card).validate()
    except ValueError as error:
        raise OptionError(
            f"the Hub would not take the card of the result ({reason(error)}); mend the README.md of the model, from "
            "which that comes, or leave --push-to-hub out"
        ) from error
    except CLIENT_ERRORS as error:
        raise refused(error, "the Hub") from error


@dataclass(frozen=True)
class Repository:
    """A repository as it was looked at: its files, and the commit that has them."""

    files: frozenset[str]
    commit: str | None


def look_at(api: HfApi, repo: str, overwrite: bool, private: bool, edited: bool = False) -> Repository | None:
    """What `repo` has, None if it does not exist; raises what `check_push` says.

    edited: whether the card that is to go there has a person's words, and may replace another one that has.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OptionError(f"{repo!r} is no name for a repository ({reason(error)}); give user/name") from error
    if "/" not in repo:
        raise OptionError(f"{repo!r} does not say whose repository it is; give user/name")
    check_token()
    if get_token() is None:
        raise HubError("there is no token for the Hugging Face Hub; run `hf auth login`, or set HF_TOKEN")
    try:
        _check_permission(api.whoami(), repo)
        try:
            info = api.model_info(repo)
        except RepositoryNotFoundError:
            return None
        found = Repository(frozenset(file.rfilename for file in info.siblings or ()), info.sha)
        others = sorted(found.files - _written_there(api, repo, found, edited)) if overwrite else []
    except CLIENT_ERRORS as error:
        raise refused(error, repo) from error
    if private and info.private is not True:
        raise HubError(
            f"{repo} exists on the Hub, and not as a private repository, which --private asks for; make it one in its "
            "settings, or give another name"
        )
    if not overwrite and found.files - {ATTRIBUTES}:  # without other files: a push that broke off
        raise HubError(f"{repo} exists on the Hub and has {len(found.files)} files; give another name, or --overwrite")
    if others:
        raise HubError(
            f"{repo} has {some(others)} on the Hub, which no run of llm_snp wrote, or which were changed since, and "
            "--overwrite replaces results only; give another name, or remove them there"
        )
    return found


def _written_there(api: HfApi, repo: str, found: Repository, edited: bool) -> set[str]:
    """The files of a repository that are a result's and as they were when its report came there.

    Large files have another hash there than in the report, so what tells is which commit changed each last. A card of
    metadata alone is none that anybody has written: the Hub's page makes it with a repository.
    """
    with scratch() as folder:
        if REPORT not in found.files:
            bare = CARD in found.files and BARE.fullmatch(_content(api, repo, CARD, found, folder))
            return {ATTRIBUTES, *[CARD] * bool(bare)}
        _content(api, repo, REPORT, found, folder)
        ours = {ATTRIBUTES, *manifest(folder), *[REPORT] * is_result(folder)} - set(strays(folder))
        ours |= {CARD} if edited and has_edited_card(folder) else set()  # it came with the report, as the commits tell
    tree = api.list_repo_tree(repo, recursive=True, expand=True, revision=found.commit)
    changed = {one.path: one.last_commit.date for one in tree if isinstance(one, RepoFile) and one.last_commit}
    return {name for name in ours if REPORT not in changed or changed.get(name, changed[REPORT]) <= changed[REPORT]}


def _content(api: HfApi, repo: str, name: str, found: Repository, folder: Path) -> bytes:
    """A small file of a repository, which lies in a folder then."""
    return Path(api.hf_hub_download(repo, name, revision=found.commit, local_dir=folder)).read_bytes()


def _check_permission(who: dict[str, Any], repo: str) -> None:
    """Raise `HubError` where the Hub's answer on the token says that it may not write to `repo`."""
    owner, name = repo.split("/")
    role = who.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise HubError("the token for the Hugging Face Hub may only read; make one that may write, and set HF_TOKEN")
    owners = [who["name"], *(org["name"] for org in who.get("orgs", ()))]
    # Tokens of finer grain need not list organisations: whether they may write shows when the repository is made.
    if role != "fineGrained" and owner.lower() not in (known.lower() for known in owners):
        raise HubError(f"the token is one of {who['name']}, who may not write to {owner}; give {owners[0]}/{name}")


def refused(error: Exception, repo: str) -> HubError:
    """What the Hub, or the way to it, has against a request."""
    answered = status(error)
    if answered == 401:
        return HubError("the Hugging Face Hub refused the token; run `hf auth login`, or set HF_TOKEN to a valid one")
    if answered == 403:
        owner = repo.split("/")[0]
        return HubError(
            f"the token may not write to {repo} ({reason(error)}); give a token with write permission for {owner}, or "
            "another name"
        )
    if answered is None:
        return HubError(f"the Hugging Face Hub cannot be reached ({reason(error)}); check the network")
    return HubError(f"the Hugging Face Hub could not answer ({reason(error)}); try again later")


def status(error: Exception) -> int | None:
    """The status of the Hub's answer, None if there was none."""
    return getattr(getattr(error, "response", None), "status_code", None)


def reason(error: BaseException) -> str:
    """What a library says, on one line and not at length; what lies behind it, where it names only a file."""
    text = str(error).split("For more information check")[0]
    lines = [line.strip(" -") for line in text.splitlines() if line.strip()] or [type(error).__name__]
    if type(error) is RuntimeError and error.__cause__ is not None:
        lines = [lines[0], reason(error.__cause__)]
    text = " ".join(lines[:2])
    return text if len(text) <= REASON else text[: REASON - 4] + " ..."
