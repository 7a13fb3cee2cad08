"""Whatever a stranger has written: success or an `SnpError`, in bounded time and memory, and nothing else is touched.

Each case is a sound input with a few seeded changes, carried as far into a run as it takes to read all of it.
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import io
import json
import lzma
import pickle
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from conftest import LENGTH, paragraphs
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from tiny_models import KNOWN, save_tiny

from llm_snp.config import PruneConfig
from llm_snp.dense.card import card_metadata
from llm_snp.dense.checkpoint import Checkpoint
from llm_snp.dense.data import calibration_windows, evaluation_windows
from llm_snp.dense.tokenizer import load_tokenizer
from llm_snp.documents.card import model_card
from llm_snp.documents.shareable import shareable
from llm_snp.documents.summary import summary
from llm_snp.documents.writing import read_report, write_documents
from llm_snp.errors import SnpError
from llm_snp.running.preview import preview, preview_text
from llm_snp.running.run import run

SECONDS = 10  # of this process, for one case
BYTES = 1 << 30  # more than there were before, for all cases of a test
DEEP = 100_000

# Values that are wrong almost everywhere; what JSON cannot say is written as `RAW` has it.
NASTY: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**40, 2**63, 10**9, 10**30, -(2**63), 10**400, 0.0, -0.5,
    1e-30, 0.5, 1.5, 1e308, "NaN", "RAW:NaN", "RAW:Infinity", "RAW:-1e999", "RAW:DEEP", "RAW:" + "9" * 5000, "", " ",
    "x", "auto", "float16", "torch.float16", "int8", "float8_e4m3fn", "gelu", "relu", "default", "dynamic", "llama3",
    "eager", "flash_attention_2", "../../secret", "/etc/passwd", "\ud800", "\0", "a" * 10_000, "%s{0}\n", [], [[]], {},
    [1, 2, 3], ["x"] * 3, {"x": 1}, {"rope_type": "x"}, {"rope_type": "yarn", "factor": 0}, {"0": {}}, [None],
]  # fmt: skip
# Fields that a config may have and the sound ones have not.
FIELDS = [
    "_attn_implementation", "attn_implementation", "output_hidden_states", "output_attentions", "use_return_dict",
    "return_dict", "use_cache", "torch_dtype", "dtype", "rope_scaling", "rope_parameters", "layer_types", "auto_map",
    "per_layer_config", "quantization_config", "pruned_heads", "text_config", "sliding_window", "tie_word_embeddings",
    "is_encoder_decoder", "is_decoder", "add_cross_attention", "num_labels", "id2label", "problem_type", "head_dim",
    "num_key_value_heads", "attention_dropout", "dropout", "layerdrop", "attn_pdrop", "pad_token_id", "bos_token_id",
    "architectures", "model_type", "transformers_version", "chunk_size_feed_forward", "tokenizer_class", "name_or_path",
    "scale_attn_weights", "n_inner", "gradient_checkpointing", "max_position_embeddings", "initializer_range",
]  # fmt: skip


class Chance(random.Random):
    """The changes that a case gets."""

    def json(self, content: Any, fields: list[str] = FIELDS) -> str:
        """A JSON text with one to three values, names or places that are not as they were."""
        content = json.loads(json.dumps(content))
        for _ in range(self.randint(1, 3)):
            self._change(content, fields)
        text = json.dumps(content)
        for raw in ("NaN", "Infinity", "-1e999", "9" * 5000):
            text = text.replace(f'"RAW:{raw}"', raw)
        return text.replace('"RAW:DEEP"', "[" * DEEP + "]" * DEEP)

    def _change(self, node: Any, fields: list[str]) -> None:
        while True:
            inner = [
                value
                for value in (node.values() if isinstance(node, dict) else node)
                if value and isinstance(value, (dict, list))
            ]
            if not inner or self.random() < 0.5:
                break
            node = self.choice(inner)
        if isinstance(node, list):
            if node:
                node[self.randrange(len(node))] = copy.deepcopy(self.choice(NASTY))
        elif self.random() < 0.4 or not node:
            node[self.choice(fields)] = copy.deepcopy(self.choice(NASTY))
        elif self.random() < 0.15:
            del node[self.choice(list(node))]
        else:
            node[self.choice(list(node))] = copy.deepcopy(self.choice(NASTY))

    def bytes(self, content: bytes) -> bytes:
        """Bytes that were flipped, cut, doubled or put in."""
        changed = bytearray(content)
        for _ in range(self.randint(1, 4)):
            if not changed:
                break
            at = self.randrange(len(changed)) if self.random() < 0.5 else self.randrange(min(len(changed), 400))
            kind = self.randrange(5)
            if kind == 0:
                changed[at] = self.randrange(256)
            elif kind == 1:
                del changed[at:]
            elif kind == 2:
                del changed[at : at + self.randint(1, 40)]
            elif kind == 3:
                changed[at:at] = self.randbytes(self.randint(1, 40))
            else:
                changed[at : at + 8] = struct.pack("<q", self.choice((-1, 0, 2**31, 2**62, 2**63 - 1)))
        return bytes(changed)


# The sound models, one for each way to write down heads, positions and weights.
FAMILIES = [name for name in ("opt", "llama", "gpt2", "falcon-new", "gemma3", "phi3", "gpt_neox") if name in KNOWN]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of each family, a text, and what no run may touch."""
    folder = tmp_path_factory.mktemp("sound")
    for name in FAMILIES:
        save_tiny(name, folder / name)
    (folder / "text.txt").write_text("\n\n".join(paragraphs(20, seed=3)))
    shutil.copytree(folder / FAMILIES[0], folder / "first" / "model")
    pruned(folder / "first", evaluate=(str(folder / "text.txt"),))
    shutil.move(folder / "first" / "out", folder / "result")
    shutil.rmtree(folder / "first")
    return folder


