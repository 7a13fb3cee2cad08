"""llama.cpp on a GGUF file, in a process of its own: it ends the process where a file is not what it should be.

    python llama_cpp.py FILE

reads requests as JSON from standard input, and writes answers as a .npz file to standard output. The functions are
those of llama.cpp's C interface (llama.h) in the wheel `xllamacpp`, whose classes have no probabilities of a prompt.
"""

from __future__ import annotations

import ctypes
import io
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np


class Parameters(ctypes.Structure):
    """More room than the engine's structures need: they are given back as they came, but for the first fields."""

    _fields_ = (("words", ctypes.c_uint32 * 512),)


class Batch(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embedding", ctypes.c_void_p),
        ("position", ctypes.POINTER(ctypes.c_int32)),
        ("sequences", ctypes.POINTER(ctypes.c_int32)),
        ("sequence", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class Engine:
    """A loaded file. Raises `ValueError` if llama.cpp does not load it."""

    def __init__(self, path: str, context: int = 512):
        specification = find_spec("xllamacpp")
        assert specification is not None
        assert specification.origin is not None
        library = ctypes.CDLL(str(next(Path(specification.origin).parent.glob("xllamacpp*.so"))))
        pointer, number = ctypes.c_void_p, ctypes.c_int32
        kinds: dict[str, tuple[Any, list[Any]]] = {
            "llama_model_default_params": (Parameters, []),
            "llama_context_default_params": (Parameters, []),
            "llama_model_load_from_file": (pointer, [ctypes.c_char_p, Parameters]),
            "llama_init_from_model": (pointer, [pointer, Parameters]),
            "llama_model_get_vocab": (pointer, [pointer]),
            "llama_vocab_n_tokens": (number, [pointer]),
            "llama_batch_init": (Batch, [number, number, number]),
            "llama_decode": (number, [pointer, Batch]),
            "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [pointer]),
            "llama_get_memory": (pointer, [pointer]),
            "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
            "llama_model_n_ctx_train": (number, [pointer]),
            "llama_tokenize": (
                number,
                [pointer, ctypes.c_char_p, number, ctypes.POINTER(number), number, ctypes.c_bool, ctypes.c_bool],
            ),
        }
        for name, (result, arguments) in kinds.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.library = library
        self.model = library.llama_model_load_from_file(path.encode(), library.llama_model_default_params())
        if not self.model:
            raise ValueError(f"llama.cpp does not load {path}")
        parameters = library.llama_context_default_params()
        parameters.words[0] = context  # n_ctx
        # Alone on its core; and exact: no flash attention, which has queries in 16 bits, as the cache has the rest.
        exact = {7: (4, 1), 8: (4, 1), 13: (0xFFFFFFFF, 0), 26: (1, 0), 27: (1, 0)}  # threads, flash attention, types
        for index, (usual, wanted) in exact.items():
            assert parameters.words[index] == usual, "llama_context_params has changed"
            parameters.words[index] = wanted
        self.session = library.llama_init_from_model(self.model, parameters)
        if not self.session:
            raise ValueError(f"llama.cpp makes no context for {path}")
        self.vocabulary = library.llama_model_get_vocab(self.model)
        self.tokens = library.llama_vocab_n_tokens(self.vocabulary)
        self.batch = library.llama_batch_init(context, 0, 1)

    def context(self) -> int:
        """Tokens for which the file says the model is made."""
        return int(self.library.llama_model_n_ctx_train(self.model))

    def logits(self, ids: list[int], start: int = 0) -> np.ndarray:
        """(T, vocabulary) after each of `ids`, which are at `start` and after; those before are in the cache."""
        batch = self.batch
        for index, token in enumerate(ids):
            batch.token[index], batch.position[index] = token, start + index
            batch.sequences[index], batch.sequence[index][0], batch.logits[index] = 1, 0, 1
        batch.count = len(ids)
        if self.library.llama_decode(self.session, batch):
            raise ValueError("llama.cpp cannot decode")
        found = np.ctypeslib.as_array(self.library.llama_get_logits(self.session), (len(ids), self.tokens))
        return found.astype(np.float64)

    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        """(T, vocabulary) of what follows each of `ids`."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.session), True)
        found = self.logits(ids)
        found -= found.max(1, keepdims=True)
        return found - np.log(np.exp(found).sum(1, keepdims=True))

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The `count` tokens that follow, each the likeliest."""
        new: list[int] = []
        last = self.log_probabilities(ids)
        for index in range(count):
            new.append(int(last[-1].argmax()))
            last = self.logits(new[-1:], len(ids) + index)
        return new

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """The ids of a text; special: with those that begin and end every text."""
        room = (ctypes.c_int32 * (len(text.encode()) + 8))()
        raw = text.encode()
        count = self.library.llama_tokenize(self.vocabulary, raw, len(raw), room, len(room), special, True)
        return list(room[:count])


def answer(path: str, requests: list[list[Any]]) -> list[Any]:
    engine = Engine(path)
    return [getattr(engine, name)(*arguments) for name, *arguments in requests]


class Failure(Exception):
    """What llama.cpp had to say about a file that it does not take."""


def ask(path: Path, *requests: list[Any]) -> list[np.ndarray]:
    """Answers of llama.cpp about a file, e.g. to ["tokenize", "a text"]. Raises `Failure` with its log."""
    ended = subprocess.run(
        [sys.executable, __file__, str(path)], input=json.dumps(requests).encode(), capture_output=True, check=False
    )
    if ended.returncode:
        raise Failure(ended.stderr.decode(errors="replace"))
    found = np.load(io.BytesIO(ended.stdout))
    return [found[str(index)] for index in range(len(requests))]


if __name__ == "__main__":
    answers = answer(sys.argv[1], json.load(sys.stdin))
    np.savez(sys.stdout.buffer, **{str(index): np.asarray(one) for index, one in enumerate(answers)})
