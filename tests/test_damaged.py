"""Checkpoints, texts and paths as no tool writes them: one sentence each, before anything is allocated or touched."""

from __future__ import annotations

import gzip
import json
import os
import resource
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from conftest import Prune, Shell, paragraphs, weight_files
from pyarrow import parquet
from safetensors.torch import load_file

from llm_snp.config import PruneConfig
from llm_snp.dense import readers
from llm_snp.dense.card import card_metadata
from llm_snp.dense.readers import documents
from llm_snp.errors import CorpusError, OptionError, OutputError
from llm_snp.healing.options import HealConfig
from llm_snp.pruning.job import output_of
from llm_snp.result.origin import ancestors, is_dense_of

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def copy(dense: Path, shell: Shell) -> Path:
    """A copy of the model to be damaged."""
    return Path(shutil.copytree(dense, shell.directory / "model"))


def refused(shell: Shell, model: Path, *flags: str | Path) -> str:
    """What is said of a model, by a dry run and by a run."""
    said = {shell.refused(model, *flags, *more) for more in ([], ["--dry-run"])}
    assert len(said) == 1
    return said.pop()


def configured(model: Path, **fields: Any) -> Path:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return model


# config.json


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 2**63}, "hidden_size is 9223372036854775808 in "),
        ({"ffn_dim": 10**400}, "ffn_dim is a number of 1329 bits in "),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000 in "),
        ({"num_hidden_layers": 10**9}, "it must be at least 1 and at most 10000"),
        ({"block_widths": []}, "has block_widths, which models have that llm_snp has pruned, and is of type 'opt'"),
        ({"max_position_embeddings": 1}, "it must be at least 2 and at most 2147483648"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True in "),
        ({"head_dim": 0}, "head_dim is 0 in "),
        ({"head_dim": -64}, "head_dim is -64 in "),
        ({"sliding_window": "x"}, "sliding_window is 'x' in "),
        ({"num_attention_heads": "4"}, "expected int, got str"),
        (
            {"ffn_dim": 2**30},
            "describes a model whose blocks have 3,221,225,508 neurons, heads and",
        ),
        (
            {"num_hidden_layers": 10_000, "ffn_dim": 2**20},
            "no model has more than 33,554,432; are its widths right?",
        ),
        ({"dtype": "int8"}, "dtype is 'int8' in "),
        ({"dtype": 16}, "dtype is 16 in "),
        ({"torch_dtype": {"a": 1}}, "torch_dtype is {'a': 1} in "),
        ({"dtype": "float8_e4m3fn"}, "expected one of float16, bfloat16, float32, float64"),
        ({"pad_token_id": 10**6}, "config.json describes a model that this transformers cannot build ("),
    ],
)
def test_configs(shell: Shell, copy: Path, fields: dict[str, Any], message: str) -> None:
    assert message in refused(shell, configured(copy, **fields))


@pytest.mark.parametrize("dropout", [-0.5, float("nan")])
def test_configs_that_fail_when_the_model_runs(shell: Shell, copy: Path, dropout: float) -> None:
    configured(copy, dropout=dropout)
    assert "that this transformers cannot run (dropout probability has to be" in shell.refused(copy)
    message = shell.refused(copy, "--calibration", "self")
    assert "cannot write a text itself (dropout probability has to be" in message


