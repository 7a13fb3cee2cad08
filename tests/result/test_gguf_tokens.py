"""llama.cpp splits and merges a text as the tokenizer of the checkpoint does, for every kind that goes out by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llama_cpp import ask
from pruned_models import save_pruned
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llm_snp.system.progress import Progress

pytest.importorskip("gguf", reason="the package gguf is not installed")
pytest.importorskip("xllamacpp", reason="the package xllamacpp, llama.cpp's wheel, is not installed")
export = pytest.importorskip("llm_snp.result.gguf.writing").export
tokens = pytest.importorskip("llm_snp.result.gguf.tokens")

ROOT = Path(__file__).parent.parent.parent
TEXTS = [
    "The 3 quick brown foxes\n\tran; 12.5 % über naïve 雪.",
    "  two spaces,   three; can't WON'T we'll I'D\r\n\r\n\n 2026-10-01 costs $1234567",
    "def f(x):\n    return x ** 2  # ünïcödé 🙂\n",
]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
WORDS, REST = tokens.WORDS, tokens.REST


def split(expression: str) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), byte_level])


gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
KINDS: dict[str, tuple[Any, bool]] = {
    "gpt-2": (gpt2, False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]), False),
    "qwen2": (split(f"{WORDS}\\p{{N}}{REST}"), False),
    "dbrx": (split(f"{WORDS}\\p{{N}}{{1,3}}{REST}"), False),
    "llama-bpe": (split(f"{WORDS}\\p{{N}}{{1,3}}{REST}"), True),
}


def written(
    tokenizer: Tokenizer, directory: Path, model: str = "llama", **options: Any
) -> tuple[PreTrainedTokenizerFast, Path]:
    """The tokenizer beside a tiny model, and both as a file for llama.cpp."""
    save_pruned(model, [{"neurons": 33}] * 3, directory, vocab_size=tokenizer.get_vocab_size() + 3)
    for path in directory.glob("tokenizer*"):
        path.unlink()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
    fast.save_pretrained(directory)
    path = directory / "out.gguf"
    export(directory, path, "f16", None, Progress(quiet=True))
    return fast, path


def corpus() -> list[str]:
    return [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))] + TEXTS


def test_every_kind_is_tried() -> None:
    assert {*tokens.BYTE_LEVEL.values(), *tokens.WHOLE_WORDS.values()} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_are_merged(kind: str, tmp_path: Path) -> None:
    splitter, whole_words = KINDS[kind]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    if whole_words:
        fields = json.loads(tokenizer.to_str())
        fields["model"]["ignore_merges"] = True
        tokenizer = Tokenizer.from_str(json.dumps(fields))
    fast, path = written(tokenizer, tmp_path, bos_token=special[1], eos_token=special[2], chat_template=TEMPLATE)
    texts = [*TEXTS, "<|im_start|>user\nWhat?<|im_end|>\n"]
    found = ask(path, *(["tokenize", text] for text in texts))
    assert [ids.tolist() for ids in found] == [fast(text)["input_ids"] for text in texts]
    fields = {name: field.contents() for name, field in pytest.importorskip("gguf").GGUFReader(path).fields.items()}
    assert fields["tokenizer.ggml.pre"] == kind
    assert fields["tokenizer.chat_template"] == TEMPLATE
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.ggml.tokens"][-3:] == [f"[PAD{len(fast) + i}]" for i in range(3)]


@pytest.mark.parametrize(
    ("model", "name", "marks"),
    [
        ("phi3", "small", ["<unk>", "<s>", "</s>"]),
        ("phi3", "Phi-3-small", ["<unk>", "<s>", "</s>"]),
        ("phi3", "Phi-4", []),
        ("phi3", "phi3-like", []),
        ("llama", "Phi-3-like", []),
        ("llama", "phi3-like", ["<unk>", "<s>", "</s>"]),
    ],
)
def test_models_that_llama_cpp_knows_by_their_name(model: str, name: str, marks: list[str], tmp_path: Path) -> None:
    """What is called phi-3 needs tokens that Phi-4 has not, and has special tokens that take spaces along."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = gpt2, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    strips = model == "phi3" and bool(marks)
    tokenizer.add_special_tokens([*marks, "<|endoftext|>", AddedToken("<|end|>", rstrip=strips)])
    (tmp_path / name).mkdir()
    fast, path = written(tokenizer, tmp_path / name, model, eos_token="<|endoftext|>")
    text = "The river<|end|>  and the town<|end|>\nend<|endoftext|> of it"
    (found,) = ask(path, ["tokenize", text])
    assert found.tolist() == fast(text)["input_ids"]


@pytest.mark.parametrize("front", ["normalizer", "metaspace", "never"])
def test_sentencepiece(front: str, tmp_path: Path) -> None:
    """As Llama 2 and Mistral have it in two spellings, and as Gemma, which puts no space in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    if front == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    elif front == "never":
        tokenizer.normalizer = replace
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # Words are apart while it is trained: a piece has a space in front only, as SentencePiece makes them.
    lines = [word for text in corpus() for word in text.replace("\n", " ").split()]
    words = [f" {word}" if front != "never" or index % 2 else word for index, word in enumerate(lines)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    normalizer, tokenizer.normalizer = tokenizer.normalizer, replace
    pre, tokenizer.pre_tokenizer = tokenizer.pre_tokenizer, None
    tokenizer.train_from_iterator(words, trainer)
    fields = json.loads(tokenizer.to_str())
    fields["added_tokens"] = [one for one in fields["added_tokens"] if not one["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(fields))
    tokenizer.normalizer = normalizer
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    fast, path = written(tokenizer, tmp_path, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    # This one puts a space in front of texts that begin with none only, and llama.cpp in front of all.
    texts = [text.lstrip() if front == "metaspace" else text for text in TEXTS]
    found = ask(path, *(["tokenize", text] for text in texts))
    assert [ids.tolist() for ids in found] == [fast(text)["input_ids"] for text in texts]
    assert all(ids[0] == 1 for ids in found)
