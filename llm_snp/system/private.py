"""What is on a machine and nobody else's business: places, people's names in them, tokens. It is never published."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .plain import encodable, text_and_share

# A text that is a path as a whole; words that begin with "/", as some tokens do, are none.
PLACE = re.compile(
    r"/?(/[^/\s<>{}]([^/\n<>{}]*[^/\s<>{}])?){2,}/?|~[\w.-]*/.*|\.\./.+|\./[^/]+/.+|[A-Za-z]:[\\/].+|\\\\.+|(file|s3|gs|hdfs|dbfs|abfss?|smb|s?ftp|ssh):/.+"
    r"|(?!https?:)[A-Za-z][\w+.-]*://.+|[\w.@-]+:/[^/\s].*|\$\w+/.*|\$\{\w+\}/.*|%\w+%\\.*",
    re.DOTALL,
)
# Anywhere in a text: homes of people, a name and password or a signature of a URL, tokens of the Hub, GitHub, GitLab,
# OpenAI, AWS, Slack, Google, those that are signed JSON, and private keys.
SECRET = re.compile(
    r"(/|\\)(home|Users)\1[^/\\\s]|\w://[^/\s@:]{0,300}:[^/\s@]{1,300}@|"
    r"[?&](sig|signature|token|access_token|key|api_key|X-Amz-Signature|X-Goog-Signature)=[^\s&]|"
    r"(?<![\w-])(hf_[A-Za-z0-9]{30,}|A[KS]IA[A-Z0-9]{12,}|"
    # Without digits and capitals they may be words: en-sk-news-of-the-year.
    r"(gh[pousr]_|github_pat_|glpat-|sk-|xox[abps]-|AIza|npm_|pypi-)(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{16,})|"
    r"\beyJ[\w-]{16,300}\.eyJ|-----BEGIN [A-Z ]*PRIVATE KEY|\b[Bb]earer [\w.-]{16}|\bhooks\.slack\.com/"
)
# Anywhere in a line: paths (from the root, a drive, a home or a share), and places of other schemes than the web's.
PATH = re.compile(
    r"(^|[^\w/.<])/(root/\S|[\w.@+-]+/[\w.@+-])|(^|\W)[A-Za-z]:[\\/]\w|(^|\s)~[\w.-]*/\w|"
    r"\b(?!https?:)[A-Za-z][\w+.-]*://\w|(^|[^\w/.<:])//[\w.@+-]+/[\w.@+-]"
)
URL = re.compile(r"https?://\S+")
EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]+(\.[\w-]+)+")
LINE = 3000  # characters at most; what is longer is a text that may speak of such things
# Whatever the Hub says of it, nothing else can be a model there: user/name, or one of the old ones without a user, by
# the rules of its client.
HUB_ID = re.compile(
    r"(?!.*(--|\.\.))(?!.*\.git$)(?!(datasets|spaces|models|docs|api)/)(\b[\w.-]+\b/)?\b[\w.-]{1,96}\b", re.ASCII
)
# A branch, tag or commit on the Hub. Without a connection its client takes one for the name of a file.
REVISION = re.compile(r"\w[\w.+@#-]*(/\w[\w.+@#-]*)*")
# Of a model card's metadata, what is still true of the pruned model.
CARRIED = ("license", "license_name", "license_link", "language", "tags", "datasets")
MOST_WORDS, MOST_CHARACTERS = 100, 300  # of each field
# Tags that say of a model what it was made of, or that it is an adapter: of the pruned one the card says that itself.
NOT_ITS_OWN = re.compile(r"base_model:.*|lora|peft|adapter", re.IGNORECASE)
HOMES = ("home", "Users")  # folders with one for each person, wherever they are: /export/home, /var/home
HOME = "home"


def is_private(text: str) -> bool:
    """Whether a text, such as the value of a setting, names a place or a person of some machine, or has a token."""
    if SECRET.search(text) or PLACE.fullmatch(text):
        return True
    return len(text) <= LINE and (PATH.search(text) is not None or _has_name(text))


def has_address(text: str) -> bool:
    """Whether a line has the address of somebody's mail."""
    return len(text) <= LINE and EMAIL.search(text) is not None


