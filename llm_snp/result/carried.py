"""What of the dense model's directory travels with a result: tokenizer, chat templates, terms of use.

All of it is data. What transformers would follow to code, to a kernel or to a file elsewhere is taken out, and a result
names no code but its own `modeling_snp.py`: whoever trusts us with `trust_remote_code` trusts no stranger.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from ..dense.terms import is_terms, may_be_terms, names_terms, stays
from ..dense.tokenizer import load_tokenizer
from ..errors import CheckpointError
from ..system.files import digest_of_bytes, digest_of_json, disk, scratch
from ..system.libraries import explained
from ..system.plain import encodable
from ..system.private import within
from .sentencepiece import without_places
from .settings import GENERATION, SETTINGS, as_file, content_of, read_object, says_twice, without_code

# Files in which transformers and llama.cpp's tools look for tokenizers, and what `generate` begins with.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    GENERATION,
)
SENTENCEPIECE = ("tokenizer.model", "tokenizer.model.v3", "spiece.model", "sentencepiece.bpe.model")
TEMPLATES = "additional_chat_templates"  # folder of transformers for templates with a name
TOKENIZER = "tokenizer_config.json"
# Text by which two tokenizers are told apart.
PROBE = (
    " The 3 quick brown foxes\n\tran; 12.5 % over naïve 雪 in 1999 and 20235x.  <s>[INST]x</s> I'll DON'T we've  "
    "snake_case camelCase x=1+2;\r\n\n\n  e\u0301 ﬁ ½ 🙂 a\u00a0b ▁ Ġ lead"
)


class Carried:
    """The files that travel, by their name in the result, read once.

    directory: of the dense model; config: what its config.json says, but for what must not travel; left: names of terms
    of use that stay there, because they may have scripts, or are a folder, or too large for text; unclear: of files
    that may be a person's own. Raises `CheckpointError` for what cannot be read or is not what it should be, links that
    lead out of the directory, and a tokenizer whose class is code of the directory.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.config = without_code(read_object(directory / "config.json", content_of(directory / "config.json")))
        check_tokenizer_class(directory)
        found = [path for name in TOKENIZER_FILES if (path := directory / name).is_file()]
        found += sorted(path for path in (directory / TEMPLATES).glob("*.jinja") if path.is_file())
        called = sorted(path for path in directory.iterdir() if may_be_terms(path))
        terms = [path for path in called if is_terms(path)]
        found += terms
        named = {path.relative_to(directory).as_posix(): path for path in found}
        self.files = {name: self._read(path) for name, path in named.items() if travels(name)}
        self.left = sorted(path.name for path in directory.iterdir() if stays(path))
        self.unclear = [path.name for path in called if path not in terms]

    def _read(self, path: Path) -> bytes:
        if not (encodable(path.name) and path.name.isprintable()):
            raise CheckpointError(
                f"{str(path)!a} would travel with the result, and the Hub takes no file of such a name; rename it"
            )
        if not within(path, self.directory):
            raise CheckpointError(
                f"{path} is a link out of the model's directory, and would travel with the result; put the file itself "
                "there"
            )
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        if path.name in SENTENCEPIECE:
            return without_places(content)
        if path.name not in SETTINGS:
            return content
        fields = read_object(path, content)
        clean = without_code(fields, path.name)
        if path.name == GENERATION:
            _check_generation(path, clean)
        return content if clean == fields and not says_twice(content) else as_file(clean)

    @property
    def digest(self) -> str:
        """One hash over all of it."""
        return digest_of_json({name: digest_of_bytes(content) for name, content in self.files.items()})

    def check(self, tokenizer: Any, pruned_type: str | None = None) -> None:
        """Raise `CheckpointError` unless the tokenizer that travels is `tokenizer`, the dense model's.

        pruned_type: the `model_type` that the result may have, by which transformers chooses a tokenizer's class, too.
        Where it would choose another one, the settings that travel name the class from here on. Raises `OutputError` if
        there is no room to try it, in the system's directory for temporary files.
        """
        fields = self.config
        advice, dense = "save it with `save_pretrained` of its own class, and give that", _told_apart_by(tokenizer)
        if self._travelling(fields, advice) != dense:
            raise CheckpointError(
                f"the tokenizer of {self.directory} is another one without what its settings name outside of the "
                f"directory, or keep secret; {advice}"
            )
        pruned = fields | {"model_type": pruned_type, "tokenizer_class": class_of(tokenizer)}
        if pruned_type is None or self._travelling(pruned, advice) == dense:
            return
        path = self.directory / TOKENIZER
        settings = read_object(path, self.files[TOKENIZER]) if TOKENIZER in self.files else {}
        self.files[TOKENIZER] = as_file(settings | {"tokenizer_class": class_of(tokenizer)})
        if any(self._travelling(config, advice) != dense for config in (fields, pruned)):
            raise CheckpointError(
                f"the tokenizer of {self.directory} is another one for transformers where the model is of type "
                f"{pruned_type}, as a result is; {advice}"
            )

    def _travelling(self, config: Mapping[str, Any], advice: str) -> tuple[Any, ...]:
        """What the tokenizer that travels is told by where it lies beside a config."""
        with scratch() as folder, disk(folder):
            (folder / TEMPLATES).mkdir()
            for file, content in (self.files | {"config.json": json.dumps(config).encode()}).items():
                (folder / file).write_bytes(content)
            try:
                return _told_apart_by(load_tokenizer(folder))
            except CheckpointError as error:
                raise CheckpointError(
                    f"the tokenizer of {self.directory} needs more than the files that travel with a result "
                    f"({', '.join(self.files) or 'there are none'}); {advice}"
                ) from error