Case = Callable[[Chance, Path, Path], None]


def pruned(place: Path, **options: Any) -> None:
    """A whole run, as small as one can be."""
    text = {"calibration": str(place.parent / "text.txt"), "evaluate": ()}
    small = {"samples": 2, "sequence_length": 8, "method": "snp", "device": "cpu", "quiet": True}
    run(PruneConfig(**({"model": str(place / "model"), "output": str(place / "out")} | text | small | options)))


def config(chance: Chance, sound: Path, place: Path) -> None:
    path = place / "model" / "config.json"
    path.write_text(chance.json(json.loads(path.read_text())))
    preview_text(preview(PruneConfig(str(place / "model"), output=str(place / "out"))))
    pruned(place)


def config_bytes(chance: Chance, sound: Path, place: Path) -> None:
    path = place / "model" / "config.json"
    path.write_bytes(chance.bytes(path.read_bytes()))
    pruned(place)


def tokenizer(chance: Chance, sound: Path, place: Path) -> None:
    path = place / "model" / chance.choice(("tokenizer.json", "tokenizer_config.json", "generation_config.json"))
    content = path.read_bytes() if path.exists() else b'{"eos_token_id": 2, "max_length": 5}'
    if chance.random() < 0.7:
        fields = [
            "tokenizer_class",
            "auto_map",
            "chat_template",
            "model_max_length",
            "bos_token",
            "added_tokens",
            "eos_token_id",
        ]
        path.write_text(chance.json(json.loads(content), fields))
    else:
        path.write_bytes(chance.bytes(content))
    pruned(place)


def card(chance: Chance, sound: Path, place: Path) -> None:
    front = {"license": "mit", "tags": ["a", "b"], "language": ["en"], "datasets": ["c4"], "license_link": "x"}
    text = chance.json(front, list(front)) if chance.random() < 0.6 else YAML[chance.randrange(len(YAML))]
    content = f"---\n{text}\n---\n# Card\n".encode("utf-8", "surrogatepass")
    (place / "model" / "README.md").write_bytes(content if chance.random() < 0.7 else chance.bytes(content))
    pruned(place)


YAML = [
    "license: 2024-01-01\ntags: [2024-01-01, 1.5, .nan, .inf, ~, true]",
    "license: &a [*a]\ntags: &b {x: *b}",
    'license: "\\ud800"\nlanguage: ["\\ud800", no, on]',
    "tags: &a [x, &b [y, [z]], {a: 1}]\ndatasets: *a\nlicense: *b",
    "license: !!python/object/apply:os.mkdir [exploited]",
    "license: !!binary aGk=\ntags: !!set {a, b}\ndatasets: !!omap [a: 1]",
    "tags: " + "[" * 3000,
    "license: " + "x" * 100_000 + "\ntags: [" + "y, " * 50_000 + "]",
    "license: |\n  many\n  lines\nlicense_name: '<script>'",
    "- a\n- b",
    "5",
]


def front(chance: Chance, sound: Path, place: Path) -> None:
    """The same without a run: what the result's card makes of it, and what is read back from there."""
    fields = ["license", "license_name", "license_link", "tags", "language", "datasets", "base_model", "model-index"]
    front = {"license": "mit", "tags": ["a", "b"], "language": ["en"], "datasets": ["c4"], "license_link": "x"}
    text = chance.json(front, fields) if chance.random() < 0.7 else chance.choice(YAML)
    if chance.random() < 0.3:
        text = yaml.safe_dump(json.loads(json.dumps(front)), default_flow_style=chance.random() < 0.5)
    content = f"---\n{text}\n---\n# Card\n".encode("utf-8", "surrogatepass")
    path = place / "model" / "README.md"
    path.write_bytes(content if chance.random() < 0.5 else chance.bytes(content))
    found = read_report(sound / "result")
    found["model"]["card"] = card_metadata(place / "model")
    written = model_card(found)
    json.dumps(found, allow_nan=False)
    path.write_text(written, encoding="utf-8")
    again = card_metadata(place / "model")
    for name in ("license", "license_name", "license_link", "language"):
        assert again.get(name) == found["model"]["card"].get(name)
    assert {"llm_snp", "pruned"} <= set(again["tags"])