def _has_name(path: str) -> bool:
    """Whether a folder of a relative path is called as whoever runs this; what has two parts may be a repository.

    In an address on the web it is a name there, which is often the same.
    """
    parts = URL.sub("", path).split("/")
    return len(parts) > 2 and not _names().isdisjoint(parts)


def public_name(path: Path) -> str:
    """What a file or directory is called where that is published; a home, which has the name of a person, "home".

    So is what has the name of whoever runs this, as `/scratch/ann` on a cluster. A snapshot in the Hub's cache, which
    is called by its commit there, is what the repository is called.
    """
    try:
        real = path.expanduser().resolve()
        if in_cache(real):
            return real.parent.parent.name.rsplit("--", 1)[-1]
        if real.parent.name in HOMES or real == Path.home().resolve() or real.name in _names():
            return HOME
    except (OSError, RuntimeError, ValueError):  # nobody has that name, or there is no home; a circle of links; no path
        pass
    return path.name or str(path)


def _names() -> set[str]:
    """What whoever runs this is called on the machine."""
    names = {os.environ[name] for name in ("USER", "LOGNAME") if os.environ.get(name)}
    with suppress(ImportError, KeyError):  # not on Windows; a container may have no name for a number
        import pwd

        names.add(pwd.getpwuid(os.geteuid()).pw_name)
    return names


def public_text(given: str) -> str:
    """The same of a text of a run, which may have its share of the windows behind it: TEXT:SHARE."""
    text, share = text_and_share(given)
    name = public_name(Path(text))
    return name if share is None else f"{name}:{share.strip()}"


def public_words(text: str, kept: Collection[str] = ()) -> str:
    """A text without the places and tokens among its words: a place is its last component, a token "hidden".

    kept: words that stay whatever they look like.
    """

    def public(word: str) -> str:
        if word in kept or not is_private(word):
            return word
        return short if not is_private(short := public_text(word)) else "hidden"

    return public(text) if PLACE.fullmatch(text) else re.sub(r"\S+", lambda word: public(word[0]), text)


def in_cache(directory: Path) -> bool:
    """Whether a directory is a snapshot in the Hub's cache, whose files lead to blobs that others share."""
    place = directory.resolve().parent
    cached = re.match(r"(models|datasets|spaces)--", place.parent.name)
    return cached is not None and place.name == "snapshots" and (place.parent / "blobs").is_dir()


def lies_in_cache(path: Path) -> bool:
    """Whether a place is among the snapshots of the Hub's cache, where its tools remove what is there."""
    return any(in_cache(place) for place in (path.resolve(), *path.resolve().parents))


def within(path: Path, directory: Path) -> bool:
    """Whether a file is in a directory when links are followed; those of the Hub's cache lead to its blobs."""
    target = path.resolve()
    blobs = target.parent
    cached = blobs.name == "blobs" and (blobs.parent / "snapshots").is_dir()
    return cached or target.is_relative_to(directory.resolve())


def carried_words(card: Mapping[str, Any]) -> dict[str, Any]:
    """What of a card's metadata, parsed, may stand in another card; a link only as one for a browser, or of a file."""
    words = {name: _words(card.get(name)) for name in CARRIED}
    if isinstance(words["tags"], list):
        words["tags"] = [tag for tag in words["tags"] if not NOT_ITS_OWN.fullmatch(tag)]
    link = words["license_link"]
    if isinstance(link, str) and re.match(r"[\w+.-]*:", link) and not link.startswith(("https://", "http://")):
        del words["license_link"]
    return {name: value for name, value in words.items() if value}


def _words(value: Any) -> str | list[str] | None:
    """A text or a list of texts as it is, and what else there is in neither."""
    if isinstance(value, str):
        value = value.strip()
        sound = len(value) <= MOST_CHARACTERS and encodable(value) and value.isprintable()
        return value if sound and not is_private(value) and not has_address(value) else None
    if isinstance(value, list):
        words = [word for one in value[:MOST_WORDS] if isinstance(one, str) and isinstance(word := _words(one), str)]
        return [word for word in words if word]
    return None
