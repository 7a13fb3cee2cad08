"""The tokenizer of a model directory: loaded where its files say all, and lead transformers to no code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..system.libraries import explained, parse_json
from .claims import shown
from .hub import load_config

# Transformers takes what is in the second for settings, too.
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
HANDED_ON = ("sp_model_kwargs",)  # to sentencepiece, which reads data
# Tokens that some classes make up beside those of the vocabulary: so many they may be asked for at most.
MADE_UP, MOST_MADE_UP = ("extra_ids", "offset"), 10_000
MOST_TOKENS = 2**22  # for each number below the highest there is a token, and some classes make up those that miss


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory.

    Raises `CheckpointError` if it has none that loads, one whose settings are for another package, or one that is made
    of others.
    """
    from transformers import AutoTokenizer

    found = check_tokenizer(directory)
    config = {} if found is None else {"config": found}  # or it reads the config by itself, as it is

    advice = "copy the tokenizer files of the original model beside the weights"

    def refusal(cause: str) -> CheckpointError:
        return CheckpointError(f"{directory} has no tokenizer that loads ({cause}); {advice}")

    with explained(refusal):
        with _known_unknown(directory):
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, **config)
            tokenizer.all_special_ids  # noqa: B018 - some are only looked for when they are asked for
        ids = tokenizer("the", add_special_tokens=False)["input_ids"]
    _without_chance(tokenizer)
    # Without files transformers 5 gives a tokenizer with an empty vocabulary and no error.
    # Some classes have special tokens all the same, and one for a space.
    if not ids or {token for token in tokenizer.get_vocab() if token.strip("▁Ġ ")} <= set(tokenizer.all_special_tokens):
        raise CheckpointError(f"{directory} has no tokenizer: it has no vocabulary file; {advice}")
    return tokenizer


@contextmanager
def _known_unknown(directory: Path) -> Iterator[None]:
    """Raise `CheckpointError` where transformers looks for the token of what is unknown by itself, as it is none.

    The first conversions of LLaMA had all special tokens empty, and so have copies of them.
    """
    try:
        yield
    except RecursionError as error:
        for name in SETTINGS:
            with suppress(OSError, ValueError):
                fields = parse_json((directory / name).read_bytes())
                token = fields.get("unk_token") if isinstance(fields, dict) else None
                if token == "" or (isinstance(token, dict) and token.get("content") == ""):
                    raise CheckpointError(
                        f'{directory / name} has an empty "unk_token", and transformers needs one of the vocabulary; '
                        'give it that of the model, such as "<unk>", and likewise "bos_token" and "eos_token"'
                    ) from error
        raise


def check_tokenizer(directory: Path) -> Any:
    """Raise `CheckpointError` for a tokenizer whose files lead elsewhere: to a package, other folders, or nowhere.

    Loads nothing. Returns the config of the model, if there is one.
    """
    _check_files(directory)
    _check_settings(directory)
    config = load_config(directory) if (directory / "config.json").is_file() else None
    _check_single(directory, config)
    return config


def _check_files(directory: Path) -> None:
    """Raise `CheckpointError` for what never ends: transformers opens files of many names."""
    with suppress(OSError):  # others say what is wrong with the directory
        for path in directory.iterdir():
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise CheckpointError(f"{path} is a pipe or a device, and no file that ends; remove it")


def _without_chance(tokenizer: Any) -> None:
    """Leave no words out by chance, as some tokenizers do for training: a text has the same tokens each time."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and getattr(backend.model, "dropout", None):
        backend.model.dropout = None


def _check_settings(directory: Path) -> None:
    """Raise `CheckpointError` for settings that transformers hands on to a package of its own for the language, and for
    those by which it would make up more tokens than there can be.

    Such a package may follow them to a library that it loads (`sudachi_kwargs`). What is not JSON others refuse.
    """
    for name in SETTINGS:
        path = directory / name
        try:
            fields = parse_json(path.read_bytes())
        except (OSError, ValueError):
            continue
        for field, value in fields.items() if isinstance(fields, dict) else ():
            if field in MADE_UP and isinstance(value, int) and value > MOST_MADE_UP:
                raise CheckpointError(
                    f"{field} is {shown(value)} in {path}, tokens to make up beside the vocabulary; it must be at most "
                    f"{MOST_MADE_UP}"
                )
            numbers = value if field == "added_tokens_decoder" and isinstance(value, dict) else ()
            if highest := next((number for number in numbers if _beyond(number)), None):
                raise CheckpointError(
                    f"{path} has a token of number {shown(highest)}; numbers must be below {MOST_TOKENS}"
                )
            by_chance = isinstance(value, dict) and value.get("enable_sampling")  # sentencepiece would draw the tokens
            handed_on = field in HANDED_ON and not by_chance
            if value and not handed_on and (field == "init_inputs" or field.endswith("_kwargs")):
                raise CheckpointError(
                    f"{path} has {shown(field)}, settings for another package, which may follow them to code; llm_snp "
                    "reads tokenizers whose files say all: take it out, or save the tokenizer as a tokenizer.json"
                )


def _beyond(number: str) -> bool:
    """Whether a token's number, as JSON has it, is one that no vocabulary reaches."""
    return number.isdecimal() and (len(number) > len(str(MOST_TOKENS)) or int(number) >= MOST_TOKENS)


def _check_single(directory: Path, config: Any) -> None:
    """Raise `CheckpointError` for a class that loads other tokenizers (RAG's), from folders that nobody has looked at.

    The class is what the tokenizer's settings or the config name, or belongs to a type of model, of which a config may
    hold several.
    """
    from transformers import PretrainedConfig, PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    names: list[Any] = []
    settings = directory / "tokenizer_config.json"
    with suppress(OSError, ValueError):  # others say what is wrong with the file
        fields = parse_json(settings.read_bytes())
        names = [fields.get("tokenizer_class")] if isinstance(fields, dict) else []
    left = [config]
    while left:
        one = left.pop()
        of_type = TOKENIZER_MAPPING_NAMES.get(getattr(one, "model_type", None))
        names += [getattr(one, "tokenizer_class", None), *([of_type] if isinstance(of_type, str) else of_type or ())]
        left += [part for part in vars(one).values() if isinstance(part, PretrainedConfig)] if one is not None else []
    for name in names:
        found = tokenizer_class_from_name(name) if isinstance(name, str) else None
        stand_in = hasattr(found, "_backends")  # for a class whose package is missing; it says so when it is called
        if isinstance(found, type) and not issubclass(found, PreTrainedTokenizerBase) and not stand_in:
            raise CheckpointError(
                f"the tokenizer of {directory} is a {name}, which is made of other tokenizers; llm_snp reads those "
                'whose files say all: save the one of this model as a tokenizer.json, with "tokenizer_class": '
                '"PreTrainedTokenizerFast"'
            )
