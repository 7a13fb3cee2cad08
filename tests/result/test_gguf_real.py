"""A small Llama that writes English, pruned, exported, and run by llama.cpp: what a newcomer does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Prune, load
from llama_cpp import ask
from transformers import AutoTokenizer

from llm_snp.cli import main

pytest.importorskip("gguf", reason="the package gguf is not installed")
xllamacpp = pytest.importorskip("xllamacpp", reason="the package xllamacpp, llama.cpp's wheel, is not installed")

ROOT = Path(__file__).parent.parent.parent
LENGTH = 256
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def result(prune: Prune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With heads and neurons of its own in every block."""
    folder = tmp_path_factory.mktemp("gguf")
    text = folder / "text.txt"
    text.write_text((ROOT / "docs" / "method.md").read_text())
    model = ROOT / "benchmarks" / "models" / "llama-wiki-1m"
    prune(model, folder / "small", 0.3, attention="heads", calibration=str(text), samples=8, sequence_length=64)
    tokenizer = AutoTokenizer.from_pretrained(folder / "small", trust_remote_code=False)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "small")
    return folder / "small"


def file(result: Path, kind: str) -> Path:
    path = result.parent / f"{kind}.gguf"
    if not path.exists():
        assert main(["export", str(result), "--gguf", str(path), "--type", kind, "--quiet"]) == 0
    return path


@pytest.fixture(scope="module")
def model(result: Path) -> Any:
    return load(result)


@pytest.fixture(scope="module")
def english() -> str:
    """English, of which the result has not seen anything."""
    return (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()


def windows(model: Any, ids: list[int]) -> list[tuple[list[int], np.ndarray]]:
    """A few windows, and the log-probabilities (T, vocabulary) that the checkpoint gives them."""
    found = []
    for start in range(0, 3 * LENGTH, LENGTH):
        window = ids[start : start + LENGTH]
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0].double()
        found.append((window, logits.log_softmax(-1).numpy()))
    return found


def perplexity(ids: list[int], log_probabilities: np.ndarray) -> float:
    return float(np.exp(-log_probabilities[np.arange(len(ids) - 1), ids[1:]].mean()))


@pytest.mark.parametrize(("kind", "limit"), [("f32", 1e-2), ("f16", 5e-2), ("bf16", 3e-1), ("q8_0", 5e-1)])
def test_the_same_text_costs_the_same(kind: str, limit: float, result: Path, model: Any, english: str) -> None:
    """The engine splits it into the same tokens, gives them the same log-probabilities, and goes on alike."""
    ids = AutoTokenizer.from_pretrained(result)(english)["input_ids"]
    expected = windows(model, ids)
    start = ids[:40]
    requests = [["log_probabilities", window] for window, _ in expected]
    split, greedy, *found = ask(file(result, kind), ["tokenize", english], ["greedy", start, 16], *requests)
    assert split.tolist() == ids
    for (window, log_probabilities), one in zip(expected, found, strict=True):
        assert np.abs(one - log_probabilities).max() < limit
        assert perplexity(window, one) == pytest.approx(perplexity(window, log_probabilities), rel=0.01)
    if kind in ("f32", "f16"):
        new = model.generate(torch.tensor([start]), max_new_tokens=16, do_sample=False, eos_token_id=None)
        assert greedy.tolist() == new[0, len(start) :].tolist()


@pytest.fixture(scope="module")
def server(result: Path) -> Any:
    """llama.cpp's own server, as people run it."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file(result, "f16"))
    parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.fit_params = 512, 1, False, False
    parameters.cpuparams.n_threads = 1
    return xllamacpp.Server(parameters)


def test_a_chat_goes_by_the_template(server: Any, result: Path, model: Any) -> None:
    messages = [{"role": "user", "content": "The city of"}]
    tokenizer = AutoTokenizer.from_pretrained(result)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    new = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
    answer = server.handle_chat_completions({"messages": messages, "max_tokens": 4, "temperature": 0})
    assert answer["usage"]["prompt_tokens"] == ids.shape[1]
    assert answer["choices"][0]["message"]["content"].strip() == tokenizer.decode(new).strip()
