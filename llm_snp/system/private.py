"""What is on a machine and nobody else's business: places, people's names in them, tokens. It is never published."""

from __future__ import annotations

import re
from pathlib import Path

# A text that is a path as a whole; words that begin with "/", as some tokens do, are none.
PLACE = re.compile(
    r"(/[^/\s<>{}]([^/\n<>{}]*[^/\s<>{}])?){2,}/?|~[\w.-]*/.*|\.\./.+|[A-Za-z]:[\\/].+|\\\\.+|(file|s3|gs|hdfs|dbfs|abfss?|smb|s?ftp|ssh):/.+",
    re.DOTALL,
)
# Anywhere in a line: homes of people, a name and password of a URL, tokens of the Hub.
SECRET = re.compile(r"(/|\\)(home|Users)\1[^/\\\s]|(^|[\s\"'=:])/root/\S|\w://[^/\s@]*:[^/\s@]+@|\bhf_[A-Za-z0-9]{30,}")
LINE = 300  # characters at most; what is longer is a text that may speak of such things
HOMES = ("/home", "/Users")
HOME = "home"


def is_private(text: str) -> bool:
    """Whether a text, such as the value of a setting, names a place or a person of some machine, or has a token."""
    return PLACE.fullmatch(text) is not None or (len(text) <= LINE and SECRET.search(text) is not None)


def public_name(path: Path) -> str:
    """What a file or directory is called where that is published; a home, which has the name of a person, "home"."""
    try:
        real = path.expanduser().resolve()
        if str(real.parent) in HOMES or real == Path.home().resolve():
            return HOME
    except (OSError, RuntimeError):  # nobody has that name, or there is no home; a circle of links
        pass
    return path.name


def within(path: Path, directory: Path) -> bool:
    """Whether a file is in a directory when links are followed; those of the Hub's cache lead to its blobs."""
    target = path.resolve()
    blobs = target.parent
    cached = blobs.name == "blobs" and (blobs.parent / "snapshots").is_dir()
    return cached or target.is_relative_to(directory.resolve())