def test_a_config_that_is_nested_too_deeply(shell: Shell, copy: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "opt", "x": ' + DEEP + "}")
    assert refused(shell, copy).endswith("config.json is not JSON: it is nested too deeply")


def test_more_blocks_or_larger_ones_than_there_are_weights(shell: Shell, copy: Path) -> None:
    message = shell.refused(configured(copy, num_hidden_layers=9000))
    assert message.endswith("says 9000 blocks, but the weights are 52 tensors; they belong to different models")
    # 400 GB, of which nothing may be allocated
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = shell.refused(
        configured(copy, num_hidden_layers=3, ffn_dim=2**22, hidden_size=2**12, word_embed_proj_dim=2**12)
    )
    assert "has shape" in message
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 1 << 28


@pytest.fixture(scope="module")
def plain(prune: Prune, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights that come of text that the model wrote."""
    output = tmp_path_factory.mktemp("plain") / "out"
    prune(dense, output, calibration="self", samples=2)
    return weight_files(output)


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "torch.float16"},
        {"torch_dtype": "torch.bfloat16"},
        {"output_hidden_states": True},
        {"return_dict": False},
        {"_attn_implementation": "flash_attention_2"},
        {"use_cache": False},
        {"num_labels": 2**40},
    ],
)
def test_configs_that_are_only_unusual(
    prune: Prune, dense: Path, tmp_path: Path, fields: dict[str, Any], plain: dict[str, bytes]
) -> None:
    """The result has the weights that it has without them."""
    model = configured(Path(shutil.copytree(dense, tmp_path / "model")), **fields)
    prune(model, tmp_path / "out", calibration="self", evaluate=("self",), samples=2)
    mine = weight_files(tmp_path / "out")
    assert mine.keys() == plain.keys()
    assert {name for name in mine if mine[name] != plain[name]} <= {"config.json"}


# Weights


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b", "x\0y", 5]
)
def test_weights_are_beside_their_index(shell: Shell, copy: Path, name: Any) -> None:
    shutil.copy(copy / "model.safetensors", shell.directory / "secret.safetensors")
    (copy / "sub").mkdir()
    shutil.move(copy / "model.safetensors", copy / "sub" / "x.safetensors")
    tensors = load_file(copy / "sub" / "x.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
    message = shell.refused(copy)
    assert "model.safetensors.index.json names " in message
    assert "beside" in message


def linked(model: Path, to: Path, content: Path) -> Path:
    """A directory that has of `model` copies, but of its weights a link, to a copy of `content`."""
    shutil.copytree(model, to, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    content.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(model / "model.safetensors", content)
    (to / "model.safetensors").symlink_to(content)
    return to


def test_weights_may_be_links_as_in_the_cache_of_the_hub(prune: Prune, dense: Path, tmp_path: Path) -> None:
    blob = tmp_path / "cache" / "blobs" / "0123abcd"
    prune(linked(dense, tmp_path / "cache" / "snapshots" / "main", blob), tmp_path / "cached")
    within = tmp_path / "model" / "weights" / "model.safetensors"
    prune(linked(dense, tmp_path / "model", within), tmp_path / "out", calibration="self")


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_that_are_links_out_of_their_directory(shell: Shell, dense: Path, sharded: bool) -> None:
    """Whoever unpacks a stranger's archive makes them, and has what they lead to pruned under the stranger's terms."""
    private = shell.directory / "private" / "model.safetensors"
    model = linked(dense, shell.directory / "model", private)
    file = model / "model.safetensors"
    if sharded:
        index = {"weight_map": dict.fromkeys(load_file(private), "shard.safetensors")}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        file = file.rename(model / "shard.safetensors")
    said = f"{file} is a link to {private}, outside of {model}; copy it there, or give the directory that has it"
    assert shell.refused(model) == said
    assert shell.refused(model, "--calibration", "self") == said


def test_an_index_that_is_nested_too_deeply(shell: Shell, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text('{"weight_map": ' + DEEP + "}")
    assert 'is not a checkpoint index, a JSON object with a "weight_map"' in shell.refused(copy)


def pickled(model: Path, change: Any, zipped: bool = True) -> Path:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(change(tensors) or tensors, model / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    return model


FC1 = "model.decoder.layers.1.fc1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({5: t.pop(FC1)}), "is not the state dict of a model: expected tensors by name"),
        (lambda t: t.update({FC1: torch.zeros(1).expand(2**40)}), "which is more than the file's "),
        (lambda t: t.update({FC1: t[FC1].to_sparse()}), f"'{FC1}' in "),
        (lambda t: t.update({FC1: t[FC1] + 1j}), "is no plain tensor"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles(shell: Shell, copy: Path, change: Any, message: str, zipped: bool) -> None:
    assert message in shell.refused(pickled(copy, change, zipped))


@pytest.mark.parametrize("zipped", [True, False])
def test_parameters_instead_of_tensors(prune: Prune, dense: Path, tmp_path: Path, zipped: bool) -> None:
    model = Path(shutil.copytree(dense, tmp_path / "model"))
    pickled(model, lambda t: {name: torch.nn.Parameter(tensor) for name, tensor in t.items()}, zipped)
    prune(model, tmp_path / "out")
    prune(dense, tmp_path / "plain")
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "plain")


def test_an_archive_that_unpacks_to_more_than_it_is(shell: Shell, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with zipfile.ZipFile(copy / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data/0", bytes(10_000_000))
    assert shell.refused(copy).endswith("is compressed, which no weight file is; save it anew with torch.save")


# Text


def test_a_bomb_of_one_endless_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "UNPACKED", 1 << 20)
    for name in ("bomb.txt.gz", "bomb.jsonl.gz"):
        with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
            for _ in range(40):
                file.write(b"a" * 1_000_000)
        with pytest.raises(CorpusError, match="unpacks to over 100 times its size"):
            list(documents(str(tmp_path / name), "evaluation"))


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "PIECE", 100)
    monkeypatch.setattr(readers, "LONGEST_LINE", 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "' + "a" * 5000 + '"}\n')
    with pytest.raises(CorpusError, match="has a line of over 1000 characters"):
        list(documents(str(tmp_path / "a.jsonl"), "evaluation"))
    text = "\n\n".join(["short", "b" * 333, "", "c" * 100, "\n", "d" * 99 + "\n" + "e" * 100, ""])
    (tmp_path / "a.txt").write_text(text)
    assert "\n\n".join(documents(str(tmp_path / "a.txt"), "evaluation")) == text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ' + "9" * 5000 + "}", 'line 2: expected a JSON object with a key "text"'),
        ('{"text": ' + DEEP + "}", 'line 2: expected a JSON object with a key "text"'),
        ('{"text": "\\ud800"}', 'line 2: "text" has half of a surrogate pair'),
    ],
)
def test_lines_of_json(shell: Shell, dense: Path, line: str, message: str) -> None:
    (shell.directory / "a.jsonl").write_text(json.dumps({"text": paragraphs(1, 1)[0]}) + "\n" + line)
    assert message in shell.refused(dense, "--calibration", "a.jsonl")


def test_tables_with_values_that_are_none(shell: Shell, dense: Path) -> None:
    bad = pa.array([b"\xff\xfe"] * 3)
    tables = {
        "bytes": pa.Array.from_buffers(pa.string(), 3, bad.buffers()),
        "dates": pa.array([2**62] * 3, pa.timestamp("us")),
    }
    for name, column in tables.items():
        parquet.write_table(pa.table({"text": column}), shell.directory / f"{name}.parquet")
        assert f"{name}.parquet is damaged: " in shell.refused(dense, "--calibration", f"{name}.parquet")


def test_a_pipe_is_no_text(shell: Shell, dense: Path) -> None:
    os.mkfifo(shell.directory / "pipe.txt")
    assert shell.refused(dense, "--calibration", "pipe.txt").startswith("pipe.txt is no file that ends")


# Paths


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "/"], "--output / is the root of the file system; give a directory below it"),
        (["--output", "loop"], "--output loop cannot be made: "),
        (["--output", "x" * 300], "File name too long"),
        (["--output", "caf\udce9"], "--output is 'caf\\udce9', which is no UTF-8 text"),
        # As of a shell's variable that is not set.
        *((["--overwrite", flag, ""], f"{flag} is empty; give something") for flag in ("--output", "--push-to-hub")),
        (["--offload", "~nobody-there"], "--offload ~nobody-there is no directory that can be written to"),
        (["--offload", "x" * 300], "is no directory that can be written to"),
        (["--calibration", "~nobody-there/a.txt"], "~nobody-there/a.txt is neither a file nor a known corpus"),
        (["--calibration", "loop"], "loop is neither a file nor a known corpus"),
        (["--device", "cpu:1"], "--device cpu:1 was asked for, but there is one CPU device; use --device cpu"),
    ],
)
def test_paths(shell: Shell, dense: Path, flags: list[str], message: str) -> None:
    (shell.directory / "loop").symlink_to(shell.directory / "loop")
    assert message in shell.refused(dense, *flags)


def test_a_working_directory_whose_name_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries that write weights take UTF-8 only: said before the work, not after it."""
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    monkeypatch.chdir(odd)
    with pytest.raises(OutputError, match="is no UTF-8 text, and weights cannot be written there"):
        output_of(PruneConfig(output="out"))
    assert output_of(PruneConfig(output="../out")) == Path("../out")


@pytest.mark.parametrize("field", ["directory", "text", "teacher", "output", "evaluate"])
def test_names_that_no_report_could_have(field: str) -> None:
    options: dict[str, Any] = {"directory": "a", "text": ("b",), "tokens": 1}
    for name in ("caf\udce9", "a\0b"):
        given = (name,) if field in ("text", "evaluate") else name
        with pytest.raises(OptionError, match=f"--{field} is .*, which is no UTF-8 text"):
            HealConfig(**options | {field: given})


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "/" + "x" * 5000, "x/y/" + "z" * 5000])
def test_models_that_a_report_names_and_no_disk_can_have(name: str, tmp_path: Path) -> None:
    report = {"options": {"model": name}, "model": {"hub": True, "name": name}}
    assert not is_dense_of("other", tmp_path, tmp_path, report)
    assert ancestors(tmp_path, report) == []