def index(chance: Chance, sound: Path, place: Path) -> None:
    model = place / "model"
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = list(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name].clone() for name in part}, model / f"part-{number}.safetensors")
    weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    path = model / "model.safetensors.index.json"
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    if chance.random() < 0.3:
        weight_map[chance.choice(names)] = chance.choice(
            ("../opt/model.safetensors", str(sound / "opt" / "model.safetensors"), "a" * 300, "..", "config.json")
        )
        path.write_text(json.dumps(content))
    elif chance.random() < 0.7:
        path.write_text(chance.json(content))
    else:
        path.write_bytes(chance.bytes(json.dumps(content).encode()))
    read_all(model)


def read_all(model: Path) -> None:
    checkpoint = Checkpoint(model)
    for _ in checkpoint.tensors(checkpoint.names()):
        pass


def header(chance: Chance, sound: Path, place: Path) -> None:
    path = place / "model" / "model.safetensors"
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    if chance.random() < 0.6:
        fields = ["dtype", "shape", "data_offsets", "__metadata__"]
        head = chance.json(json.loads(content[8 : 8 + size]), fields).encode()
        path.write_bytes(struct.pack("<Q", len(head)) + head + content[8 + size :])
    else:
        path.write_bytes(chance.bytes(content))
    read_all(place / "model")
    pruned(place)


class Odd:
    def __reduce__(self) -> Any:
        return bytearray, (2**40,)


def pickled(chance: Chance, sound: Path, place: Path) -> None:
    model = place / "model"
    tensors: dict[Any, Any] = dict(load_file(model / "model.safetensors"))
    (model / "model.safetensors").unlink()
    name = chance.choice(list(tensors))
    tensor = tensors[name]
    odd: list[Any] = [
        torch.nn.Parameter(tensor), tensor.expand(2**30, *tensor.shape), tensor.to_sparse(), tensor.bool(), tensor.T,
        tensor.to("meta"), torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), tensor + 1j, tensor.tolist(), None,
        Odd(), tensor.numpy(), tensor[:0], tensor.double(), torch.empty(0), {"x": tensor}, "x", 10**400,
    ]  # fmt: skip
    if chance.random() < 0.5:
        tensors[chance.choice((name, 5, None, ("a",), "\ud800"))] = chance.choice(odd)
    path = model / "pytorch_model.bin"
    with io.BytesIO() as buffer:
        if chance.random() < 0.2:
            pickle.dump(tensors, buffer)
        else:
            torch.save(tensors, buffer, _use_new_zipfile_serialization=chance.random() < 0.5)
        content = buffer.getvalue()
    path.write_bytes(content if chance.random() < 0.4 else chance.bytes(content))
    pruned(place)


def text(chance: Chance, sound: Path, place: Path) -> None:
    rows = paragraphs(20, seed=chance.randrange(5))
    ending = chance.choice((".txt", ".raw", ".jsonl", ".json", ".parquet", ".txt.gz", ".jsonl.xz"))
    path = place / f"text{ending}"
    if ending == ".parquet":
        column = chance.choice(
            (rows, [1] * 20, [row.encode() for row in rows], [b"\xff\xfe"] * 20, [[row] for row in rows], [None, *rows])
        )
        array = pa.array(column)
        if column[0] == b"\xff\xfe":  # what says that it is text, and is none
            array = pa.Array.from_buffers(pa.string(), len(array), array.buffers())
        if chance.random() < 0.2:
            array = pa.array([2**62] * 20, pa.timestamp("us"))
        with io.BytesIO() as buffer:
            parquet.write_table(pa.table({chance.choice(("text", "text", "body")): array}), buffer)
            content = buffer.getvalue()
    elif "json" in ending:
        lines = [json.dumps({"text": row}) for row in rows]
        for _ in range(chance.randint(0, 2)):
            lines[chance.randrange(20)] = chance.json({"text": rows[0], "id": 5}, ["text"])
        content = "\n".join(lines).encode()
    else:
        content = "\n\n".join(rows).encode()
        if chance.random() < 0.2:
            content = chance.choice((b"\xef\xbb\xbf", b"\r\r\n", b"a" * 3_000_000, b"\n" * 100_000)) + content
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    content = content if chance.random() < 0.4 else chance.bytes(content)
    content = pack(content)
    path.write_bytes(content if chance.random() < 0.7 else chance.bytes(content))
    tokens = load_tokenizer(place / "model")
    calibration_windows(str(path), tokens, 2, LENGTH, seed=0)
    evaluation_windows(str(path), tokens, LENGTH)


