"""Bad input: one clear sentence, exit code 2, nothing half-written. And numbers that are awkward but not wrong."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pytest
import safetensors.torch
import torch
import transformers
from conftest import (
    BLOCKS,
    LENGTH,
    NEURONS,
    SAMPLES,
    Prune,
    Shell,
    copy_tokenizer,
    load,
    logits,
    paragraphs,
    raising,
    save,
    tiny_opt,
    weight_files,
)
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from pyarrow import parquet
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llm_snp.dense.data import calibration_windows
from llm_snp.dense.hub import SAFETENSORS
from llm_snp.dense.tokenizer import load_tokenizer
from llm_snp.errors import OptionError
from llm_snp.result.writer import Writer
from llm_snp.system.manifest import list_in_partial
from llm_snp.system.owned import OWNER
from llm_snp.system.workspace import JOURNAL

# Options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "-0.1"], "--sparsity is -0.1; it is a share and must be at least 0 and below 1"),
        (["--sparsity", "1.0"], "--sparsity is 1; it is a share"),
        (["--sparsity", "nan"], "--sparsity is nan"),
        (["--sparsity", "inf"], "--sparsity is inf"),
        (["--sparsity", "a lot"], "argument --sparsity: invalid float value: 'a lot'"),
        (["--sparsity"], "argument --sparsity: expected one argument"),
        (["--sparsty", "0.3"], "there is no option --sparsty; did you mean --sparsity?"),
        (["--xyzzy"], "there is no option --xyzzy; see --help"),
        (["one", "two"], "'two' is one argument too many, the model is 'one'"),
        (["--order", "greddy"], "--order 'greddy' is not known; choose one of zca, "),
        (["--order", "greddy"], "Did you mean 'greedy'?"),
        (["--method", "obs"], "--method 'obs' is not known; choose one of snp, best, everything."),
        (["--allocation", "even"], "--allocation 'even' is not known"),
        (["--target", "itself"], "Did you mean 'self'?"),
        (["--attention", "head"], "Did you mean 'heads'?"),
        (["--sensitivity", "fischer"], "Did you mean 'fisher'?"),
        (["--dtype", "fp16"], "--dtype 'fp16' is not known; choose one of auto, float32, bfloat16, float16."),
        (["--damping", "-1"], "--damping is -1; give a number from 0 to 1e+06, or auto"),
        (["--damping", "foo"], "--damping is 'foo'; give a number of at least 0, or auto"),
        (["--damping", "nan"], "--damping is nan"),
        (["--damping", "1e308"], "--damping is 1e+308; give a number from 0 to 1e+06, or auto"),
        (["--samples", "9" * 30], "it must be below 2**31"),
        (["--damping", "auto", "--samples", "1"], "--damping auto holds out part of the windows"),
        (["--samples", "0"], "--samples is 0; it must be at least 1"),
        (["--sequence-length", "1"], "--sequence-length is 1; it must be at least 2"),
        (["--round-to", "0"], "--round-to is 0; it must be at least 1"),
        (["--seed", "9" * 30], "--seed"),
        (["--device", "tpu"], "--device 'tpu' is not known; choose one of auto, cpu, cuda."),
        (["--device", "cuda:x"], "--device 'cuda:x' is no device"),
        (["--device", "cuda:99"], "--device cuda:99 was asked for, but torch sees"),
    ],
)
def test_options(shell: Shell, dense: Path, arguments: list[str], message: str) -> None:
    model = [] if arguments[0] == "one" else [dense]
    assert message in shell.refused(*model, *arguments)


def test_order_that_does_not_suit_the_model(shell: Shell, dense: Path) -> None:
    for flags in ([], ["--dry-run"]):
        message = shell.refused(dense, "--order", "i-spasp", "--attention", "heads", *flags)
        assert message.startswith("--order i-spasp needs activations that cannot be negative, and the heads of this")
    assert shell.prune(dense, "--order", "i-spasp", "--attention", "dims")[0] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda(shell: Shell, dense: Path) -> None:
    message = shell.refused(dense, "--device", "cuda")
    assert message == "--device cuda was asked for, but torch sees 0 CUDA devices; use --device cpu"


def test_sparsity_that_empties_a_block(shell: Shell, dense: Path) -> None:
    message = shell.refused(dense, "--sparsity", "0.99")
    assert message.startswith("--sparsity 0.99 would leave a block empty; with one unit left everywhere at most 0.")
    most = message.split("at most ")[1].split()[0]
    code, _, err = shell.prune(dense, "--sparsity", most)
    assert code == 0, err


def test_rounding_that_leaves_nothing_to_remove_is_not_blamed_on_the_sparsity(shell: Shell, dense: Path) -> None:
    for flags in ([], ["--dry-run"]):
        message = shell.refused(dense, "--attention", "none", "--round-to", "4096", *flags)
        assert message.startswith("--sparsity 0.3 and --round-to 4096 exclude each other: ")
        message = shell.refused(dense, "--sparsity", "0.99", "--round-to", "2", *flags)
        assert message.startswith("--sparsity 0.99 would leave a block empty")


# The model


def written(directory: Path, files: dict[str, str | bytes]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return directory


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is not a model directory: it has no config.json"),
        ({"config.json": "not JSON"}, "config.json is not JSON: Expecting value: line 1 column 1"),
        ({"config.json": b"\xff\xfe\x00"}, "config.json is not JSON: "),
        ({"config.json": "[]"}, 'config.json is no config of transformers: it names no "model_type"'),
        ({"config.json": "3"}, 'names no "model_type"'),
        ({"config.json": "{}"}, 'names no "model_type"'),
        (
            {"config.json": '{"model_type": "newest"}'},
            "no config of model type 'newest' that this transformers can read",
        ),
        (
            {"config.json": '{"model_type": "bloom"}'},
            "models of type 'bloom' cannot be pruned; supported: falcon,",
        ),
        (
            {"config.json": '{"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}, "n": 1}'},
            "no config of model type 'mine' that this transformers can read",
        ),
        (
            {"config.json": '{"model_type": "opt", "hidden_size": 30, "num_attention_heads": 4}'},
            "hidden_size 30 is not a multiple of num_attention_heads 4",
        ),
        ({"config.json": '{"model_type": "opt"}'}, "has no weights: expected model.safetensors or pytorch_model.bin"),
    ],
)
def test_directories_that_are_no_model(shell: Shell, files: dict[str, str | bytes], message: str) -> None:
    assert message in shell.refused(written(shell.directory / "model", files))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": -4},
        {"num_hidden_layers": 0},
        {"ffn_dim": 0},
        {"hidden_size": 0},
        {"vocab_size": -1},
        {"activation_function": "rellu"},
        {"per_layer_config": {"0": {"ffn_dim": 16}}},
    ],
)
def test_configs_that_describe_no_model(shell: Shell, copy: Path, fields: dict[str, Any]) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | fields))
    for flags in ([], ["--dry-run"]):
        message = shell.refused(copy, *flags)
        assert next(iter(fields)) in message or "rellu" in message


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 does not check the fields of a config")
def test_config_with_a_field_of_the_wrong_type(shell: Shell) -> None:
    model = written(shell.directory / "model", {"config.json": '{"model_type": "opt", "hidden_size": "x"}'})
    assert "expected int, got str" in shell.refused(model)


@pytest.mark.parametrize("name", ["./absent", "/absent", "~/absent", "a/b/c", "~nobody/model"])
def test_paths_that_do_not_exist(shell: Shell, name: str) -> None:
    message = shell.refused(name)
    assert message.endswith("does not exist; give a model directory or a Hub id such as facebook/opt-125m")


def test_a_file_is_no_model(shell: Shell, dense: Path) -> None:
    message = shell.refused(dense / "model.safetensors")
    assert message.endswith("model.safetensors is a file; expected a model directory with config.json and weights")


@pytest.fixture
def copy(dense: Path, shell: Shell) -> Path:
    """A copy of the model to be damaged."""
    return Path(shutil.copytree(dense, shell.directory / "model"))


def edit(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")
    return model


FC1 = "model.decoder.layers.1.fc1.weight"


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda t: t.pop(FC1), ["lacks 1 tensor of the model: ", FC1]),
        (lambda t: [t.pop(k) for k in list(t) if ".layers.1." in k], ["lacks 16 tensors", "and 11 more"]),
        (lambda t: t.update(extra=torch.zeros(2)), ["has 1 tensor the model has no place for: extra", "config.json"]),
        (lambda t: t.update({FC1: t[FC1][:5].clone()}), [f"{FC1} in ", "has shape (5, 32)", "implies (64, 32)"]),
        (lambda t: t[FC1][0].fill_(torch.nan), [f"{FC1} in model.safetensors has 32 entries that are NaN or inf"]),
        (lambda t: t[FC1][0, :3].fill_(torch.inf), ["has 3 entries that are NaN or infinite; the file is damaged"]),
        (lambda t: t.update({FC1: t[FC1].to(torch.int8)}), [f"{FC1} in ", "has type int8, expected one of float16"]),
        (lambda t: t.update({FC1: t[FC1].to(torch.int64)}), [f"{FC1} in ", "has type int64, expected one of float16"]),
        (lambda t: t.update({FC1: t[FC1].to(torch.float8_e4m3fn)}), ["has type float8_e4m3fn, expected one of"]),
        (lambda t: t.clear(), ["has weight files (model.safetensors), but no tensor in them"]),
        (
            lambda t: t.update({"lm_head.weight": t["model.decoder.embed_tokens.weight"] + 1}),
            ["lm_head.weight and model.decoder.embed_tokens.weight", "differ", "tie_word_embeddings"],
        ),
    ],
)
def test_tensors_that_do_not_fit(shell: Shell, copy: Path, change: Any, messages: list[str]) -> None:
    found = shell.refused(edit(copy, change))
    for message in messages:
        assert message in found


@pytest.mark.parametrize("size", [0, 4, 100, 20_000, -1])
def test_truncated_safetensors(shell: Shell, copy: Path, size: int) -> None:
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[:size])
    message = shell.refused(copy)
    assert "model.safetensors cannot be read, it may be truncated: " in message
    assert message.endswith("; download it again")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("size", [0, 10, 300, 20_000, -100])
def test_truncated_bin(shell: Shell, copy: Path, size: int, zipped: bool) -> None:
    (copy / "model.safetensors").unlink()
    path = copy / "pytorch_model.bin"
    torch.save(tiny_opt().state_dict(), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:size])
    message = shell.refused(copy)
    assert "pytorch_model.bin" in message
    assert "truncated" in message or "damaged" in message
    assert message.endswith("; download it again")


@pytest.mark.parametrize(
    "content",
    [b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", os.urandom(1000)],
    ids=["page", "pointer", "noise"],  # every process of xdist must find the same names
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weight_files_that_are_something_else(shell: Shell, copy: Path, name: str, content: bytes) -> None:
    (copy / "model.safetensors").unlink()
    (copy / name).write_bytes(content)
    message = shell.refused(copy)
    assert name in message
    assert "weights_only" not in message


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploited",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "is not the state dict of a model"),
        ({"model": {"a": torch.zeros(1)}, "step": 3}, "is not the state dict of a model"),
        ({"a": Exploit()}, "holds more than tensors and was not loaded for safety"),
    ],
)
def test_bin_files_that_hold_something_else(shell: Shell, copy: Path, content: Any, message: str) -> None:
    (copy / "model.safetensors").unlink()
    torch.save(content, copy / "pytorch_model.bin")
    assert message in shell.refused(copy)


def shards(model: Path) -> Path:
    """Turn the weights into two shards with an index."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names, weight_map = list(tensors), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, model / file)
        weight_map |= dict.fromkeys(part, file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return model


def test_shard_that_is_absent(shell: Shell, copy: Path) -> None:
    (shards(copy) / "model-00002-of-00002.safetensors").unlink()
    message = shell.refused(copy)
    assert message.endswith(
        "model.safetensors.index.json lists 2 weight files, but model-00002-of-00002.safetensors is missing; "
        "download again"
    )


NO_MEMORY = os.strerror(errno.ENOMEM)


@pytest.mark.parametrize(
    "error", [MemoryError(f"{NO_MEMORY} (os error 12)"), RuntimeError(f"unable to mmap 9 bytes: {NO_MEMORY} (12)")]
)
def test_weights_that_there_is_no_memory_to_map(
    shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Where the address space is limited; they are no worse for it."""
    monkeypatch.setattr("llm_snp.dense.checkpoint.safe_open", raising(error))
    assert shell.refused(dense).startswith(f"the device ran out of memory ({error}); use ")


def test_no_memory_while_the_model_writes(shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no fault of the model's."""
    error = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr("llm_snp.dense.text.self_written", raising(error))
    assert "ran out of memory" in shell.refused(dense, "--calibration", "self")


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, NO_MEMORY), RuntimeError("a fault")])
def test_no_memory_before_there_is_anything(
    shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("llm_snp.running.run.open_job", raising(error))
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError):
            shell.prune(dense)
        return
    assert shell.refused(dense).startswith(
        f"this machine has no memory left for it ({str(error) or 'MemoryError'}); end"
    )


