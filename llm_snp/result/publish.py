"""A finished result as a repository on the Hugging Face Hub: what must hold before, and the upload in one commit."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..dense.hub import check_token
from ..documents.card import model_card, plots_of
from ..documents.page import html_page
from ..documents.plots import FOLDER, PLOTS, plot_images, plot_path
from ..documents.shareable import shareable
from ..documents.writing import CARD, PAGE, edited, read_report
from ..errors import CheckpointError, HubError, OptionError
from ..system.files import digest, digest_of_bytes, scratch
from ..system.manifest import FILES, REPORT, changed, faults, is_result, manifest, some, strays
from ..version import __version__
from .assembly import MODELING, own_code
from .carried import SETTINGS, read_object, travels, without_code

# The errors of the library by which the Hub's client speaks HTTP: requests, httpx or httpx2, by its version.
HTTP_ERRORS: tuple[type[Exception], ...] = tuple(
    base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)
)
# What the client lets through: those, its own, those of the network and of uploads, and what comes of odd answers.
CLIENT_ERRORS: tuple[type[Exception], ...] = (
    *(*HTTP_ERRORS, OSError, RuntimeError),
    *(ValueError, LookupError, TypeError, AttributeError),
)
# What a run writes, beside its code, what travels from the dense model, and report and card.
WRITTEN = re.compile(
    r"config\.json|model-\d{5,}-of-\d{5,}\.safetensors|model\.safetensors\.index\.json|report\.html|plots/\w+\.png"
)
ATTRIBUTES = ".gitattributes"  # the Hub puts it into every new repository
REASON = 300  # characters at most that an error quotes


def check_push(repo: str, overwrite: bool = False, private: bool = False) -> None:
    """Raise unless a result can be pushed to `repo` ("user/name"), as far as can be told before there is one.

    Raises `OptionError` for a name that is none, `HubError` if there is no token, the Hub refuses it or cannot be
    reached, the token may not write for this user or organisation, or, without `overwrite`, the repository has files,
    or, with it, files that are no result's, or is not `private` where that was asked for.
    """
    _files_there(HfApi(), repo, overwrite, private)


def push(directory: Path, repo: str, private: bool = False, overwrite: bool = False, message: str | None = None) -> str:
    """Upload a result to `repo` ("user/name") in one commit, and return its URL.

    What a run wrote goes up, after it was checked against its hashes, and nothing else (`left_here` tells what that
    leaves). Hashes notice damage, they do not tell whose a result is: so the one file of code that goes up is this
    version's, whatever the directory has under its name, page and plots are made of the report anew (a page is what a
    browser runs), and what names other code is refused. The repository is made
    if there is none, as a private one if `private`. With `overwrite` it has afterwards what the result consists of and
    nothing else. The card says how to load the model from there, unless a person has edited README.md, which then goes
    up as it is. `directory` itself is not changed.

    Raises `CheckpointError` if the directory is no finished result or not as it was written, and what `check_push`
    raises. After a `HubError` in the middle the same call can be repeated: before the commit nothing of an upload is
    seen.
    """
    report = read_report(directory)
    files = _files(directory, report)
    api = HfApi()
    there = _files_there(api, repo, overwrite, private)
    content = files | _documents(directory, report, repo, files)
    stale = sorted((there or set()) - set(content) - {ATTRIBUTES})
    visibility: dict[str, Any] = {"private": True} if private else {}  # else the owner's default, for most public
    try:
        if there is None:
            api.create_repo(repo, **visibility)
        # Not `upload_folder`: newer versions of it make several commits of a large folder.
        api.create_commit(
            repo,
            [
                *(CommitOperationDelete(name) for name in stale),
                *(CommitOperationAdd(name, source) for name, source in content.items()),
            ],
            commit_message=message or f"Upload a model pruned by llm_snp {__version__}",
        )
    except CLIENT_ERRORS as error:
        if _status(error) in (401, 403):
            raise _refused(error, repo) from error
        if isinstance(error, ValueError):
            raise HubError(
                f"the Hub does not take {directory} ({_reason(error)}); put that right and push it again"
            ) from error
        again = ["push", str(directory), repo, *["--private"] * private, *["--overwrite"] * overwrite]
        raise HubError(
            f"the upload of {directory} to {repo} broke off ({_reason(error)}); the directory is intact, and "
            f"`python -m llm_snp {shlex.join(again)}` repeats it"
        ) from error
    return f"{api.endpoint}/{repo}"


def left_here(directory: Path) -> list[str]:
    """The files in a result that `push` leaves where they are: no run wrote them."""
    return [name for name in strays(directory) if name != CARD]


def card_is_edited(directory: Path) -> bool:
    """Whether somebody has changed README.md, which goes up all the same."""
    return edited(directory / CARD, manifest(directory).get(CARD))


def _files(directory: Path, report: dict[str, Any]) -> dict[str, Path | bytes]:
    """What a result consists of, by name in the repository. Raises `CheckpointError` if it is not as it was written."""
    files = {name: found for name, found in manifest(directory, report).items() if name != CARD}
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values()) if index.exists() else set()
        config = json.loads((directory / "config.json").read_bytes()) if (directory / "config.json").exists() else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{directory} is damaged: its config or index cannot be read; prune again") from error
    needed = {"config.json", index.name, *map(str, shards)} | ({MODELING} if config.get("auto_map") else set())
    if FILES in report and (unknown := sorted(needed - set(files))):
        raise CheckpointError(f"{directory} has {some(unknown)}, of which its report says nothing; prune again")
    missing, other = changed(directory, dict.fromkeys(sorted(needed)) | files)
    other += [name for name in sorted(needed) if name.endswith(".safetensors") and not _opens(directory / name)]
    if wrong := faults(missing, other):
        raise CheckpointError(
            f"{directory} is not as it was written: {wrong}; restore that, prune again, or, where only plots or the "
            f"page are wrong, move them and make new ones with `python -m llm_snp report {shlex.quote(str(directory))}`"
        )
    found = {name: directory / name for name in files} | _own_code(directory, config, files)
    return found | _shown(directory, report, files)


def _shown(directory: Path, report: dict[str, Any], files: Iterable[str]) -> dict[str, bytes]:
    """Page and plots of the report, as far as the result has them: those that lie there may be a stranger's.

    Raises `CheckpointError` for a plot of something that the report does not have.
    """
    public = shareable(report)
    made = {**plot_images(public), PAGE: html_page(public).encode()}
    if others := [name for name in files if name.startswith(f"{FOLDER}/") and name not in made]:
        raise CheckpointError(
            f"{directory} has {some(others)} in its report, but nothing that these would show; make its documents anew "
            f"with `python -m llm_snp report {shlex.quote(str(directory))}`"
        )
    return {name: content for name, content in made.items() if name in files}


def _own_code(directory: Path, config: dict[str, Any], files: Iterable[str]) -> dict[str, bytes]:
    """`modeling_snp.py` of this version for a result that has one.

    Raises `CheckpointError` for files of a kind that no run writes, and for settings that name code.
    """
    own = own_code(config)
    others = [name for name in files if not (WRITTEN.fullmatch(name) or travels(name) or (own and name == MODELING))]
    if others:
        raise CheckpointError(
            f"{directory} has {some(others)} in its report, which no run of llm_snp writes; prune again"
        )
    for name in {"config.json", *SETTINGS}.intersection(files):
        fields = read_object(directory / name, (directory / name).read_bytes())
        ours = {"auto_map": own[0]} if own and name == "config.json" else {}
        if fields != without_code(fields) | ours:
            raise CheckpointError(
                f"{directory / name} names code, or a place, outside of the result, which no run of llm_snp writes; "
                "prune again"
            )
    return {MODELING: own[1]} if own else {}


def _opens(path: Path) -> bool:
    """Whether a shard is whole, as far as its header tells; `changed` tells all where there is a hash."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _documents(
    directory: Path, report: dict[str, Any], repo: str, content: Mapping[str, Path | bytes]
) -> dict[str, bytes]:
    """Card and report as they go up: the card for loading from `repo`, the report without paths of this machine."""
    card = _card(directory / CARD, report, repo)
    documents = {CARD: (directory / CARD).read_bytes() if card is None else card.encode()}
    report = shareable(report)
    files = {name: found for name, found in manifest(directory, report).items() if found}
    files |= {name: digest_of_bytes(made) for name, made in content.items() if isinstance(made, bytes)}
    report[FILES] = files | {CARD: digest_of_bytes(documents[CARD])}
    if card is not None:  # so that the card of a downloaded copy is known as ours
        report["card"] = report[FILES][CARD]
    return documents | {REPORT: (json.dumps(report, indent=2) + "\n").encode()}