def class_of(tokenizer: Any) -> str:
    """The class of a tokenizer as settings name it.

    TokenizersBackend is what transformers 5 calls PreTrainedTokenizerFast, which both major versions know.
    """
    return type(tokenizer).__name__.replace("TokenizersBackend", "PreTrainedTokenizerFast")


def _told_apart_by(tokenizer: Any) -> tuple[Any, ...]:
    """What two tokenizers of a model have in common: tokens, which are special, what they make of a text, and how."""
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    probe = PROBE + "".join(f" the{token}the {token} the" for token in sorted(tokenizer.all_special_tokens))
    made: Any
    try:
        with explained(CheckpointError):
            made = tokenizer(probe)["input_ids"]
    except CheckpointError as error:  # one that does not know every word; then neither does
        made = str(error)
    return tokenizer.get_vocab(), added, special, made, _stages(tokenizer)


def _stages(tokenizer: Any) -> Any:
    """How a text becomes words before tokens are looked up, and text again: no probe has every case of it.

    None where the library cannot say.
    """
    with suppress(CheckpointError), explained(CheckpointError):
        stages = json.loads(tokenizer.backend_tokenizer.to_str())
        return [stages[name] for name in ("normalizer", "pre_tokenizer", "decoder")]
    return None


def _check_generation(path: Path, fields: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for what `generate` begins with and transformers would not load a model with, or not
    write a text with: it looks at some of it only then.
    """
    import torch
    from transformers import GenerationConfig, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

    with explained(lambda cause: CheckpointError(f"{path} is refused by transformers ({cause}); mend or remove it")):
        settings = GenerationConfig.from_dict(dict(fields))
        if settings.repetition_penalty not in (None, 1):
            RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)
        if settings.no_repeat_ngram_size is not None and settings.no_repeat_ngram_size > 0:
            NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size)
        for token in (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id):
            torch.tensor([] if token is None else token, dtype=torch.long)


def travels(name: str) -> bool:
    """Whether a file of that name, in a result, is one that `Carried` has brought there."""
    path = PurePosixPath(name)
    template = path.parent.name == TEMPLATES and len(path.parts) == 2 and path.suffix == ".jinja"
    return name in TOKENIZER_FILES or template or (len(path.parts) == 1 and names_terms(path))


def check_tokenizer_class(directory: Path) -> None:
    """Raise `CheckpointError` if the tokenizer is a class that only code of the directory has."""
    settings = directory / "tokenizer_config.json"
    fields = read_object(settings, content_of(settings)) if settings.is_file() else {}
    named = fields.get("auto_map")
    if named is None:
        maps = read_object(directory / "config.json", content_of(directory / "config.json")).get("auto_map")
        named = maps if isinstance(maps, dict) and "AutoTokenizer" in maps else None
    reference = named.get("AutoTokenizer") if isinstance(named, dict) else named
    if not reference:
        return
    first = next((one for one in reference if one), "") if isinstance(reference, list) else reference
    name = fields.get("tokenizer_class") or str(first).rpartition(".")[2]
    if not isinstance(name, str) or not any(tokenizer_class_from_name(name + fast) for fast in ("", "Fast")):
        raise CheckpointError(
            f"the tokenizer of {directory} is {name}, a class of its own code ({first}), which llm_snp does not run "
            "and a result does not carry; if tokenizer.json says all of it, take auto_map out of tokenizer_config.json "
            'and set "tokenizer_class": "PreTrainedTokenizerFast"'
        )