def test_an_output_in_the_home_of_nobody(shell: Shell, dense: Path) -> None:
    """As the shell has it: there is no such user, so it is a name like any other."""
    code, _, err = shell.prune(dense, "--output", "~nobody-there/out", "--device", "cpu:0")
    assert code == 0, err
    assert (shell.directory / "~nobody-there" / "out" / "report.json").exists()


@pytest.mark.parametrize("name", ["./loop", "./" + "x" * 300])
def test_models_that_cannot_be_looked_at(shell: Shell, name: str) -> None:
    (shell.directory / "loop").symlink_to(shell.directory / "loop")
    assert " cannot be read: " in refused(shell, Path(name) if "loop" in name else Path(shell.directory, name[2:]))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("what", ["config.json", "model.safetensors"])
def test_what_may_not_be_read(shell: Shell, copy: Path, what: str) -> None:
    (copy / what).chmod(0)
    assert shell.refused(copy) == f"{copy / what} cannot be read: Permission denied"
    copy.chmod(0)
    try:
        assert shell.refused(copy) == f"{copy / 'config.json'} cannot be read: Permission denied"
    finally:
        copy.chmod(0o700)


# The end, at the start


CARD = """---
license: 2024-01-01
license_name: 5
tags: [good, 2024-01-01, 1.5, .nan, [nested, [list]], {a: b}, "\\ud800"]
language: &anchor [en, *anchor]
datasets: [c4, ~, true]
---
"""


