"""`export`: what it writes and says, and what it refuses without leaving anything behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Prune, Shell, copy_tokenizer
from pruned_models import save_pruned
from tiny_models import save_tiny

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
writing = pytest.importorskip("llm_snp.result.gguf.writing")

DIFFERENT = [{"heads": 4, "neurons": 48}, {"heads": 2, "neurons": 17}, {"heads": 1, "neurons": 40}]


@pytest.fixture(scope="module")
def result(prune: Prune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that lost heads and neurons, other ones in every block; its dense model has a card."""
    folder = tmp_path_factory.mktemp("export")
    dense = save_tiny("llama", folder / "small-llama")
    (dense / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n")
    prune(dense, folder / "small-llama-40", 0.4, attention="heads")
    return folder / "small-llama-40"


@pytest.fixture
def own(result: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(result, tmp_path / "result"))


def refused(shell: Shell, *arguments: str | Path) -> str:
    """Run `export`; it fails as bad input must, and leaves what was there."""
    before = {path: path.stat().st_mtime_ns for path in shell.directory.rglob("*") if path.is_file()}
    code, out, err = shell.run("export", *arguments, "--quiet")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("llm_snp: ")
    assert {path: path.stat().st_mtime_ns for path in shell.directory.rglob("*") if path.is_file()} == before
    return err.removeprefix("llm_snp: ").strip()


def fields_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_what_it_writes_and_says(shell: Shell, result: Path) -> None:
    code, out, err = shell.run("export", result, "--gguf", "small.gguf", "--type", "f32")
    assert code == 0, err
    assert "small.gguf" in out
    assert "llama.cpp's deci" in out
    assert "llama-completion -m small.gguf" in out
    assert [path.name for path in shell.directory.iterdir()] == ["small.gguf"]
    found = fields_of(Path("small.gguf"))
    report = json.loads((result / "report.json").read_text())
    widths = json.loads((result / "config.json").read_text())["block_widths"]
    assert found["general.architecture"] == "deci"
    assert found["general.name"] == "small-llama-40"
    assert found["general.base_model.0.name"] == "small-llama"
    assert found["general.license"] == "apache-2.0"
    assert found["general.languages"] == ["en"]
    assert found["llm_snp.sparsity"] == pytest.approx(report["sparsity"]["achieved"])
    assert f"{report['sparsity']['achieved']:.2%}" in found["general.description"]
    assert found["deci.attention.head_count_kv"] == [width["heads"] for width in widths]
    assert found["deci.attention.head_count"] == [2 * width["heads"] for width in widths]
    assert found["deci.feed_forward_length"] == [width["neurons"] for width in widths]


@pytest.mark.parametrize(("kind", "bits"), [("f32", 32), ("f16", 16), ("bf16", 16), ("q8_0", 8.5)])
def test_the_types(kind: str, bits: float, shell: Shell, tmp_path: Path) -> None:
    """Rows of 32 are groups of 8 bits with a scale; rows of 17 stay in 16 bits; what is no matrix in 32."""
    save_pruned("llama", DIFFERENT, tmp_path / "model")
    assert shell.run("export", "model", "--gguf", "out.gguf", "--type", kind, "--quiet")[0] == 0
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader("out.gguf").tensors}
    name = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}[kind]
    embedding = tensors["token_embd.weight"]
    assert (embedding.tensor_type.name, embedding.n_bytes * 8 / embedding.n_elements) == (name, bits)
    assert tensors["blk.1.ffn_down.weight"].tensor_type.name == ("F16" if kind == "q8_0" else name)
    assert tensors["blk.1.attn_norm.weight"].tensor_type.name == "F32"


def test_a_name_that_loaders_look_for_is_refused(shell: Shell, own: Path) -> None:
    """transformers takes `model.safetensors` before the shards, and the result would not load any more."""
    before = sorted(own.rglob("*"))
    assert "taken for a part of the model" in refused(shell, own, "--gguf", own / "model.safetensors")
    assert sorted(own.rglob("*")) == before


def test_over_a_file_only_if_told(shell: Shell, result: Path) -> None:
    Path("there.gguf").write_bytes(b"GGUF of before")
    assert "exists; give another name, or --overwrite" in refused(shell, result, "--gguf", "there.gguf")
    assert shell.run("export", result, "--gguf", "there.gguf", "--overwrite")[0] == 0
    assert fields_of(Path("there.gguf"))["general.architecture"] == "deci"


