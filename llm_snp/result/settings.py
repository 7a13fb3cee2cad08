"""Settings of strangers (of models, tokenizers, `generate`) without what leads to code or a place, or is secret."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..dense.claims import ELSEWHERE
from ..dense.tokenizer import SETTINGS as TOKENIZER_SETTINGS
from ..errors import CheckpointError
from ..system.libraries import parse_json, reason
from ..system.plain import encodable
from ..system.private import PLACE, has_address, is_private

GENERATION = "generation_config.json"
SETTINGS = (*TOKENIZER_SETTINGS, GENERATION)
# Fields that transformers follows to code: classes of a repository (`auto_map` in configs of models, tokenizers and
# processors, `custom_pipelines` of `pipeline`, `custom_generate` of `generate`), and kernels of the Hub.
CODE = frozenset(
    (
        "auto_map",
        "custom_pipelines",
        "custom_generate",
        "trust_remote_code",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "_attn_implementation_autoset",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "use_kernels",
        "kernel_config",
    )
)
# Fields that say where something lay on the machine of whoever saved it, and by which the weights would be others.
PLACES = frozenset(
    (
        *("name_or_path", "_name_or_path", "_commit_hash", "configuration_files", "fast_tokenizer_files", "gguf_file"),
        *ELSEWHERE,
    )
)
PLACE_ENDINGS = ("_file", "_name_or_path")
# What holds a secret, whatever that looks like, with words that are told apart by "_".
SECRETS = re.compile(
    r"(?i:^(token|authorization|(set_)?cookies?)$|"
    r"(^|_)(api_?keys?|secrets?|pass(wd|word|phrase)s?|credentials?|private_?keys?|access_?keys?(_id)?|connection_?string|"
    r"(access|auth|oauth|private|hub|hf|api|bearer|github|gitlab|session|refresh)_?tokens?)(_|$)|[a-z0-9]_keys?$)|"
    r"^[A-Z0-9_]*_(TOKEN|PASS|PAT|PWD)$"  # as variables of an environment are called
)
# Who ran what made it, and where.
PEOPLE = re.compile(
    r"(?i:(^|_)(users?(_id|_name)?|username|log_?name|logins?|owner|uploader|submitter|"
    r"hosts?|(host|node)_?names?|e_?mails?(_address(es)?)?)$|"
    r"(^|_)(\w+ed|made|ran|run|built|written)_by$)"
)
OF_A_DIALOGUE = frozenset(("user", "users", "host", "hosts", "owner"))  # whom a tokenizer may have a word for
WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[-. ]")  # begins at it: clientSecret, api-key
TEMPLATE_FIELD = "chat_template"
WORDS = ("content", TEMPLATE_FIELD, "template")  # what a tokenizer reads or writes, whatever it looks like


def without_code(fields: Any, file: str = "config.json", taken: list[str] | None = None) -> Any:
    """A copy of parsed JSON without the fields that name code, a place on a machine or a token, at any depth.

    file: the name of the file that it is of; taken: gets the names of these fields, "" for one of a list.
    """

    def stays(name: Any, value: Any) -> bool:
        goes = _names_code(name, value, file)
        if goes and taken is not None:
            taken.append(str(name or ""))
        return not goes

    if isinstance(fields, Mapping):
        return {name: without_code(one, file, taken) for name, one in fields.items() if stays(name, one)}
    if isinstance(fields, (list, tuple)):
        return [without_code(one, file, taken) for one in fields if stays(None, one)]
    return fields


def taken_out(fields: Any, file: str) -> list[str]:
    """The names of the fields that `without_code` takes out."""
    found: list[str] = []
    without_code(fields, file, found)
    return found


def _names_code(name: Any, value: Any, file: str) -> bool:
    if name in CODE or name in PLACES:
        return True
    if isinstance(name, str) and (name.endswith(PLACE_ENDINGS) or _is_secret(name) or is_private(name)):
        return True
    if _says_who(name, value, file in TOKENIZER_SETTINGS):
        return True
    if not isinstance(value, str) or not is_private(value):
        return False
    words = name in WORDS and file in TOKENIZER_SETTINGS
    return not words or (name == TEMPLATE_FIELD and PLACE.fullmatch(value) is not None)


def _says_who(name: Any, value: Any, of_tokenizer: bool) -> bool:
    if isinstance(name, str) and not isinstance(value, (int, float)) and PEOPLE.search(WORD.sub("_", name)):
        return not (of_tokenizer and name in OF_A_DIALOGUE)
    words = of_tokenizer and name in WORDS
    return not words and any(isinstance(one, str) and has_address(one) for one in (name, value))


def _is_secret(name: str) -> bool:
    return any(SECRETS.search(one) for one in (name, WORD.sub("_", name)))


def read_object(path: Path, content: bytes) -> dict[str, Any]:
    """A JSON object. Raises `CheckpointError` if `content`, of the file `path`, is none."""
    try:
        fields = parse_json(content)
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({reason(error)}); download it again") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} is no JSON object, as transformers writes it; download it again")
    try:
        without_code(fields)
    except RecursionError as error:
        raise CheckpointError(f"{path} is nested too deeply; download it again") from error
    return fields


def says_twice(content: bytes) -> bool:
    """Whether an object of JSON has a name twice, of which all readers see the last."""
    found = False

    def look(pairs: list[tuple[str, Any]]) -> None:
        nonlocal found
        found = found or len({name for name, _ in pairs}) < len(pairs)

    json.loads(content, object_pairs_hook=look)
    return found


def as_file(fields: Mapping[str, Any]) -> bytes:
    """Settings as a file has them: half of a surrogate pair, which is no character, only as JSON spells it."""
    text = json.dumps(fields, indent=2, ensure_ascii=False)
    return ((text if encodable(text) else json.dumps(fields, indent=2)) + "\n").encode()


def content_of(path: Path) -> bytes:
    """A file as it is. Raises `CheckpointError` if it cannot be read, or never ends."""
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is no regular file; put the file itself there")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
