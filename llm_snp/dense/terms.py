"""Files with the terms under which a model may be used: which a result takes along, and which not."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path, PurePath

# How such files are called, among others: the Hub is asked for all of these.
CALLED = re.compile(
    r"(?=[\w. -]+$)(notice|copying|copyright|terms|third.?party|[\w-]*polic(y|ies)|.*licen[cs]e|"
    r"(.*[^a-z])?(eula|terms.of.(use|service))(?![a-z]))",
    re.IGNORECASE | re.ASCII,
)
# What may follow in a name that is only that of terms: more of it, a version, what it is for, a licence, a language.
# With any other word it may be a person's own (`license_server.txt`).
_MORE = (
    r"v?\d[\d.]*|agreements?|terms|conditions|notices?|polic(y|ies)|file|of|use|usage|for|and|the|third|party|models?|"
    r"code|data|datasets?|weights|software|docs|documentation|commercial|non|noncommercial|research|community|lesser|"
    r"apache\d?|mit|bsd|[al]?gpl(v?\d)?|mpl|isc|cc\d?|by|nc|nd|sa|openrail|rail|m|llama\d*|gemma\d*|qwen\d*|deepseek|"
    r"mistral|meta|google|en|zh|cn|de|fr|es|it|ja|jp|ko|kr|ru"
)
_GAP = r"[ ._-]+"
# With any word before it, which may be its maker's, or a product's that the model has nothing to do with.
TERMS = re.compile(
    rf"(notices?|copying|copyrights?|terms|third[ ._-]?party|([\w-]*[_-])?polic(y|ies)|"
    rf"(.*[^a-z])?((un)?licen[cs]es?|eula|terms.of.(use|service)))({_GAP}({_MORE}))*(\.\w+)?",
    re.IGNORECASE | re.ASCII,
)
ONLY = re.compile(
    rf"((acceptable|prohibited|{_MORE}){_GAP})*(notices?|copying|copyrights?|terms|third|(un)?licen[cs]es?|eula|polic(y|ies)).*",
    re.IGNORECASE | re.ASCII,
)
# Of such words a text of terms has two at least.
LEGAL = (
    *("copyright", "hereby", "warrant", "liabilit", "redistribut", "sublicens", "licensor", "licensee", "permission"),
    *("license agreement", "terms and conditions", "terms of use", "acceptable use", "prohibited use"),
    *("许可", "授权", "协议", "版权", "免责", "許可", "授權", "協議", "版權"),  # Chinese, both scripts
    *("ライセンス", "著作権", "許諾", "라이선스", "저작권", "лиценз", "авторск", "urheberrecht", "haftung", "lizenz"),
    *("droits d'auteur", "responsabilité", "licencia", "derechos de autor", "responsabilidad"),
)
READ = 1 << 18  # characters of a text that are looked at
LEAST = 500  # characters of terms; a licence's key, and whose it is, takes less
NO_TERMS = re.compile(r"key|token|secret|password", re.IGNORECASE)  # a licence's key is not for others
TERMS_ENDINGS = ("", ".txt", ".md", ".rst", ".pdf", ".lesser")
# What stays behind and is told of: a browser runs what pages say, an office what documents say; and what is no text.
PAGES = (".html", ".htm", ".xhtml", ".svg", ".doc", ".docx", ".odt", ".rtf")
LARGEST_TERMS = 10_000_000  # bytes; what is larger is no text for people


def may_be_terms(path: Path) -> bool:
    """Whether a file is called like such terms, as text or PDF, and no larger than they are."""
    return names_terms(path) and path.is_file() and path.stat().st_size <= LARGEST_TERMS


def is_terms(path: Path) -> bool:
    """Whether a file that may be such terms is some: by its name alone, or by what it says as well."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", path.name)  # LicenseAgreement.txt
    named = TERMS.fullmatch(words) is not None
    return (named and (ONLY.match(words) is not None or path.suffix.lower() == ".pdf")) or _reads_as_terms(path)


def _reads_as_terms(path: Path) -> bool:
    text = ""
    with suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
        text = " ".join(file.read(READ).lower().split())
    return len(text) >= LEAST and sum(word in text for word in LEGAL) >= 2


def stays(path: Path) -> bool:
    """Whether what is called like terms stays behind, and a person may miss it."""
    if not called_terms(path):
        return False
    kind = path.suffix.lower() in PAGES or path.is_dir()
    return kind or (names_terms(path) and path.is_file() and path.stat().st_size > LARGEST_TERMS)


def names_terms(path: PurePath) -> bool:
    """Whether a file of that name would have such terms."""
    return called_terms(path) and (path.suffix.lower() in TERMS_ENDINGS or path.suffix[1:].isdecimal())


def called_terms(path: PurePath) -> bool:
    """The same whatever kind of file it is."""
    return CALLED.match(path.name) is not None and NO_TERMS.search(path.name) is None
