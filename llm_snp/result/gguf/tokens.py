"""The tokenizer of a result as fields of a GGUF file, for the kinds that llama.cpp has under a name.

Which kind it is is told by what its pre-tokenizer does, not by the model's name: every row is tried with the engine in
`tests/result/test_gguf_tokens.py`. The fields of another GGUF file can be taken over as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFReader, GGUFWriter, TokenType

from ...dense.tokenizer import load_tokenizer
from ...errors import CheckpointError, OptionError, UnsupportedModelError
from ...system.libraries import explained

FROM = "--tokenizer-from DENSE.gguf takes the tokenizer of the dense model's GGUF file"
PREFIX = "tokenizer."
KNOWN = frozenset(value for name, value in vars(gguf.Keys.Tokenizer).items() if not name.startswith("_"))
TEMPLATE = f"{gguf.Keys.Tokenizer.CHAT_TEMPLATE}."  # before the name of one of several
EACH = (gguf.Keys.Tokenizer.SCORES, gguf.Keys.Tokenizer.TOKEN_TYPE)  # what every token has
WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
# How a text is split before its bytes are merged -> `tokenizer.ggml.pre`; "" is the expression of GPT-2.
BYTE_LEVEL: dict[tuple[str, ...], str] = {
    ("",): "gpt-2",
    ("digits", ""): "smollm",
    (f"{WORDS}\\p{{N}}{REST}",): "qwen2",
    (f"{WORDS}\\p{{N}}{{1,3}}{REST}",): "dbrx",
}
# The same where a word that is a token is not merged.
WHOLE_WORDS = {"dbrx": "llama-bpe"}
SPECIAL = ("bos", "eos", "unk", "pad")
SPACE = "▁"


def add_tokenizer(writer: GGUFWriter, directory: Path, vocabulary: int) -> list[str]:
    """Add the tokenizer of a result, of a model with embeddings for `vocabulary` tokens, and return those.

    Raises `UnsupportedModelError` for one that llama.cpp has no name for, `CheckpointError` if it does not load or has
    more tokens than the model.
    """
    tokenizer = load_tokenizer(directory)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            f"the tokenizer of {directory} is in Python only, which llama.cpp cannot run; {FROM}"
        )
    fields = json.loads(backend.to_str())
    kind, pre, spaced = _kind(fields)
    if kind is None:
        raise UnsupportedModelError(f"the tokenizer of {directory} is none that is known here ({pre}); {FROM}")
    tokens, types = _tokens(fields, vocabulary, directory, byte_level=kind == "gpt2")
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    merges = [
        tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in fields["model"]["merges"]
    ]
    if kind == "gpt2":
        # A space within a token is written as the character that stands for its byte.
        writer.add_token_merges([" ".join(part.replace(" ", "Ġ") for part in merge) for merge in merges])
    else:
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(spaced)
    writer.add_token_types(types)
    for name in SPECIAL:
        found = getattr(tokenizer, f"{name}_token_id", None)
        if found is not None:
            getattr(writer, f"add_{name}_token_id")(found)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        with explained(lambda why: CheckpointError(f"{directory} has a chat template that is none ({why}); mend it")):
            json.dumps(template, ensure_ascii=False).encode()  # half of a surrogate pair is no character
            writer.add_chat_template(template)
    return tokens


def _kind(fields: Mapping[str, Any]) -> tuple[str | None, str, bool]:
    """llama.cpp's kind of tokenizer and of pre-tokenizer, and whether a space is put in front; None and why not."""
    model = fields["model"]
    if model["type"] != "BPE":
        return None, f"a model of type {model['type']}", False
    normalizer, steps = fields.get("normalizer"), _sequence(fields.get("pre_tokenizer"), "pretokenizers")
    if model.get("byte_fallback"):
        return _sentencepiece(_sequence(normalizer, "normalizers"), steps)
    # llama.cpp does not compose characters: the same for text that is composed, as most is.
    if normalizer is not None and any(one["type"] != "NFC" for one in _sequence(normalizer, "normalizers")):
        return None, f"a normalizer {_types(_sequence(normalizer, 'normalizers'))}", False
    if any(step.get("add_prefix_space") for step in steps):
        return None, "a space is put in front", False
    splits = tuple(filter(lambda part: part is not None, (_split(step) for step in steps)))
    pre = BYTE_LEVEL.get(splits)  # type: ignore[arg-type]
    if pre is None or not any(step["type"] == "ByteLevel" for step in steps):
        return None, f"a pre-tokenizer {_types(steps) or 'that is missing'}", False
    if model.get("ignore_merges"):
        pre = WHOLE_WORDS.get(pre)
        if pre is None:
            return None, "its words are not merged where they are tokens", False
    return "gpt2", pre, False


def _split(step: Mapping[str, Any]) -> str | None:
    """What a step of a pre-tokenizer splits at: an expression, "digits", or "" for that of GPT-2; None: nothing."""
    if step["type"] == "ByteLevel":
        return "" if step.get("use_regex", True) else None
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digits"
    isolated = step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]
    return step["pattern"].get("Regex", "?") if isolated else "?"


