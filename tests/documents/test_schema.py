"""A report.json that is not what a run wrote is one sentence, and costs none of the documents that are there."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Shell
from test_documents import SHAPES, healed, made_up, with_measurements

import llm_snp.documents.writing as writing
from llm_snp.documents.card import model_card
from llm_snp.documents.page import html_page
from llm_snp.documents.plots import plot_images
from llm_snp.documents.report import summary
from llm_snp.documents.schema import fault
from llm_snp.documents.shareable import shareable
from llm_snp.documents.writing import read_report, write_documents
from llm_snp.errors import CheckpointError, OutputError
from llm_snp.system.files import write_together

GONE = object()
DAMAGES: list[Any] = [
    GONE, None, True, -1, 0, 10**400, 1e308, "", "x", "\ud800", "a\0b", "$\\frac{$", [], {}, [None], {"": None}, ["x"]
]  # fmt: skip
CASES = 120


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in parsed JSON."""
    if path:
        yield path
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def damaged(report: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(report)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return changed


@pytest.mark.parametrize("report", [shape for shape, _ in SHAPES.values()], ids=list(SHAPES))
def test_every_report_that_a_run_can_write_fits(report: dict[str, Any]) -> None:
    assert fault(json.loads(json.dumps(shareable(report)))) == ""


def test_whatever_fits_can_be_shown(tmp_path: Path) -> None:
    """Every place of a report, with something else in it: it is refused, or all documents can be made of it."""
    source = random.Random(0)
    report = healed(with_measurements(made_up(2)))
    everywhere = [path for path in places(report) if "curves" not in path or path[2:3] in ((0,), ())]
    cases = [(path, value) for path in everywhere for value in DAMAGES]
    refused = 0
    for number, (path, value) in enumerate(source.sample(cases, CASES)):
        changed = damaged(report, path, value)
        try:
            content = json.dumps(changed)
        except ValueError:  # more digits than Python writes
            continue
        (tmp_path / "report.json").write_text(content)
        try:
            found = read_report(tmp_path)
        except CheckpointError:
            refused += 1
            continue
        model_card(found)
        summary(found)
        if number % 10 == 0:  # a second each
            plot_images(found)
            html_page(found)
    assert CASES / 4 < refused < CASES


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "damaged or truncated"),
        ('{"versions": {"llm_snp": "0.1.0"', "damaged or truncated"),
        ("[" * 100_000, "damaged or truncated"),
        ('{"versions": {"llm_snp": "0.1.0"}, "format": 1, "seed": NaN}', "NaN is no number of JSON"),
        ('{"versions": {"llm_snp": "0.1.0"}, "format": 1, "seed": 1e999}', "1e999 is no number of JSON"),
        ('{"versions": {"llm_snp": "0.1.0"}, "format": 1, "x": ' + "[" * 200 + "]" * 200 + "}", "nested more than"),
        ('{"versions": {"llm_snp": "0.1.0"}, "format": 1}', "options: field required, and 1"),
    ],
)
@pytest.mark.parametrize("command", ["report", "bench", "push"])
def test_a_damaged_report_is_one_sentence(
    shell: Shell, command: str, content: str, sentence: str, tmp_path: Path
) -> None:
    directory = tmp_path / "damaged"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "opt"}')
    (directory / "report.json").write_text(content)
    code, out, err = shell.run(command, directory, *(["ann/x"] if command == "push" else []))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert sentence in err
    assert {path.name: path.read_text() for path in directory.iterdir()}["report.json"] == content


def test_a_failure_leaves_the_documents_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_documents(tmp_path, made_up())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = with_measurements(read_report(tmp_path))

    def fails(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    for name in ("plot_images", "html_page", "model_card", "write_together"):
        with monkeypatch.context() as patch:
            patch.setattr(writing, name, fails)
            with pytest.raises(ZeroDivisionError):
                write_documents(tmp_path, copy.deepcopy(other))
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_files_are_written_together_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "inside").touch()
    (tmp_path / "a").write_text("old")
    with pytest.raises(OutputError):
        write_together(tmp_path, {"a": b"new", "c/d": b"new", "b": b"a directory is in the way"})
    assert (tmp_path / "a").read_text() == "old"
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a", "inside"]
    write_together(tmp_path, {"a": b"new", "c/d": b"new"})
    assert [(tmp_path / name).read_text() for name in ("a", "c/d")] == ["new", "new"]
