"""Text: every source gives the same stream, windows are seeded and disjoint, and the protocol is the usual one."""

from __future__ import annotations

import gzip
import json
import lzma
import math
import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from conftest import LENGTH, load, paragraphs
from pyarrow import parquet
from transformers import AutoTokenizer

from llm_snp.dense import data, readers
from llm_snp.dense.checkpoint import Checkpoint
from llm_snp.dense.data import calibration_windows, documents, evaluation_windows, self_written
from llm_snp.dense.hub import load_config
from llm_snp.dense.skeleton import Skeleton
from llm_snp.errors import CorpusError
from llm_snp.evaluation.perplexity import perplexity_loaded, perplexity_streamed
from llm_snp.families import FAMILIES


@pytest.fixture(scope="module")
def tokenizer(dense: Path) -> Any:
    return AutoTokenizer.from_pretrained(dense)


DOCUMENTS = [*paragraphs(30, seed=5), 'Naïve café — 日本語\tand \\n "quotes".']
JOINED = "\n\n".join(DOCUMENTS)
LINES = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(DOCUMENTS))


def write_all(folder: Path) -> list[Path]:
    """The same documents in every form there is."""
    contents: dict[str, bytes] = {
        "a.txt": JOINED.encode(),
        "bom.txt": b"\xef\xbb\xbf" + JOINED.encode(),
        "windows.txt": JOINED.replace("\n", "\r\n").encode(),
        "two.dots.txt": JOINED.encode(),
        "a.txt.gz": gzip.compress(JOINED.encode()),
        "a.txt.xz": lzma.compress(JOINED.encode()),
        "a.jsonl": LINES.encode(),
        "blank.jsonl": LINES.replace("\n", "\n\n").encode(),
        "c4-train.00000-of-01024.json.gz": gzip.compress(LINES.encode()),
        "a.jsonl.gz": gzip.compress(LINES.encode()),
        "a.jsonl.xz": lzma.compress(LINES.encode()),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    table = pa.table({"id": list(range(len(DOCUMENTS))), "text": DOCUMENTS})
    parquet.write_table(table, folder / "a.parquet", row_group_size=7)
    datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(str(folder / "saved"))
    return [*(folder / name for name in contents), folder / "a.parquet", folder / "saved"]


def test_every_form_gives_the_same_windows(tmp_path: Path, tokenizer: Any) -> None:
    expected = tokenizer(JOINED)["input_ids"]
    calibrations = set()
    for path in write_all(tmp_path):
        assert "\n\n".join(documents(str(path), "calibration")) == JOINED, path.name
        windows = evaluation_windows(str(path), tokenizer, LENGTH)
        assert windows.tokens.flatten().tolist() == expected[: windows.tokens.numel()], path.name
        assert windows.text_tokens == len(expected)
        assert windows.source == str(path)
        calibrations.add(calibration_windows(str(path), tokenizer, 5, LENGTH, seed=1).sha256)
    assert len(calibrations) == 1


def saved_with(folder: Path, column: str, texts: list[str]) -> Path:
    """A dataset as a stranger may have saved it: a column of images that are somewhere else."""
    images = [{"bytes": None, "path": str(folder / "nowhere.png")} for _ in texts]
    kinds = {"text": datasets.Value("string")} | {
        column: {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    }
    saved = datasets.Dataset.from_dict({"text": texts} | {column: images}, features=datasets.Features(kinds))
    saved.save_to_disk(str(folder / "strange"))
    info = folder / "strange" / "dataset_info.json"
    fields = json.loads(info.read_text())
    fields["features"][column] = {"_type": "Image"}
    info.write_text(json.dumps(fields))
    return folder / "strange"


def test_what_the_other_columns_of_a_dataset_name_is_not_opened(tmp_path: Path) -> None:
    """It may be a place on the network, or code to older versions of fsspec."""
    assert [*documents(str(saved_with(tmp_path, "image", DOCUMENTS)), "calibration")] == DOCUMENTS


@pytest.mark.parametrize("where", ["../", "{}/", "..\\"])
@pytest.mark.parametrize("key", ["_data_files", "_indices_data_files"])
def test_a_dataset_reads_no_file_but_its_own(tmp_path: Path, where: str, key: str) -> None:
    datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(str(tmp_path / "strange"))
    [file] = (tmp_path / "strange").glob("*.arrow")
    file.rename(tmp_path / "private.arrow")
    state = tmp_path / "strange" / "state.json"
    name = where.format(tmp_path) + "private.arrow"
    state.write_text(json.dumps(json.loads(state.read_text()) | {key: [{"filename": name}]}))
    with pytest.raises(CorpusError, match=r"private\.arrow' as a file of the dataset; only files beside it are read"):
        next(documents(str(tmp_path / "strange"), "calibration"))


def test_a_dataset_with_a_link_out_of_it_is_not_read(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(str(tmp_path / "strange"))
    [file] = (tmp_path / "strange").glob("*.arrow")
    file.rename(tmp_path / "private.arrow")
    file.symlink_to(tmp_path / "private.arrow")
    with pytest.raises(CorpusError, match=rf"is a link to {tmp_path}/private\.arrow, outside of the dataset; copy it"):
        next(documents(str(tmp_path / "strange"), "calibration"))


def test_an_empty_dataset_has_no_text(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": []}).save_to_disk(str(tmp_path / "empty"))
    with pytest.raises(CorpusError, match="empty has no text"):
        [*documents(str(tmp_path / "empty"), "calibration")]


def test_a_text_column_of_images_is_refused(tmp_path: Path) -> None:
    path = saved_with(tmp_path, "text", DOCUMENTS)
    with pytest.raises(CorpusError, match='has Image in its column "text", expected strings'):
        [*documents(str(path), "calibration")]


@pytest.mark.parametrize("seed", range(20))
def test_plain_text_survives_to_the_character(tmp_path: Path, seed: int) -> None:
    text = "".join(random.Random(seed).choices("a \n\n\n", k=200)) + "a"
    (tmp_path / "a.txt").write_text(text)
    assert "\n\n".join(documents(str(tmp_path / "a.txt"), "calibration")) == text


def test_raw_is_what_the_hub_has(tmp_path: Path) -> None:
    # The lines of wiki.test.raw; on the Hub each is a row, and a blank one is empty.
    raw = " \n = Title = \n \n A paragraph of text . \n Another one . \n \n \n = = Section = = \n"
    rows = ["", " = Title = \n", "", " A paragraph of text . \n", " Another one . \n", "", "", " = = Section = = \n"]
    (tmp_path / "wiki.test.raw").write_text(raw)
    assert list(documents(str(tmp_path / "wiki.test.raw"), "evaluation")) == rows
    (tmp_path / "wiki.test.raw.gz").write_bytes(gzip.compress(raw.encode()))
    assert list(documents(str(tmp_path / "wiki.test.raw.gz"), "evaluation")) == rows


@pytest.mark.parametrize(
    ("source", "purpose", "expected"),
    [
        ("wikitext2", "calibration", {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"}),
        ("wikitext2", "evaluation", {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"}),
        ("c4", "calibration", {"path": "allenai/c4", "files": "en/c4-train.00000-of-01024.json.gz", "rows": 4000}),
        ("c4", "evaluation", {"path": "allenai/c4", "files": "en/c4-validation.00000-of-00008.json.gz", "rows": 1100}),
    ],
)
def test_what_is_asked_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, source: str, purpose: str, expected: dict[str, Any]
) -> None:
    rows = ["", " = Title = \n", "", " Text . \n"] if source == "wikitext2" else [f"page {i}" for i in range(5000)]
    asked: dict[str, Any] = {}

    def load_dataset(path: str, **options: Any) -> Any:
        asked.update(options, path=path)
        whole = datasets.Dataset.from_dict({"text": rows, "url": rows})
        return whole.to_iterable_dataset() if options.get("streaming") else whole

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = list(documents(source, purpose))
    assert asked["path"] == expected["path"]
    if source == "wikitext2":
        assert (asked["name"], asked["split"]) == (expected["name"], expected["split"])
        assert found == rows
    else:
        assert list(asked["data_files"].values()) == [expected["files"]]
        assert asked["split"] in asked["data_files"]
        assert asked["streaming"] is True
        assert found == rows[: expected["rows"]]


@pytest.mark.parametrize(("source", "repository"), [("wikitext2", "Salesforce/wikitext"), ("c4", "allenai/c4")])
@pytest.mark.parametrize("purpose", ["calibration", "evaluation"])
def test_a_directory_that_is_called_like_the_hub_s_dataset_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, repository: str, purpose: str
) -> None:
    """datasets prefers it, and before version 4 runs a script in it: the working directory may be a stranger's."""
    place = tmp_path / repository
    place.mkdir(parents=True)
    (place / f"{place.name}.py").write_text("raise SystemExit('a stranger has run this')")
    (place / "rows.jsonl").write_text('{"text": "Not what is on the Hub."}\n' * 20)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorpusError, match="is in the way of the Hub's dataset") as error:
        list(documents(source, purpose))
    assert str(place) in str(error.value)


def test_hub_and_raw_file_give_the_same_windows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Any
) -> None:
    rows = [row for text in paragraphs(20, seed=6) for row in (f" = {text[:5]} = \n", "", f" {text} \n", "")]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_dict({"text": rows}))
    (tmp_path / "wiki.test.raw").write_text("".join(row or " \n" for row in rows))
    hub = evaluation_windows("wikitext2", tokenizer, LENGTH)
    local = evaluation_windows(str(tmp_path / "wiki.test.raw"), tokenizer, LENGTH)
    assert hub.sha256 == local.sha256
    ids = tokenizer("\n\n".join(rows))["input_ids"]
    assert hub.tokens.flatten().tolist() == ids[: len(ids) // LENGTH * LENGTH]


def test_calibration_windows_are_seeded_and_disjoint(text: Path, tokenizer: Any) -> None:
    ids = tokenizer(text.read_text())["input_ids"]
    available = len(ids) // LENGTH
    a, b, c = (calibration_windows(str(text), tokenizer, 40, LENGTH, seed) for seed in (0, 0, 1))
    assert a.available == available
    assert torch.equal(a.tokens, b.tokens)
    assert a.sha256 == b.sha256 != c.sha256
    assert a.tokens.shape == (40, LENGTH)
    of_text = [tuple(ids[i * LENGTH : (i + 1) * LENGTH]) for i in range(available)]
    chosen = [tuple(row) for row in a.tokens.tolist()]
    assert len(set(of_text)) == available
    assert len(set(chosen)) == 40
    assert set(chosen) <= set(of_text)
    assert chosen != sorted(chosen, key=of_text.index)
    everything = calibration_windows(str(text), tokenizer, available, LENGTH, seed=3)
    assert {tuple(row) for row in everything.tokens.tolist()} == set(of_text)
    with pytest.raises(CorpusError, match=f"which is {available} windows of {LENGTH}; --samples asks for"):
        calibration_windows(str(text), tokenizer, available + 1, LENGTH, seed=0)


def test_calibration_reads_only_the_beginning_of_a_long_text(
    text: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "CALIBRATION_CHARACTERS", 3000)
    ids = tokenizer(text.read_text()[:3000])["input_ids"]
    assert calibration_windows(str(text), tokenizer, 5, LENGTH, seed=0).text_tokens == len(ids)
    whole = tokenizer(text.read_text())["input_ids"]
    assert evaluation_windows(str(text), tokenizer, LENGTH).text_tokens == len(whole)


def test_a_text_without_blank_lines_is_not_read_as_a_whole(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For calibration. What perplexity is measured on is the file to the character."""
    assert readers.LONGEST_PARAGRAPH > data.CALIBRATION_CHARACTERS
    path, lines = tmp_path / "lines.txt", [f"Line {i} of the file.\n" for i in range(1000)]
    path.write_text("".join(lines))
    windows = []
    for longest, parts in ((1 << 25, 1), (2100, 10)):
        monkeypatch.setattr(readers, "LONGEST_PARAGRAPH", longest)
        monkeypatch.setattr(data, "CALIBRATION_CHARACTERS", 2000)
        found = list(documents(str(path), "calibration"))
        assert len(found) >= parts
        assert max(map(len, found)) < longest + len(lines[-1])
        assert "\n".join(found).strip() == "".join(lines).strip()
        assert list(documents(str(path), "evaluation")) == ["".join(lines)]
        windows.append(calibration_windows(str(path), tokenizer, 5, LENGTH, seed=1).sha256)
    assert windows[0] == windows[1]


def test_perplexity_is_that_of_the_protocol(dense: Path, held_out: Path, tokenizer: Any) -> None:
    model = load(dense)
    windows = evaluation_windows(str(held_out), tokenizer, LENGTH)
    ids = tokenizer(held_out.read_text())["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    losses = []
    for start in range(0, len(ids) - LENGTH + 1, LENGTH):
        window = torch.tensor(ids[start : start + LENGTH])
        for position in range(1, LENGTH):
            with torch.no_grad():
                logits = model(input_ids=window[None, :position]).logits[0, -1]
            losses.append(F.cross_entropy(logits.double(), window[position]).item())
        if len(losses) > 300:
            break
    windows = data.Windows(windows.tokens[: len(losses) // (LENGTH - 1)], "some", "", 0, 0)
    skeleton = Skeleton(
        load_config(dense), FAMILIES["opt"].blocks, Checkpoint(dense), torch.device("cpu"), torch.float32
    )
    for found in (
        perplexity_loaded(model, windows, lambda: None),
        perplexity_streamed(skeleton, windows, lambda: None),
    ):
        assert found.tokens == len(losses)
        assert found.nll == pytest.approx(math.fsum(losses), rel=1e-6)
        assert found.perplexity == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-6)
        assert found.windows * (found.sequence_length - 1) == found.tokens


@pytest.mark.parametrize("kind", ["plain", "dictionary"])
def test_a_table_that_is_made_to_fill_memories(kind: str, tmp_path: Path) -> None:
    """A few kilobytes of one long text in a thousand rows."""
    path = tmp_path / "bomb.parquet"
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 1024, pa.int32()), pa.array(["the city of " * 1_500_000]))
    table = pa.table({"text": rows})
    parquet.write_table(table, path, compression="zstd", store_schema=kind == "dictionary")
    before, taken = pa.total_allocated_bytes(), []
    with pytest.raises(CorpusError, match="times as much text as its size"):
        taken += (pa.total_allocated_bytes() - before for _ in documents(str(path), "evaluation"))
    assert max(taken, default=0) < 500_000_000


def test_windows_that_the_model_writes(dense: Path) -> None:
    model = load(dense)
    state = torch.random.get_rng_state()
    a, b, c = (self_written(model, 5, LENGTH, seed, start=2, batch=3) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert a.tokens.shape == (5, LENGTH)
    assert (a.tokens[:, 0] == 2).all()
    assert torch.equal(a.tokens, b.tokens)
    assert a.sha256 != c.sha256
    assert len({tuple(row) for row in a.tokens.tolist()}) == 5
    assert a.tokens[:, 1:].unique().numel() > 40
    for name, value in (
        ("max_time", 1e-9),
        ("num_return_sequences", 4),
        ("repetition_penalty", 9.0),
        ("sequence_bias", [[[5], 100.0]]),
        ("return_dict_in_generate", True),
    ):
        other = load(dense)
        setattr(other.generation_config, name, value)
        assert torch.equal(self_written(other, 5, LENGTH, 0, start=2, batch=3).tokens, a.tokens), name