def _sentencepiece(
    normalizers: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]
) -> tuple[str | None, str, bool]:
    """The same of a SentencePiece model, as Llama 2, Mistral and Gemma have it."""
    spaces = [one for one in normalizers if one["type"] == "Replace" and one["content"] == SPACE]
    front = [one for one in normalizers if one["type"] == "Prepend" and one["prepend"] == SPACE]
    for step in steps:
        if step["type"] == "Metaspace" and step["replacement"] == SPACE and not step.get("split", True):
            spaces.append(step)
            front += [step] * (step.get("prepend_scheme", "always") != "never")
        # Gemma's: it splits at spaces where there are none any more.
        elif not (step["type"] == "Split" and step["pattern"] == {"String": " "} and spaces):
            return None, f"a pre-tokenizer {_types(steps)}", False
    if len(spaces) != 1 or len(spaces) + len(front) < len(normalizers):
        return None, f"a normalizer {_types(normalizers)}", False
    return "llama", "default", bool(front)


def _sequence(part: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer."""
    if part is None:
        return []
    return [step for one in part[name] for step in _sequence(one, name)] if part["type"] == "Sequence" else [part]


def _types(steps: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{step['type']} {step.get('pattern', {}).get('Regex', '')}".strip() for step in steps)


def _tokens(
    fields: Mapping[str, Any], vocabulary: int, directory: Path, byte_level: bool
) -> tuple[list[str], list[TokenType]]:
    """Text and type of every token; rows of the embedding that have none get names of their own."""
    model = fields["model"]
    names = {index: text for text, index in model["vocab"].items()}
    added = {one["id"]: one for one in fields.get("added_tokens", ())}
    names |= {index: one["content"] for index, one in added.items()}
    if names and max(names) >= vocabulary:
        raise CheckpointError(
            f"the tokenizer of {directory} has tokens up to {max(names)}, and the model embeddings for {vocabulary}; "
            "put the dense model's tokenizer there"
        )
    types = [TokenType.NORMAL] * vocabulary
    for index in range(vocabulary):
        if index not in names:
            names[index], types[index] = f"[PAD{index}]", TokenType.UNUSED
        elif index in added:
            types[index] = TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
        elif not byte_level and len(names[index]) == 6 and names[index].startswith("<0x"):
            types[index] = TokenType.BYTE
        if not byte_level and names[index] == model.get("unk_token"):
            types[index] = TokenType.UNKNOWN
    return [names[index] for index in range(vocabulary)], types


def _scores(tokens: Sequence[str], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """Of each token, so that llama.cpp, which joins what scores highest first, merges in the order of `merges`."""
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        first.setdefault("".join(merge), rank)
    return [-float(first.get(token, len(merges))) for token in tokens]


class _Reader(GGUFReader):  # type: ignore[misc]
    """One that ends where the file ends, whatever sizes this claims."""

    def _get(self, offset: Any, dtype: Any, count: Any = 1, *rest: Any, **more: Any) -> Any:
        found = super()._get(offset, dtype, count, *rest, **more)
        if len(found) < count:
            raise ValueError("it ends too early")
        return found


def copy_tokenizer(writer: GGUFWriter, path: Path, vocabulary: int) -> list[str]:
    """Take the tokenizer fields of another GGUF file as they are, and return its tokens.

    Raises `OptionError` if it is none, has no tokenizer, or one for another number of tokens.
    """

    def refusal(cause: str) -> OptionError:
        return OptionError(f"--tokenizer-from {path} is no GGUF file that can be read ({cause})")

    with explained(refusal):
        fields = {name: field for name, field in _Reader(path).fields.items() if name.startswith(PREFIX)}
        contents = {name: field.contents() for name, field in fields.items()}
    tokens = contents.get(gguf.Keys.Tokenizer.LIST)
    if tokens is None:
        raise OptionError(f"--tokenizer-from {path} has no tokenizer; give the GGUF file of the dense model")
    array, texts = gguf.GGUFValueType.ARRAY, [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING]
    for name, field in list(fields.items()):
        known = name in KNOWN or name.startswith(TEMPLATE)
        if not known and field.types[-1] == gguf.GGUFValueType.STRING:
            del fields[name]  # such as where it lay on somebody's machine
            continue
        listed = field.types[0] == array
        if (name == gguf.Keys.Tokenizer.LIST and field.types != texts) or (listed and len(field.types) != 2):
            raise refusal(f"what it has as {name} is no list of texts or numbers")
        if name in EACH and len(contents[name]) != len(tokens):
            raise refusal(f"it has {len(contents[name])} numbers as {name} for {len(tokens)} tokens")
    if len(tokens) != vocabulary:
        raise OptionError(
            f"--tokenizer-from {path} has {len(tokens)} tokens, and the model {vocabulary}; give the GGUF file of the "
            "dense model"
        )
    for name, field in fields.items():
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, contents[name], field.types[0], sub_type)
    return tokens  # type: ignore[no-any-return]