def options(chance: Chance, sound: Path, place: Path) -> None:
    """Of any option any value, of the right type and of wrong ones."""
    sensible: dict[str, list[Any]] = {
        "sparsity": [0.0, 0.1, 0.5, 0.9, 0.999], "samples": [1, 2, 5, 10**6], "sequence_length": [2, 3, 100, 10**6],
        "seed": [0, 2**32 - 1], "method": ["snp", "best"], "order": ["zca", "greedy", "random", "wanda"],
        "allocation": ["uniform", "variance", "loss"], "target": ["self", "dense", "residual", "none"],
        "attention": ["heads", "queries", "dims", "both", "none"], "sensitivity": ["relative", "scalar", "fisher"],
        "round_to": [1, 2, 8, 1000, 2**30], "format": ["auto", "blockwise", "stock"],
        "damping": [0.0, 1e-12, 1.0, 1e6, "auto"],
        "device": ["auto", "cpu", "cpu:0", "cpu:1", "meta", "mps", "cuda:7", ":", "cpu:"],
        "dtype": ["auto", "bfloat16", "float16", "torch.float32"],
        "output": ["/", "", ".", "..", "~nobody/x", "/dev/null", "/dev/null/x", "a" * 300, "/proc/x", "loop", "x\ny"],
        "model": ["", "~nobody", "/", ".", "a" * 300, "/dev/zero", "loop", "a/b/c", "\udce9", "model\n"],
        "calibration": ["self", "", "/dev/zero", "/", "~nobody/x.txt", "a" * 300 + ".txt", "loop.txt", "pipe.txt"],
        "evaluate": [(), ("self",), ("",), ("/dev/zero",)],
        "offload": ["/", "~nobody", "/dev/null", "loop", ".", "a" * 300],
        "push_to_hub": ["", "x", "a/b/c", "a b/c", "\n"], "revision": ["main", "\n"], "resume": [True],
        "overwrite": [True],
    }  # fmt: skip
    chosen: dict[str, Any] = {"output": str(place / "out")}
    for name in chance.sample(list(sensible), chance.randint(1, 4)):
        chosen[name] = copy.deepcopy(chance.choice(sensible[name] if chance.random() < 0.8 else NASTY))
    model = {"model": str(place / "model")} | chosen
    preview_text(preview(PruneConfig(**model)))
    if "loss" not in chosen.values() and chosen.get("samples") in (None, 1, 2, 5):
        pruned(place, **chosen)


def report(chance: Chance, sound: Path, place: Path) -> None:
    """What `report`, `push` and a later run read of a result."""
    shutil.copytree(sound / "result", place / "out")
    path = place / "out" / "report.json"
    if chance.random() < 0.8:
        path.write_text(chance.json(json.loads(path.read_text()), ["speed", "harness", "notes", "replacing", "files"]))
    else:
        path.write_bytes(chance.bytes(path.read_bytes()))
    with suppress(SnpError):
        pruned(place, resume=True, evaluate=(str(place.parent / "text.txt"),))
    if path.exists():
        found = read_report(place / "out")
        summary(found)
        model_card(shareable(found))
        write_documents(place / "out", found)
        read_report(place / "out")


CASES: list[tuple[Case, int]] = [
    (config, 40), (config_bytes, 10), (tokenizer, 15), (card, 15), (front, 60), (index, 25), (header, 25),
    (pickled, 30), (text, 60), (report, 30), (options, 40),
]  # fmt: skip
PARTS = 4  # of each kind, so that processes can share them


def listing(folder: Path) -> dict[str, str]:
    """Everything below a folder by its name, with a hash of what is in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize(("case", "count"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_anything(
    case: Case, count: int, part: int, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shutil.copy(sound / "text.txt", tmp_path)
    untouched = listing(sound)
    for number in range(part, count, PARTS):
        chance = Chance(f"{case.__name__} {number}")
        place = tmp_path / str(number)
        shutil.copytree(sound / chance.choice(FAMILIES), place / "model")
        (place / "loop").symlink_to(place / "loop")
        monkeypatch.chdir(place)
        start = time.process_time()
        with suppress(SnpError):
            case(chance, sound, place)
        assert time.process_time() - start < SECONDS, number
        shutil.rmtree(place)
    assert listing(sound) == untouched
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt"}
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES
