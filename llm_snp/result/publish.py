"""A finished result as it goes to the Hugging Face Hub: what must hold of it before, and the upload in one commit."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..dense.card import front_matter
from ..dense.tokenizer import check_tokenizer
from ..documents.card import model_card, plots_of
from ..documents.page import html_page
from ..documents.plots import FOLDER, PLOTS, plot_images, plot_path
from ..documents.shareable import shareable
from ..documents.writing import CARD, PAGE, cached, edited, read_report
from ..errors import CheckpointError, HubError, OutputError, ReplacedError
from ..system.files import digest_of_bytes
from ..system.libraries import explained
from ..system.manifest import (
    EDITED,
    FILES,
    REPLACING,
    REPORT,
    changed,
    check_weights,
    faults,
    manifest,
    sealed,
    some,
    strays,
)
from ..system.private import in_cache, public_words
from ..system.progress import one_line
from ..version import __version__
from .carried import travels
from .own_code import MODELING, foreign, own_code
from .repository import ATTRIBUTES, CLIENT_ERRORS, look_at, reason, refused, status
from .settings import content_of

# What a run writes, beside its code, what travels from the dense model, and report and card.
WRITTEN = re.compile(
    r"config\.json|model-\d{5,}-of-\d{5,}\.safetensors|model\.safetensors\.index\.json|report\.html|plots/\w+\.png"
)


def push(directory: Path, repo: str, private: bool = False, overwrite: bool = False, message: str | None = None) -> str:
    """Upload a result to `repo` ("user/name") in one commit, and return its URL.

    What a run wrote goes up, after it was checked against its hashes, and nothing else (`left_here` tells what that
    leaves). Hashes notice damage, they do not tell whose a result is: so the one file of code that goes up is this
    version's, whatever the directory has under its name, page and plots are made of the report anew (a page is what a
    browser runs), and what names other code is refused. The repository is made if there is none, as a private one if
    `private`. With `overwrite` it has afterwards what the result consists of and nothing else; but if anything has come
    into it since it was looked at, nothing goes up. The card says how to load the model from there, unless a person has
    edited README.md, which then goes up as it is. `directory` itself is not changed.

    Raises `CheckpointError` if the directory is no finished result or not as it was written, `OutputError` if it is in
    the Hub's cache, `ReplacedError` if another run has put its result there meanwhile, and what `check_push` raises.
    After a `HubError` in the middle the same call can be repeated: before the commit nothing of an upload is seen.
    """
    report = read_report(directory)
    if in_cache(directory):
        raise OutputError(cached(directory))
    as_checked = _identities(directory, report)
    files = _files(directory, report)
    api = HfApi()
    there = look_at(api, repo, overwrite, private, card_is_edited(directory, report))
    content = files | _documents(directory, report, repo, files)
    visibility: dict[str, Any] = {"private": True} if private else {}  # else the owner's default, for most public
    try:
        if there is None:
            api.create_repo(repo, **visibility)
            there = look_at(api, repo, overwrite, private)
        if there is None:
            raise HubError(f"{repo} was made on the Hub, which does not show it yet; push again in a minute")
        _expect(as_checked, directory, report)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationDelete(name) for name in sorted(there.files - set(content) - {ATTRIBUTES})),
            *(CommitOperationAdd(name, source) for name, source in content.items()),  # with the hash of what it has now
        ]
        _expect(as_checked, directory, report)
        # Not `upload_folder`: newer versions of it make several commits of a large folder.
        api.create_commit(
            repo,
            operations,
            commit_message=message or f"Upload a model pruned by llm_snp {__version__}",
            parent_commit=there.commit,  # what has come since, while large files went up, stays
        )
    except CLIENT_ERRORS as error:
        if status(error) in (401, 403):
            raise refused(error, repo) from error
        if status(error) in (409, 412):
            raise HubError(
                f"{repo} has changed on the Hub meanwhile ({reason(error)}), so nothing of {directory} went there; "
                "look at what it has now, and push again"
            ) from error
        if isinstance(error, ValueError):
            raise HubError(
                f"the Hub does not take {directory} ({reason(error)}); put that right and push it again"
            ) from error
        again = ["push", str(directory), repo, *["--private"] * private, *["--overwrite"] * overwrite]
        raise HubError(
            f"the upload of {directory} to {repo} broke off ({reason(error)}); the directory is intact, and "
            f"`python -m llm_snp {shlex.join(again)}` repeats it"
        ) from error
    return f"{api.endpoint}/{repo}"


def _identities(directory: Path, report: dict[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """What tells the files that are there from others of the same names, which another run may put there."""
    found: dict[str, tuple[int, ...] | None] = {}
    for name in (*manifest(directory, report), CARD, REPORT):
        try:
            state = (directory / name).stat()
            found[name] = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
        except OSError:
            found[name] = None
    return found


def _expect(identities: dict[str, tuple[int, ...] | None], directory: Path, report: dict[str, Any]) -> None:
    """Raise `ReplacedError` unless the files of a result are still those that were checked."""
    if _identities(directory, report) != identities:
        raise ReplacedError(
            f"{directory} has another result by now, or none: it was replaced or moved while it was looked at, and "
            "nothing went up; push again"
        )


def left_here(directory: Path) -> list[str]:
    """The files in a result that `push` leaves where they are: no run wrote them."""
    return [name for name in strays(directory) if name not in (CARD, REPORT)]


def card_is_edited(directory: Path, report: dict[str, Any]) -> bool:
    """Whether somebody has changed README.md, which goes up all the same."""
    return edited(directory / CARD, manifest(directory, report).get(CARD))


def _files(directory: Path, report: dict[str, Any]) -> dict[str, Path | bytes]:
    """What a result consists of, by name in the repository. Raises `CheckpointError` if it is not as it was written."""
    check_weights(directory, report)
    files = {name: found for name, found in manifest(directory, report).items() if name != CARD}
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    try:
        shards = set(json.loads(content_of(index))["weight_map"].values()) if index.exists() else set()
        config = json.loads(content_of(directory / "config.json")) if (directory / "config.json").exists() else {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{directory} is damaged: its config or index cannot be read; prune again") from error
    needed = {"config.json", index.name, *map(str, shards)} | ({MODELING} if config.get("auto_map") else set())
    if unknown := sorted(needed - set(files)):
        raise CheckpointError(f"{directory} has {some(unknown)}, of which its report says nothing; prune again")
    missing, other = changed(directory, files)
    if wrong := faults(missing, other):
        raise CheckpointError(
            f"{directory} is not as it was written: {wrong}; restore that, prune again, or, where only plots or the "
            f"page are wrong, move them and make new ones with `python -m llm_snp report {shlex.quote(str(directory))}`"
        )
    check_tokenizer(directory)
    paths = {name: directory / name for name in files}
    # All but weights are read at once: the Hub's client reads a path again while it uploads.
    found = {name: path if path.suffix == ".safetensors" else content_of(path) for name, path in paths.items()}
    return found | _own_code(directory, config, files) | _shown(directory, report, files)


def _shown(directory: Path, report: dict[str, Any], files: Iterable[str]) -> dict[str, bytes]:
    """Page and plots of the report, as far as the result has them: those that lie there may be a stranger's.

    Raises `CheckpointError` for a plot of something that the report does not have.
    """
    public = shareable(report)
    with explained(lambda why: CheckpointError(f"the documents of {directory} cannot be made ({why})")):
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
    if strange := foreign(directory, files, own and own[0]):
        name, fields = next(iter(strange.items()))
        raise CheckpointError(
            f"{directory / name} has {some([field for field in fields if field] or ['a list'])}, which leads to code "
            "outside of the result, or says of a machine or a person what is not published, and which no run of this "
            "llm_snp writes; prune again"
        )
    return {MODELING: own[1]} if own else {}


def _documents(
    directory: Path, report: dict[str, Any], repo: str, content: Mapping[str, Path | bytes]
) -> dict[str, bytes]:
    """Card and report as they go up: the card for loading from `repo`, the report without paths of this machine."""
    card = _card(directory, report, repo)
    documents = {CARD: (directory / CARD).read_bytes() if card is None else card.encode()}
    report = shareable(report)
    files = manifest(directory, report)
    files |= {name: digest_of_bytes(made) for name, made in content.items() if isinstance(made, bytes)}
    files.pop(CARD, None)  # in a downloaded copy, too, an edited card is nobody's but its author's
    report[FILES] = files if card is None else files | {CARD: digest_of_bytes(documents[CARD])}
    for field in (REPLACING, EDITED):
        report.pop(field, None)
    report |= {EDITED: True} if card is None else {}
    return documents | {REPORT: sealed(report)}


def _card(directory: Path, report: dict[str, Any], repo: str) -> str | None:
    """The card for `repo`, or None if a person has edited the one that is there.

    Raises `CheckpointError` for a link: what it leads to may be nothing that is for others; and for places in the
    metadata of one that was edited, which programs write there, too.
    """
    path = directory / CARD
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise CheckpointError(f"{path} is a link, or no file, and would be published; put the file itself there")
    if not path.exists():
        return model_card(report, repo)
    text = path.read_text(encoding="utf-8", errors="replace")
    titles = {plot_path(one): plot.title for one, plot in PLOTS.items()}  # not the card's: that may be a stranger's
    plots = [(titles[shown], shown) for _, shown in plots_of(text) if shown in titles]
    if not card_is_edited(directory, report):
        return model_card(report, repo, plots)
    place = next((line for line in front_matter(path.read_bytes()).splitlines() if public_words(line) != line), None)
    if place is not None:
        raise CheckpointError(
            f"{path} has a place of this machine, or a secret, in its metadata ({one_line(place)}), which peft puts "
            "there, say, and would be published; take that out, or remove the file and let `report` make it anew"
        )
    return None