@pytest.mark.parametrize("found", ["mine", "report.json", "plots/kept.png", "link", "pipe"])
def test_over_no_other_file(found: str, shell: Shell, own: Path) -> None:
    """--overwrite is for an earlier GGUF file; the way to anything else is a typo."""
    Path("mine").write_text("mine")
    Path("link").symlink_to("nowhere")
    os.mkfifo("pipe")
    (own / "plots").mkdir(exist_ok=True)
    (own / "plots" / "kept.png").write_bytes(b"\x89PNG")
    name = own / found if "." in found else found
    assert "is there, and no GGUF file" in refused(shell, own, "--gguf", name, "--overwrite")
    assert Path("link").is_symlink()


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_a_file_that_comes_while_it_is_written_stays(
    flags: tuple[str, ...], shell: Shell, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its room may be somebody else's by the end, and two exports to one name do not write into one file."""
    write, said = writing.GGUFWriter.write_ti_data_to_file, []

    def meanwhile(self: Any) -> None:
        write(self)
        monkeypatch.setattr(writing.GGUFWriter, "write_ti_data_to_file", write)
        said.append(shell.run("export", result, "--gguf", "new.gguf", "--quiet"))
        Path("new.gguf").write_text("mine")

    monkeypatch.setattr(writing.GGUFWriter, "write_ti_data_to_file", meanwhile)
    code, _, err = shell.run("export", result, "--gguf", "new.gguf", "--quiet", *flags)
    assert code == 2
    assert "new.gguf has come there since this run began, and stays; give another name" in err
    assert "new.gguf is being written by another process; wait for it" in said[0][2]
    assert Path("new.gguf").read_text() == "mine"
    assert not Path(".new.gguf.llm_snp").exists()


def test_a_hidden_file_of_that_name_stays(shell: Shell, own: Path) -> None:
    """A file is written under another name until it is whole: one that nobody else has."""
    Path(".profile").write_text("mine")
    assert shell.run("export", own, "--gguf", "profile", "--quiet")[0] == 0
    assert Path(".profile").read_text() == "mine"


def test_a_model_that_was_trained_on_has_no_report(shell: Shell, tmp_path: Path) -> None:
    save_pruned("llama", DIFFERENT, tmp_path / "tuned")
    assert shell.run("export", "tuned", "--gguf", "tuned.gguf")[0] == 0
    assert fields_of(Path("tuned.gguf"))["general.name"] == "tuned"


def test_bad_options(shell: Shell, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("folder").mkdir()
    for arguments, part in {
        (): "needs --gguf FILE",
        ("--gguf", "out.gguf", "--type", "q4_k_m"): "--type 'q4_k_m' is not known; choose one of f16, bf16, f32, q8_0",
        ("--gguf", "folder"): "is a directory",
        ("--gguf", "nowhere/out.gguf"): "there is no directory nowhere",
        ("--gguf", str(result / "config.json"), "--overwrite"): "is part of a result",
        ("--gguf", "out.gguf", "--tokenizer-from", "none.gguf"): "is no file",
        ("--gguf", "out.gguf", "--typo", "f16"): "there is no option --typo; did you mean --type?",
    }.items():
        assert part in refused(shell, result, *arguments), arguments
    find_spec = PathFinder.find_spec
    absent = lambda name, *rest: None if name == "gguf" else find_spec(name, *rest)  # noqa: E731
    monkeypatch.setattr(PathFinder, "find_spec", absent)
    monkeypatch.delitem(sys.modules, "gguf")
    assert "install it with `pip install gguf`" in refused(shell, result, "--gguf", "out.gguf")


def test_what_is_no_result(shell: Shell, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "dense")
    (tmp_path / "empty").mkdir()
    for name, part in {
        "absent": "absent does not exist",
        "empty": "no config.json",
        "dense": "its model is not a pruned one (llama); give the directory that a run of llm_snp has written",
    }.items():
        assert part in refused(shell, name, "--gguf", "out.gguf"), name


def test_what_is_damaged(shell: Shell, own: Path) -> None:
    shard = own / "model-00002-of-00004.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "is not as it was written: model-00002-of-00004.safetensors changed" in refused(
        shell, own, "--gguf", "o.gguf"
    )
    shard.unlink()
    assert "model-00002-of-00004.safetensors missing" in refused(shell, own, "--gguf", "o.gguf")
    shard.write_bytes(whole)
    (own / "report.json").write_text("{")
    assert "report.json is damaged" in refused(shell, own, "--gguf", "o.gguf")
    (own / "report.json").unlink()
    shard.write_bytes(whole[: len(whole) // 2])  # without a report there are no hashes
    assert "it may be truncated" in refused(shell, own, "--gguf", "o.gguf")
    shard.write_bytes(whole)
    (own / "tokenizer.json").unlink()
    assert "tokenizer" in refused(shell, own, "--gguf", "o.gguf")


def test_a_full_disk(shell: Shell, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("there.gguf").write_text("GGUF of mine")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        assert " kB, and its disk has 1 kB left; " in refused(shell, result, "--gguf", "out.gguf")
    write = writing.GGUFWriter.write_tensor_data
    count = 0

    def full(self: Any, tensor: Any) -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, tensor)

    monkeypatch.setattr(writing.GGUFWriter, "write_tensor_data", full)
    assert "the disk is full" in refused(shell, result, "--gguf", "there.gguf", "--overwrite")
    assert Path("there.gguf").read_text() == "GGUF of mine"


SLOW = """
import os, sys, time
from llm_snp.cli import main
from llm_snp.result.gguf import writing
write = writing.GGUFWriter.write_tensor_data
def slowly(self, tensor):
    write(self, tensor)
    print("wrote", file=sys.stderr, flush=True)
    time.sleep(60)
writing.GGUFWriter.write_tensor_data = slowly
sys.exit(main(["export", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_one_that_is_killed_leaves_no_file_of_that_name(number: int, own: Path, shell: Shell) -> None:
    command = [sys.executable, "-c", SLOW, str(own), "--gguf", "out.gguf"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        while not lines or "wrote" not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        process.send_signal(number)
        process.wait(30)
    assert process.returncode != 0
    left = {path.name for path in shell.directory.iterdir()} - {"result"}
    assert left == ({".out.gguf.llm_snp"} if number == signal.SIGKILL else set())
    assert shell.run("export", own, "--gguf", "out.gguf")[0] == 0
    assert fields_of(Path("out.gguf"))["general.architecture"] == "deci"
    assert {path.name for path in shell.directory.iterdir()} == {"result", "out.gguf"}


def test_numbers_beyond_16_bits(shell: Shell, tmp_path: Path) -> None:
    model = save_pruned("llama", DIFFERENT, tmp_path / "model")
    model.model.embed_tokens.weight.data[0, 0] = 1e5
    model.save_pretrained(tmp_path / "model")
    said = refused(shell, "model", "--gguf", "out.gguf", "--type", "f16")
    assert "token_embd.weight has numbers up to 100000" in said
    assert "--type bf16" in said
    assert shell.run("export", "model", "--gguf", "out.gguf", "--type", "bf16")[0] == 0


def test_the_tokenizer_of_another_file(shell: Shell, result: Path, own: Path, tmp_path: Path) -> None:
    assert shell.run("export", result, "--gguf", "dense.gguf")[0] == 0
    (own / "tokenizer.json").unlink()
    (own / "tokenizer_config.json").unlink()
    arguments = ("--gguf", "out.gguf", "--tokenizer-from", "dense.gguf")
    assert shell.run("export", own, *arguments)[0] == 0
    there, here = (fields_of(Path(name)) for name in ("dense.gguf", "out.gguf"))
    of_tokens = {name: value for name, value in there.items() if name.startswith("tokenizer.")}
    assert len(of_tokens) > 8
    assert {name: value for name, value in here.items() if name.startswith("tokenizer.")} == of_tokens
    assert "are the same file" in refused(shell, own, *arguments[:2], "--tokenizer-from", "out.gguf", "--overwrite")
    Path("other.gguf").write_bytes(b"no such file")
    assert "no GGUF file that can be read" in refused(shell, own, "--gguf", "o.gguf", "--tokenizer-from", "other.gguf")
    save_pruned("llama", DIFFERENT, tmp_path / "larger", vocab_size=2050)
    copy_tokenizer(tmp_path / "larger")
    said = refused(shell, "larger", "--gguf", "o.gguf", "--tokenizer-from", "dense.gguf")
    assert "has 2048 tokens, and the model 2050" in said


def test_the_tokenizer_of_a_file_that_is_damaged(shell: Shell, result: Path) -> None:
    """Such a file may be a stranger's: it is read as far as it goes, and has a list of texts or is none."""
    array, number, text = (struct.pack("<I", kind) for kind in (9, 4, 8))
    texts = array + text + struct.pack("<Q", 2048) + b"".join(_text(f"t{i}") for i in range(2048))
    cases: list[dict[str, bytes]] = [
        {"tokens": number + struct.pack("<I", 7)},
        {"tokens": text + _text("x" * 2048)},
        {"tokens": array + number + struct.pack("<Q2048I", 2048, *range(2048))},
        {"tokens": array + number + struct.pack("<Q", 2**60) + bytes(64)},
        {"tokens": texts, "merges": array + text + struct.pack("<Q", 0)},
        {"tokens": texts, "scores": array + struct.pack("<IQf", 6, 1, 0.0)},
        {"tokens": texts, "x": array + array + struct.pack("<Q", 1) + number + struct.pack("<QI", 1, 5)},
    ]
    for fields in cases:
        values = b"".join(_text(f"tokenizer.ggml.{name}") + value for name, value in fields.items())
        Path("other.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(fields)) + values)
        said = refused(shell, result, "--gguf", "o.gguf", "--tokenizer-from", "other.gguf")
        assert "--tokenizer-from other.gguf is no GGUF file that can be read" in said


def test_where_another_file_lay_is_not_taken_over(shell: Shell, result: Path) -> None:
    texts = struct.pack("<IIQ", 9, 8, 2048) + b"".join(_text(f"t{i}") for i in range(2048))
    fields = (
        _text("tokenizer.ggml.tokens") + texts + _text("tokenizer.ggml.path") + struct.pack("<I", 8) + _text("/home/a")
    )
    Path("other.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + fields)
    assert shell.run("export", result, "--gguf", "o.gguf", "--tokenizer-from", "other.gguf")[0] == 0
    assert b"/home/a" not in Path("o.gguf").read_bytes()


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def test_a_tokenizer_that_nobody_knows(shell: Shell, own: Path) -> None:
    path = own / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, fields["pre_tokenizer"]]}
    path.write_text(json.dumps(fields))
    said = refused(shell, own, "--gguf", "out.gguf")
    assert "is none that is known here (a pre-tokenizer Whitespace" in said
    assert "--tokenizer-from DENSE.gguf" in said