def _card(path: Path, report: dict[str, Any], repo: str) -> str | None:
    """The card for `repo`, or None if a person has edited the one that is there.

    Raises `CheckpointError` for a link: what it leads to may be nothing that is for others.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise CheckpointError(f"{path} is a link, or no file, and would be published; put the file itself there")
    if not path.exists():
        return model_card(report, repo)
    text = path.read_text(encoding="utf-8", errors="replace")
    titles = {plot_path(one): plot.title for one, plot in PLOTS.items()}  # not the card's: that may be a stranger's
    plots = [(titles[shown], shown) for _, shown in plots_of(text) if shown in titles]
    known = report.get("card")
    ours = digest(path) == known if known else text == model_card(report, plots=plots)
    return model_card(report, repo, plots) if ours else None


def _files_there(api: HfApi, repo: str, overwrite: bool, private: bool) -> set[str] | None:
    """The files `repo` has, None if it does not exist; raises what `check_push` says."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OptionError(f"{repo!r} is no name for a repository ({_reason(error)}); give user/name") from error
    if "/" not in repo:
        raise OptionError(f"{repo!r} does not say whose repository it is; give user/name")
    if get_token() is None:
        raise HubError("there is no token for the Hugging Face Hub; run `hf auth login`, or set HF_TOKEN")
    check_token()
    try:
        _check_permission(api.whoami(), repo)
        try:
            there = set(api.list_repo_files(repo))
            open_to_all = private and api.repo_info(repo).private is not True
        except RepositoryNotFoundError:
            return None
        others = sorted(there - _written_there(api, repo, there)) if overwrite else []
    except CLIENT_ERRORS as error:
        raise _refused(error, repo) from error
    if open_to_all:
        raise HubError(
            f"{repo} exists on the Hub, and not as a private repository, which --private asks for; make it one in its "
            "settings, or give another name"
        )
    if not overwrite and there - {ATTRIBUTES}:  # without other files: a push that broke off
        raise HubError(f"{repo} exists on the Hub and has {len(there)} files; give another name, or --overwrite")
    if others:
        raise HubError(
            f"{repo} has {some(others)} on the Hub, which no run of llm_snp wrote, and --overwrite replaces results "
            "only; give another name, or remove them there"
        )
    return there