def test_index_that_expects_a_tensor_which_its_shard_has_not(shell: Shell, copy: Path) -> None:
    index = shards(copy) / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map[FC1] = next(file for file in set(weight_map.values()) if file != weight_map[FC1])
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert f"has no tensor '{FC1}', which the index expects" in shell.refused(copy)


@pytest.mark.parametrize("content", ["not JSON", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}'])
def test_index_that_is_none(shell: Shell, copy: Path, content: str) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(content)
    message = shell.refused(copy)
    assert message.endswith('model.safetensors.index.json is not a checkpoint index, a JSON object with a "weight_map"')


@pytest.mark.parametrize("content", [None, "", "{}", "not JSON"])
def test_no_tokenizer(shell: Shell, copy: Path, content: str | None) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    if content is not None:
        (copy / "tokenizer.json").write_text(content)
    message = shell.refused(copy)
    assert "has no tokenizer" in message
    assert message.endswith("copy the tokenizer files of the original model beside the weights")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizer_whose_special_tokens_are_empty(shell: Shell, copy: Path, name: str) -> None:
    """As those of LLaMA's first conversions: transformers asks for the unknown token's number by itself, for ever."""
    empty = dict.fromkeys(["bos_token", "eos_token", "unk_token"], "")
    if name == "tokenizer_config.json":
        fields = json.loads((copy / name).read_text()) | empty
    else:
        fields = {key: {"content": token} for key, token in empty.items()}
    (copy / name).write_text(json.dumps(fields))
    for calibration in (["--calibration", "self"], []):
        message = shell.refused(copy, *calibration)
        assert message.startswith(f'{copy}/{name} has an empty "unk_token", and transformers needs one of the')


def test_tokenizer_of_a_larger_model(shell: Shell) -> None:
    model = save(tiny_opt(vocab_size=500), shell.directory / "model")
    message = shell.refused(model)
    assert "500" in message
    assert "tokenizer" in message


# Text


def packed(rows: list[Any], name: str = "text") -> pa.Table:
    return pa.table({name: rows})


def text_file(directory: Path, name: str, content: str | bytes) -> Path:
    return written(directory, {name: content}) / name


GZ = gzip.compress(b"Some words. " * 5000, mtime=0)  # part of the names of tests, which every process must find alike
BAD_TEXT: list[tuple[str, str | bytes, str]] = [
    ("empty.txt", "", "empty.txt is empty"),
    ("blank.txt", " \n\n ", "blank.txt has no text"),
    ("binary.txt", b"\x80\x81\xfe" * 1000, "binary.txt is not UTF-8 text: "),
    ("zeros.txt", b"\0" * 1000, "zeros.txt is not text: line 1 has a zero byte"),
    ("short.txt", "A few words.", "windows of 32; --samples asks for 12: lower --samples or --sequence-length"),
    ("text.doc", "words", "text.doc has an unknown ending; expected one of .txt, .raw, .jsonl, .json, .parquet, all"),
    ("text.txt.zip", "words", "text.txt.zip has an unknown ending"),
    ("text.parquet.gz", "words", "text.parquet.gz has an unknown ending"),
    ("text", "words", "has an unknown ending"),
    ("a.jsonl", '{"text": "one"}\n{"body": "two"}\n', 'a.jsonl, line 2: expected a JSON object with a key "text"'),
    ("a.jsonl", '{"text": "one"}\n\n{"text": \n', 'a.jsonl, line 3: expected a JSON object with a key "text"'),
    ("a.json", '[\n{"text": "one"},\n{"text": "two"}\n]', 'a.json, line 1: expected a JSON object with a key "text"'),
    ("a.jsonl", '["text"]\n', 'a.jsonl, line 1: expected a JSON object with a key "text"'),
    ("a.jsonl", '{"text": null}\n', 'a.jsonl, line 1: "text" is null, expected a string'),
    ("a.jsonl", '{"text": 3}\n', 'a.jsonl, line 1: "text" is int, expected a string'),
    ("a.txt.gz", "plain text", "a.txt.gz cannot be read, it may be damaged or truncated: Not a gzipped file"),
    ("a.txt.gz", GZ[:-20], "a.txt.gz cannot be read, it may be damaged or truncated: Compressed file ended before"),
    ("a.txt.gz", GZ[:20] + b"\xff" * 20 + GZ[40:], "a.txt.gz cannot be read, it may be damaged or truncated: "),
    ("a.txt.xz", "plain text", "a.txt.xz cannot be read, it may be damaged or truncated: "),
    ("a.parquet", "plain text", "a.parquet is not a parquet file: "),
]


@pytest.mark.parametrize("option", ["--calibration", "--evaluate"])
@pytest.mark.parametrize(("name", "content", "message"), BAD_TEXT, ids=lambda value: str(value)[:20])
def test_text(
    shell: Shell, dense: Path, option: str, name: str, content: str | bytes, message: str, text: Path
) -> None:
    path = text_file(shell.directory / "text", name, content)
    if option == "--calibration":
        assert message in shell.refused(dense, option, path)
        return
    # No --no-evaluate here, which `refused` gives.
    arguments = [dense, option, path, "--calibration", text, "--output", shell.output, "--quiet"]
    code, _, err = shell.run(*arguments, "--samples", SAMPLES, "--sequence-length", LENGTH)
    assert code == 2
    assert not shell.output.exists()
    if name == "short.txt":
        message = "less than one window of 32: lower --sequence-length or give more text"
    assert err.startswith("llm_snp: ")
    assert message in err


def test_text_that_does_not_exist(shell: Shell, dense: Path) -> None:
    message = shell.refused(dense, "--calibration", "wikitext")
    assert message == "wikitext is neither a file nor a known corpus (wikitext2, c4, self); check the path"


def test_how_many_windows_there_are(shell: Shell, dense: Path) -> None:
    path = text_file(shell.directory / "text", "a.txt", paragraphs(3, 1)[0] * 3)
    tokens = len(load_tokenizer(dense)(path.read_text())["input_ids"])
    assert 3 * LENGTH < tokens < SAMPLES * LENGTH
    message = shell.refused(dense, "--calibration", path)
    assert (
        f"a.txt has {tokens} tokens, which is {tokens // LENGTH} windows of {LENGTH}; --samples asks for 12" in message
    )


def test_tables_without_text(shell: Shell, dense: Path) -> None:
    folder = written(shell.directory / "text", {})
    tables = {
        "columns": (packed(["a"], "content"), "a.parquet has columns ['content'], expected one named \"text\""),
        "null": (packed(["a", None]), 'a.parquet, row 2: "text" is null, expected a string'),
        "number": (packed([1, 2]), 'a.parquet, row 1: "text" is int, expected a string'),
    }
    for table, message in tables.values():
        parquet.write_table(table, folder / "a.parquet")
        assert message in shell.refused(dense, "--calibration", folder / "a.parquet")


@pytest.mark.parametrize(
    "texts",
    [("--evaluate", "no.txt"), ("--calibration", "no.txt", "--no-evaluate"), ("--evaluate", "short.txt")],
)
def test_a_text_that_cannot_be_read_is_refused_before_the_model_writes_one(
    shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch, texts: tuple[str, ...]
) -> None:
    """Which takes minutes to hours."""

    def written(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the model was asked to write")

    monkeypatch.setattr("llm_snp.dense.text.self_written", written)
    (shell.directory / "short.txt").write_text("hi")
    code, _, err = shell.run(dense, "--calibration", "self", "--sequence-length", LENGTH, "--samples", 8, *texts)
    assert code == 2
    assert texts[1] in err.splitlines()[-1]


def test_directories_that_are_no_text(shell: Shell, dense: Path) -> None:
    folder = shell.directory / "text"
    written(folder / "plain", {"a.txt": "words"})
    datasets.Dataset.from_dict({"content": ["a"]}).save_to_disk(folder / "columns")
    datasets.Dataset.from_dict({"text": ["a", None]}).save_to_disk(folder / "null")
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})})
    splits.save_to_disk(folder / "splits")
    for name, message in {
        "plain": "plain is a directory, but not one saved by datasets' save_to_disk (",
        "columns": "columns has columns ['content'], expected one named \"text\"",
        "null": 'null, row 2: "text" is null, expected a string',
        "splits": "splits has the splits train; name the directory of one of them",
    }.items():
        assert message in shell.refused(dense, "--calibration", folder / name)