def test_a_card_with_what_no_document_can_hold(prune: Prune, dense: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(dense, tmp_path / "model"))
    (model / "README.md").write_text(CARD)
    assert card_metadata(model) == {"tags": ["good"], "language": ["en"], "datasets": ["c4"]}
    report = prune(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["model"]["card"] == report["model"]["card"]
    assert "- good" in (tmp_path / "out" / "README.md").read_text()


def test_of_a_long_card_what_is_carried_is_read(tmp_path: Path) -> None:
    """A model may list what it has in a hundred benchmarks, and YAML takes a minute for a number with many colons."""
    file, long = tmp_path / "README.md", ":1" * 200_000
    for head in (
        f"license: mit\nx: 1{long}\ntags:\n- good\n# note\n- fine\nlanguage:\n  - en",
        f"license: mit\ntags:\n- good\n- fine\nlanguage: [en]\nlicense_name: 1{long}",
    ):
        file.write_text(f"---\n{head}\n---\n# Text\n---\nlicense: gpl\n---\n", newline="\r\n")
        assert card_metadata(tmp_path) == {"license": "mit", "tags": ["good", "fine"], "language": ["en"]}


@pytest.mark.parametrize(
    "text",
    [
        "# Andr\xe9's model".encode("latin-1"),
        b"![](data:image/png;base64," + b"A" * 1_100_000 + b")",
        ("x" * 999_920 + "\xe9" * 100).encode(),  # what is read ends within a character
    ],
)
def test_the_text_of_a_card_takes_nothing_from_its_licence(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf---\nlicense: cc-by-nc-4.0\n---\n" + text)
    assert card_metadata(tmp_path) == {"license": "cc-by-nc-4.0"}


def test_a_line_of_a_card_that_is_wrong_takes_nothing_from_the_others(tmp_path: Path) -> None:
    file, head = tmp_path / "README.md", "license: mit\nmodel: a: b\nlanguage:\n- no\n- en\ntags: [one\n"
    file.write_text(f"---\n{head}---\n")
    assert card_metadata(tmp_path) == {"license": "mit", "language": ["no", "en"]}
    file.write_text("---\nlanguage: no\nlicense_name: Andr\xe9's\n---\n", encoding="latin-1")
    assert card_metadata(tmp_path) == {"language": "no", "license_name": "Andr\xe9's"}


@pytest.mark.documents
def test_what_the_documents_cannot_hold_shows_before_the_work(
    shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> str:
        raise ZeroDivisionError

    worked = []
    monkeypatch.setattr("llm_snp.running.run.decide", lambda session: worked.append(session))
    for place in ("html_page", "model_card"):
        with monkeypatch.context() as patch:
            patch.setattr(f"llm_snp.running.rehearsal.{place}", fail)
            with pytest.raises(ZeroDivisionError):
                shell.prune(dense)
    assert not worked