def _written_there(api: HfApi, repo: str, there: set[str]) -> set[str]:
    """The files of a repository that are a result's, by its report, and those that every repository may have."""
    ours = {ATTRIBUTES, CARD}
    if REPORT not in there:
        return ours
    with scratch() as folder:
        api.hf_hub_download(repo, REPORT, local_dir=folder)
        return ours | {*manifest(folder), *[REPORT] * is_result(folder)}


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


def _refused(error: Exception, repo: str) -> HubError:
    """What the Hub, or the way to it, has against a request."""
    status = _status(error)
    if status == 401:
        return HubError("the Hugging Face Hub refused the token; run `hf auth login`, or set HF_TOKEN to a valid one")
    if status == 403:
        owner = repo.split("/")[0]
        return HubError(
            f"the token may not write to {repo} ({_reason(error)}); give a token with write permission for {owner}, or "
            "another name"
        )
    if status is None:
        return HubError(f"the Hugging Face Hub cannot be reached ({_reason(error)}); check the network")
    return HubError(f"the Hugging Face Hub could not answer ({_reason(error)}); try again later")


def _status(error: Exception) -> int | None:
    """The status of the Hub's answer, None if there was none."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _reason(error: BaseException) -> str:
    """What a library says, on one line and not at length; what lies behind it, where it names only a file."""
    text = str(error).split("For more information check")[0]
    lines = [line.strip(" -") for line in text.splitlines() if line.strip()] or [type(error).__name__]
    if type(error) is RuntimeError and error.__cause__ is not None:
        lines = [lines[0], _reason(error.__cause__)]
    text = " ".join(lines[:2])
    return text if len(text) <= REASON else text[: REASON - 4] + " ..."