# The Hub


def test_hub_model_without_network(shell: Shell) -> None:
    for arguments in (["facebook/opt-125m"], ["opt-125m"], ["facebook/opt-125m", "--dry-run"]):
        message = shell.refused(*arguments)
        assert f"{arguments[0]} is no local directory, and could not be had from the Hugging Face Hub (" in message
        assert message.endswith("check the network, or give a directory with the model's files")


@pytest.mark.parametrize("content", [None, "hf_x".encode("utf-16")])
@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_token_that_cannot_be_read(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, content: bytes | None, flags: list[str]
) -> None:
    """docker makes a folder of a file that is not there, PowerShell's `echo` writes UTF-16."""
    path = shell.directory / "token"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(path))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    message = shell.refused("facebook/opt-125m", *flags)
    assert message.startswith(f"the token for the Hugging Face Hub cannot be read from {path} (")


class ClientError(Exception):
    """Stands for httpx.ConnectError, which is no OSError, and whatever the next client has."""


def http_error(kind: type[Exception]) -> Exception:
    """One of the Hub's errors without the response that its constructor wants."""
    return kind.__new__(kind, "404 Client Error\n\nmore lines")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Name or service not known"), "the Hugging Face Hub (Name or service not known); check"),
        (ClientError("[Errno -2] Name unknown"), "the Hugging Face Hub ([Errno -2] Name unknown); check the network"),
        (TimeoutError(), "the Hugging Face Hub (TimeoutError); check the network"),
        (http_error(GatedRepoError), "someone/gated is gated: accept its licence on the Hub, then run `hf auth login`"),
        (http_error(RevisionNotFoundError), "someone/gated has no revision 'v2' on the Hub; check the branch, tag or"),
        (
            http_error(RepositoryNotFoundError),
            "neither a local directory nor a repository on the Hub that you may read",
        ),
    ],
)
def test_hub_refuses(shell: Shell, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", raising(error))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
    assert message in shell.refused("someone/gated", "--revision", "v2")


@pytest.mark.parametrize("name", ["a b/c", "a/..", "x" * 300])
def test_names_that_cannot_be_on_the_hub(shell: Shell, name: str) -> None:
    assert shell.refused(name) == f"{name} is neither a local directory nor a valid Hub id"


def test_hub_repository_that_is_no_transformers_model(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(shell.directory / "snapshot", {"README.md": "nothing here"})
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *a, **k: ["README.md"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(folder))
    assert shell.refused("some/one") == "some/one on the Hub is no transformers model: it has no config.json"


def test_what_is_fetched_from_the_hub(shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(dense)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for files, wanted in (
        (["model.safetensors", "pytorch_model.bin", "consolidated.safetensors"], {*SAFETENSORS}),
        (["pytorch_model.bin", "flax_model.msgpack", "tf_model.h5"], {"pytorch_model*.bin"}),
        (None, {*SAFETENSORS, "pytorch_model*.bin"}),  # offline: whatever an earlier run fetched
    ):
        listing = raising(ClientError("offline")) if files is None else (lambda *a, files=files, **k: files)
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listing)
        code, _, err = shell.prune("some/model", "--revision", "v2", "--overwrite")
        assert code == 0, err
        assert (asked[-1]["name"], asked[-1]["revision"]) == ("some/model", "v2")
        weights = {pattern for pattern in asked[-1]["allow_patterns"] if "safetensors" in pattern or "bin" in pattern}
        assert weights == wanted
    assert shell.run("some/model", "--dry-run")[0] == 0
    assert not any("safetensors" in pattern or "bin" in pattern for pattern in asked[-1]["allow_patterns"])


def test_hub_text_without_network(shell: Shell, dense: Path) -> None:
    for source, name in (("wikitext2", "Salesforce/wikitext"), ("c4", "allenai/c4")):
        message = shell.refused(dense, "--calibration", source)
        assert message.startswith(f"dataset {name} could not be had from the Hugging Face Hub (")
        assert message.endswith("check the network, or give a local file instead")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'Salesforce/wikitext' on the Hub"),
        ValueError("Couldn't find cache for Salesforce/wikitext for config 'wikitext-2-raw-v1'"),
        datasets.exceptions.DatasetNotFoundError("Dataset doesn't exist"),
        ClientError("Name or service not known"),
    ],
)
def test_hub_text_fails(shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(datasets, "load_dataset", raising(error))
    assert f"from the Hugging Face Hub ({error}); check the network" in shell.refused(
        dense, "--calibration", "wikitext2"
    )


# The output


def test_output_that_holds_something_else(shell: Shell, dense: Path) -> None:
    written(shell.output, {"thesis.tex": "years of work"})
    for flags in ([], ["--overwrite"]):
        message = shell.refused(dense, *flags)
        assert message == f"--output {shell.output} is not empty and no result of llm_snp; give another directory"
    for content in ("[]", '{"versions": {"another": "1.0"}}', '{"coverage": 0.9}'):
        written(shell.output, {"report.json": content})  # of another tool
        assert "is not empty and no result of llm_snp" in shell.refused(dense, "--overwrite")
    written(shell.output, {"report.json": "not JSON"})
    assert "is not empty and its report.json is damaged" in shell.refused(dense, "--overwrite")


def test_output_that_cannot_be_a_directory(shell: Shell, dense: Path) -> None:
    file = text_file(shell.directory, "file", "content")
    assert shell.refused(dense, "--output", file) == f"--output {file} is a file; give a directory"
    message = shell.refused(dense, "--output", file / "below" / "out")
    assert message == f"--output {file / 'below' / 'out'} cannot be made: {file} is a file; give another directory"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_where_nothing_may_be_written(shell: Shell, dense: Path) -> None:
    locked = written(shell.directory / "locked", {})
    locked.chmod(0o500)
    assert f"cannot be made: {locked} is not writable" in shell.refused(dense, "--output", locked / "out")


def test_a_disk_without_modes_and_locks(shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of another system, or a cluster's file system: nothing that a result needs."""
    monkeypatch.setattr(Path, "chmod", raising(PermissionError(errno.EPERM, os.strerror(errno.EPERM))))
    monkeypatch.setattr("filelock.UnixFileLock._acquire", raising(NotImplementedError("no flock")))
    code, _, err = shell.prune(dense, "--method", "best")
    assert code == 0, err


def test_earlier_result(shell: Shell, dense: Path) -> None:
    assert shell.prune(dense)[0] == 0
    before = weight_files(shell.output)
    message = shell.refused(dense, "--seed", "1")
    assert message == f"--output {shell.output} holds an earlier result; give another directory, or --overwrite"
    assert weight_files(shell.output) == before
    code, _, err = shell.prune(dense, "--overwrite", "--seed", "1")
    assert code == 0, err
    assert weight_files(shell.output) != before
    assert [path.name for path in shell.directory.iterdir()] == ["out"]


def test_empty_directory_and_links_as_output(shell: Shell, dense: Path) -> None:
    shell.output.mkdir()
    assert shell.prune(dense)[0] == 0
    link = shell.directory / "link"
    link.symlink_to(shell.output)
    code, _, err = shell.prune(dense, "--output", link, "--overwrite")
    assert code == 0, err
    assert link.is_symlink()
    assert sorted(path.name for path in shell.directory.iterdir()) == ["link", "out"]


def test_files_have_the_permissions_that_the_umask_gives(shell: Shell, dense: Path) -> None:
    before = os.umask(0o022)
    try:
        assert shell.prune(dense)[0] == 0
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in shell.output.rglob("*.*") if path.is_file()} == {"0o644"}


def test_what_a_killed_run_left_is_replaced_but_nothing_else(shell: Shell, dense: Path) -> None:
    partial = shell.directory / "out.partial"
    written(partial, {"notes.txt": "mine"})
    message = shell.refused(dense)
    assert message == f"{partial} is in the way and no unfinished run of yours; remove it, or give another --output"
    (partial / JOURNAL).mkdir()  # anybody can make one
    assert shell.refused(dense) == message
    (partial / JOURNAL / OWNER).write_text("process 1 on here")
    message = shell.refused(dense)
    assert message.startswith(f"{partial}, where an unfinished run is kept, has files that no run of llm_snp wrote (no")
    for flags in (["--overwrite"], ["--resume"], ["--dry-run"]):
        assert shell.refused(dense, *flags) == message
    (partial / "notes.txt").unlink()
    half = ".model-00001-of-00004.safetensors.llm_snp"
    written(partial, {"config.json": "old", half: "half", "tekken.json": "", "NOTICE": ""})
    list_in_partial(partial, ["config.json", "tekken.json", "NOTICE"])
    assert shell.prune(dense)[0] == 0
    assert not partial.exists()
    assert not {"tekken.json", "NOTICE"} & {path.name for path in shell.output.iterdir()}


class Killed(BaseException):
    """The end of a process in the middle of a file operation, after which it does nothing more."""


@pytest.mark.parametrize("flags", [[], ["--resume"], ["--overwrite"]])
def test_a_run_that_is_killed_in_its_first_file_is_followed_by_another(
    shell: Shell, dense: Path, flags: list[str]
) -> None:
    """What says whose the directory is has the name of an unfinished file then."""
    written(shell.directory / "out.partial" / JOURNAL, {"lock": "", f".{OWNER}.llm_snp": "process 1 o"})
    assert shell.prune(dense, *flags)[0] == 0
    assert not (shell.directory / "out.partial").exists()


@pytest.mark.parametrize("kill", range(1, 10))
def test_a_run_that_is_killed_while_it_cleans_up_is_followed_by_another(
    shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch, kill: int
) -> None:
    """At any of the files that it removes when it is refused after it has begun."""
    partial, count = shell.directory / "out.partial", 0

    def removing(remove: Callable[..., Any]) -> Callable[..., Any]:
        def counted(path: Any, *args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count >= kill:
                raise Killed
            return remove(path, *args, **options)

        return counted

    with monkeypatch.context() as patch:

        def fail(*_: Any) -> None:
            for name in ("unlink", "rmdir"):
                patch.setattr(os, name, removing(getattr(os, name)))
            raise OptionError("refused")

        patch.setattr("llm_snp.running.run.decide", fail)
        with suppress(Killed):
            shell.prune(dense)
    assert shell.prune(dense, "--overwrite")[0] == 0
    assert not partial.exists()


def test_the_folder_of_a_run_that_was_killed_at_its_very_end_goes(shell: Shell, dense: Path) -> None:
    assert shell.prune(dense)[0] == 0
    (shell.output / JOURNAL).mkdir()
    assert shell.prune(dense, "--resume")[0] == 0
    assert not (shell.output / JOURNAL).exists()


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["README.md", "report.html", "plots/change.png", "tokenizer.model", "config.json"])
def test_what_a_person_put_into_an_unfinished_run_is_not_written_over(
    shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also under a name that a result has: notes on why it did not end, say."""
    with monkeypatch.context() as patch:
        patch.setattr("llm_snp.running.run.write_rest", interrupted)
        assert shell.prune(dense)[0] == 130
    partial = shell.directory / "out.partial"
    written(partial, {name: "mine"})
    for flags in ([], ["--resume"], ["--overwrite"]):
        assert f"has files that no run of llm_snp wrote ({name})" in shell.refused(dense, *flags)
    assert (partial / name).read_text() == "mine"
    (partial / name).unlink()
    assert shell.prune(dense, "--resume")[0] == 0


@pytest.mark.parametrize("name", ["owner", "lock"])
def test_a_file_that_has_another_name_in_a_journal_stays_as_it_is(shell: Shell, dense: Path, name: str) -> None:
    """An archive can have a hard link to a file that lies where it is unpacked."""
    journal = shell.directory / "out.partial" / JOURNAL
    written(journal, {OWNER: "process 1 on here"})
    (shell.directory / "thesis.tex").write_text("years of work")
    (journal / name).unlink(missing_ok=True)
    (journal / name).hardlink_to(shell.directory / "thesis.tex")
    assert shell.prune(dense)[0] == (2 if name == "lock" else 0)
    assert (shell.directory / "thesis.tex").read_text() == "years of work"


def state(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("journal", [{}, {OWNER: "process 1 on here"}, {OWNER: "", "replaces": "1"}])
def test_a_result_beside_another_is_no_earlier_one(shell: Shell, dense: Path, journal: dict[str, str]) -> None:
    """A run that is killed at its end leaves such a pair: here a person, or a stranger's archive, has made it."""
    assert shell.prune(dense)[0] == 0
    aside = shutil.copytree(shell.output, shell.directory / "out.replaced")
    written(shell.output / JOURNAL, journal | {"block-00000.json": "{}"})
    before = state(aside)
    for flags in ([], ["--resume"], ["--overwrite"]):
        shell.run(dense, "--output", shell.output, *flags)
        assert state(aside) == before
    if not journal:
        assert (shell.output / JOURNAL / "block-00000.json").exists()


def test_names_as_long_as_a_disk_has_them_travel(shell: Shell, dense: Path, tmp_path: Path) -> None:
    """They were too long for the name that a file has until it is whole, after all the work."""
    model = Path(shutil.copytree(dense, tmp_path / "model"))
    licence, template = "a" * 247 + "-LICENSE", "b" * 249 + ".jinja"
    terms = "Copyright: permission is granted. " * 20
    written(model, {licence: terms, f"additional_chat_templates/{template}": "{{ messages }}"})
    assert shell.prune(model)[0] == 0
    assert (shell.output / licence).read_text() == terms
    assert (shell.output / "additional_chat_templates" / template).read_text() == "{{ messages }}"


@pytest.mark.parametrize("link", ["", JOURNAL, f"{JOURNAL}/lock", f"{JOURNAL}/{OWNER}", "config.json", "plots"])
def test_an_unfinished_run_that_is_links_is_not_followed(shell: Shell, dense: Path, link: str) -> None:
    """What is opened for writing, emptied or removed in it lies there, and nowhere else."""
    mine, partial = shell.directory / "mine", shell.directory / "out.partial"
    written(mine, {"lock": "mine", OWNER: "mine", "block-00000.json": "mine", "config.json": "mine"})
    written(mine / JOURNAL, {"lock": "mine", OWNER: "mine", "settings.json": "mine"})
    place = partial / link if link else partial
    place.parent.mkdir(parents=True, exist_ok=True)
    if link not in ("", JOURNAL):
        written(partial / JOURNAL, {OWNER: "process 1 on here"})
        (partial / link).unlink(missing_ok=True)
    place.symlink_to(mine / Path(link).name if link in (f"{JOURNAL}/lock", f"{JOURNAL}/{OWNER}") else mine)
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    for flags in ([], ["--overwrite"], ["--resume"]):
        assert str(partial) in shell.refused(dense, *flags)
    assert {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()} == before


def test_what_someone_puts_into_an_unfinished_run_is_kept(
    shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        (shell.directory / "out.partial" / "notes.txt").write_text("mine")
        raise OptionError("refused")

    monkeypatch.setattr("llm_snp.running.run.decide", fail)
    assert shell.prune(dense)[0] == 2
    assert [path.name for path in (shell.directory / "out.partial").iterdir()] == ["notes.txt"]


def test_a_directory_that_looks_put_aside_is_not_moved(shell: Shell, dense: Path) -> None:
    written(shell.directory / "out.replaced", {"notes.txt": "mine"})
    written(shell.directory / "out.partial" / JOURNAL, {OWNER: "process 1 on here"})
    before = sorted(shell.directory.rglob("*"))
    code, _, err = shell.prune(dense, "--resume")
    assert code == 2
    assert "out.replaced is in the way" in err
    assert sorted(path for path in shell.directory.rglob("*") if path.name != "lock") == before


def test_a_result_that_was_put_aside_is_not_lost(shell: Shell, dense: Path) -> None:
    assert shell.prune(dense)[0] == 0
    aside = written(shell.directory / "out.replaced", {"file": "content"})
    message = shell.refused(dense, "--overwrite")
    assert message == f"{aside} is in the way; it may be a still earlier result: move or remove it"


@pytest.fixture
def second_shard_fails(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make writing the second shard of every run fail."""

    def install(error: BaseException) -> None:
        whole, count = safetensors.torch.save_file, 0

        def save_file(tensors: Any, path: Any, metadata: Any) -> None:
            nonlocal count
            count += "model-" in Path(path).name
            if count == 2:
                Path(path).write_bytes(b"half")
                raise error
            whole(tensors, path, metadata=metadata)

        monkeypatch.setattr(safetensors.torch, "save_file", save_file)

    return install


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_disk_full_while_writing(shell: Shell, dense: Path, second_shard_fails: Any, error: Exception) -> None:
    second_shard_fails(error)
    output = shell.directory / "new" / "folder" / "out"
    code, out, err = shell.prune(dense, "--output", output)
    assert (code, out) == (2, "")
    shard = f"{output}.partial/model-00002-of-00004.safetensors"
    assert err.startswith(f"llm_snp: {shard} cannot be written: the disk is full; free some space or give another ")
    assert f"1 of 3 blocks are finished and kept in {output}.partial; go on with: " in err
    assert err.endswith(" --resume\n")
    assert not output.exists()


def test_another_error_while_writing(shell: Shell, dense: Path, second_shard_fails: Any) -> None:
    second_shard_fails(OSError(errno.EIO, "Input/output error"))
    code, out, err = shell.prune(dense)
    assert (code, out) == (2, "")
    shard = f"{shell.output}.partial/model-00002-of-00004.safetensors"
    assert err.startswith(f"llm_snp: {shard} cannot be written: Input/output error; give another directory; 1 of 3 ")
    assert sorted(path.name for path in shell.directory.iterdir()) == ["out.partial"]
    assert not list((shell.directory / "out.partial").glob(".model-*"))


def test_a_failed_run_keeps_the_earlier_result(shell: Shell, dense: Path, second_shard_fails: Any) -> None:
    assert shell.prune(dense)[0] == 0
    before = weight_files(shell.output)
    second_shard_fails(OSError(errno.ENOSPC, "No space left on device"))
    assert shell.prune(dense, "--overwrite", "--seed", "1")[0] == 2
    assert weight_files(shell.output) == before


def test_a_result_that_cannot_get_its_name_keeps_the_earlier_one(
    shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shell.prune(dense)[0] == 0
    before = weight_files(shell.output)
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if Path(source).name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        code, _, err = shell.prune(dense, "--overwrite", "--seed", "1")
    assert code == 2
    assert err.startswith(f"llm_snp: {shell.output} cannot be written: Input/output error; give another directory; 3 ")
    assert weight_files(shell.output) == before
    assert sorted(path.name for path in shell.directory.iterdir()) == ["out", "out.partial"]
    assert shell.prune(dense, "--overwrite", "--seed", "1", "--resume")[0] == 0
    assert weight_files(shell.output) != before
    assert [path.name for path in shell.directory.iterdir()] == ["out"]


def test_too_little_space_is_noticed_before_anything_is_computed(
    shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(shell.directory)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    message = shell.refused(dense)
    assert re.match(r"the result needs up to [\d.]+ [kM]B, but the disk of .* has 1 kB free; ", message), message
    assert message.endswith("give --output on another disk")


@pytest.fixture
def small_disk(shell: Shell) -> Iterator[Path]:
    """A real file system of 200 kB."""
    mounted = shell.directory / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(mounted)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not permitted")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=False)


def test_a_disk_that_is_really_full(shell: Shell, dense: Path, small_disk: Path) -> None:
    message = shell.refused(dense, "--output", small_disk / "out", "--sparsity", "0.5")
    assert message.startswith("the result needs up to ")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm_snp.running.room.check_space", lambda *a: None)
        code, _, message = shell.prune(dense, "--output", small_disk / "out", "--sparsity", "0.5")
    assert code == 2
    assert "cannot be written: the disk is full" in message


@pytest.mark.parametrize("existing", [False, True])
def test_interrupted(shell: Shell, dense: Path, second_shard_fails: Any, existing: bool) -> None:
    before: dict[str, bytes] = {}
    if existing:
        assert shell.prune(dense)[0] == 0
        before = weight_files(shell.output)
    second_shard_fails(KeyboardInterrupt())
    code, _, err = shell.prune(dense, "--overwrite", "--seed", "1")
    assert code == 130
    assert err.startswith(
        f"llm_snp: interrupted; 1 of 3 blocks are finished and kept in {shell.output}.partial; go on "
    )
    assert sorted(path.name for path in shell.directory.iterdir()) == ["out", "out.partial"][not existing :]
    assert (weight_files(shell.output) if existing else {}) == before


def test_interrupted_before_anything_is_finished(shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_snp.running.run.decide", raising(KeyboardInterrupt()))
    code, _, err = shell.prune(dense)
    assert (code, err) == (130, "llm_snp: interrupted; nothing was left behind\n")
    assert not list(shell.directory.iterdir())


def test_a_bug_keeps_its_traceback_and_what_was_finished(
    shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writer, "index", raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        shell.prune(dense)
    assert [path.name for path in shell.directory.iterdir()] == ["out.partial"]


# Numbers


def with_neurons(change: Callable[[torch.nn.Linear], object], directory: Path) -> Path:
    """A model whose first ten neurons in each block were changed in fc1."""
    model = tiny_opt()
    with torch.no_grad():
        for block in model.model.decoder.layers:
            change(block.fc1)
    return save(model, directory)


def dead(fc1: torch.nn.Linear) -> None:
    fc1.bias[:10] = -1000.0


def constant(fc1: torch.nn.Linear) -> None:
    fc1.weight[:10] = 0.0
    fc1.bias[:10] = 5.0


@pytest.mark.parametrize("damping", [0.0, 1e-3])
@pytest.mark.parametrize("order", ["greedy", "zca", "loo", "energy"])
@pytest.mark.parametrize("change", [dead, constant])
def test_neurons_that_never_change_cost_nothing(
    prune: Prune,
    tmp_path: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[torch.nn.Linear], None],
    order: str,
    damping: float,
) -> None:
    dense = with_neurons(change, tmp_path / "dense")
    monkeypatch.setattr(
        "llm_snp.pruning.plan.allocate", lambda by, curves, _: [c.units - 10 * (c.unit == "neurons") for c in curves]
    )
    choices = {"order": order, "allocation": "uniform", "attention": "heads", "target": "self", "damping": damping}
    report = prune(dense, tmp_path / "out", **choices)
    ids = calibration_windows(str(text), load_tokenizer(dense), SAMPLES, LENGTH, seed=0).tokens
    torch.testing.assert_close(logits(load(tmp_path / "out"), ids), logits(load(dense), ids), rtol=1e-3, atol=1e-3)
    raised = [note for note in report["notes"] if "damping raised" in note]
    assert bool(raised) == (damping == 0)
    for note in raised:
        assert "mlp" in note
        assert "moments were singular" in note


@pytest.mark.parametrize("options", [{"method": "snp"}, {"method": "best"}, {"attention": "both"}])
def test_fewer_tokens_than_neurons(
    prune: Prune, dense: Path, tmp_path: Path, text: Path, options: dict[str, Any]
) -> None:
    report = prune(dense, tmp_path / "out", samples=1, sequence_length=NEURONS // 3, damping=0.0, **options)
    said = "moments were singular, or weights too large for their type; damping raised from 0 to"
    assert any(said in note for note in report["notes"]), report["notes"]
    assert len(report["blocks"]) == BLOCKS
    # What is left can still give every output on so few tokens, and with weights that are no larger than they were.
    model, whole = load(tmp_path / "out"), load(dense)
    ids = calibration_windows(str(text), load_tokenizer(dense), 1, NEURONS // 3, seed=0).tokens
    torch.testing.assert_close(logits(model, ids), logits(whole, ids), rtol=1e-3, atol=1e-3)
    assert max(p.abs().max() for p in model.parameters()) < 10 * max(p.abs().max() for p in whole.parameters())


def test_no_note_where_nothing_was_raised(prune: Prune, dense: Path, tmp_path: Path) -> None:
    report = prune(dense, tmp_path / "out", samples=64, damping=1e-6)
    assert report["notes"] == []


def test_activations_that_overflow_are_named(shell: Shell) -> None:
    model = tiny_opt()
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.weight *= 1e5
    save(model, shell.directory / "model")
    message = shell.refused(shell.directory / "model", "--dtype", "float16", "--allocation", "uniform")
    assert re.match(r"activations at (fc2|mlp) of block 1 overflow the type they are computed in; ", message)
    assert "use --dtype float32 or bfloat16; what was measured or finished by then is removed" in message  # block 0
    message = shell.refused(shell.directory / "model", "--dtype", "float16")
    assert "overflow" in message or "not finite" in message
    code, _, err = shell.prune(shell.directory / "model", "--dtype", "bfloat16")
    assert code == 0, err


def test_dense_model_that_overflows_in_evaluation(shell: Shell, text: Path) -> None:
    model = tiny_opt()
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.weight *= 1e5
    save(model, shell.directory / "model")
    short = ("--samples", SAMPLES, "--sequence-length", LENGTH, "--calibration", text, "--evaluate", text, "--quiet")
    code, _, err = shell.run(shell.directory / "model", *short, "--dtype", "float16", "--output", shell.output)
    assert code == 2
    assert err == "llm_snp: the model's logits are not finite; use --dtype float32 or bfloat16\n"
    assert not shell.output.exists()


def test_tokenizer_travels(shell: Shell, dense: Path) -> None:
    folder = written(shell.directory / "plain", {})
    copy_tokenizer(folder)
    assert shell.prune(dense)[0] == 0
    for file in folder.iterdir():
        assert (shell.output / file.name).read_bytes() == (dense / file.name).read_bytes()
