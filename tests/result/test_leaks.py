"""Nothing that is published tells of the machine or of the program that called: paths, names, tokens, environment."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import LENGTH, SAMPLES, Prune, Shell, save, tiny_opt

from llm_snp.config import PruneConfig
from llm_snp.documents.writing import read_report, write_documents
from llm_snp.errors import CheckpointError
from llm_snp.pruning.job import default_output, open_job
from llm_snp.result.origin import ancestors, dense_of, find_dense, is_dense_of
from llm_snp.running.resume import again, finished_before
from llm_snp.system.manifest import MEMORY
from llm_snp.system.private import REVISION, public_name
from llm_snp.system.remembering import recall, remember

pytestmark = [pytest.mark.documents, pytest.mark.cpu]

SECRET = "hf_verysecrettoken"
PROGRAM = """
import os, sys
import llm_snp
place, output = sys.argv[1], sys.argv[2]
options = dict(samples={samples}, sequence_length={length}, device="cpu", quiet=True)
report = llm_snp.prune(
    place + "/models/tiny", 0.3, output=output, calibration=place + "/texts/calibration.txt",
    evaluate=(place + "/texts/evaluation.txt",), **options
)
assert report["output"] == output
assert list(report["evaluation"]) == [place + "/texts/evaluation.txt"]
"""
LOCAL_NAME = "facebook/opt-125m"


def published(directory: Path) -> dict[str, bytes]:
    """The contents of what may be published of a result."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files if ".cache" not in path.parts}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, dense: Path, text: Path, held_out: Path) -> Path:
    """A person's home directory, with a model and texts, and a result that a program of that person has made."""
    home = tmp_path_factory.mktemp("machine") / "ann-of-this-machine"
    shutil.copytree(dense, home / "models" / "tiny")
    (home / "texts").mkdir()
    for path in (text, held_out):
        shutil.copy(path, home / "texts" / path.name)
    config = json.loads((home / "models" / "tiny" / "config.json").read_text())
    config["_name_or_path"] = str(home / "models" / "before")
    (home / "models" / "tiny" / "config.json").write_text(json.dumps(config))
    environment = os.environ | {"HOME": str(home), "HF_TOKEN": SECRET, "MY_SECRET": SECRET, "OMP_NUM_THREADS": "1"}
    program = PROGRAM.format(samples=SAMPLES, length=LENGTH)
    words = [sys.executable, "-c", program, str(home), str(home / "out" / "tiny-30"), "--token", SECRET]
    done = subprocess.run(words, env=environment, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return home


def test_nothing_of_the_machine_or_the_program_is_published(home: Path) -> None:
    result = home / "out" / "tiny-30"
    words = [SECRET, str(home), home.name, str(home.parent), str(Path.cwd()), sys.executable]
    words += [f"/{getpass.getuser()}/", f"on {socket.gethostname()}", "models/", "--token"]
    files = published(result)
    assert {"report.json", "README.md", "report.html", "config.json", "plots/kept.png"} <= set(files)
    for name, content in files.items():
        for word in words:
            assert word.encode() not in content, (name, word)
    report = read_report(result)
    assert report["command"].startswith("python -m llm_snp tiny --sparsity 0.3 --output tiny-30 --calibration calib")
    assert list(report["evaluation"]) == ["evaluation.txt"]
    assert report["model"]["name"] == report["options"]["model"] == "tiny"


def test_what_this_machine_needs_is_where_the_hub_and_git_leave_it_out(home: Path) -> None:
    result = home / "out" / "tiny-30"
    assert recall(result)["model"] == str(home / "models" / "tiny")
    assert dense_of(result, read_report(result)) == str(home / "models" / "tiny")
    assert MEMORY.startswith(".cache/huggingface/")
    assert (result / ".cache" / "huggingface" / ".gitignore").read_text() == "*\n"


def test_elsewhere_a_result_does_not_know_where_its_model_is(home: Path, tmp_path: Path) -> None:
    """Nor what it was measured on: a stranger's directory may say that of whatever it likes to be read."""
    copy = Path(shutil.copytree(home / "out" / "tiny-30", tmp_path / "copy"))
    assert recall(copy) == {}
    remember(copy, recall(home / "out" / "tiny-30"))
    copy = copy.rename(tmp_path / "renamed")
    assert dense_of(copy, read_report(copy)) == str(home / "models" / "tiny")
    for wrong in ({"model": "a\0b"}, {"model": ["a"]}, {"options": []}, {"options": {"evaluate": [5]}}, {"other": "x"}):
        remember(copy, wrong)
        assert recall(copy) == {}
    remember(copy, recall(home / "out" / "tiny-30"))
    with pytest.MonkeyPatch.context() as patch:  # another user of the machine, who knows the directory's number
        patch.setattr(os, "geteuid", lambda: (copy / MEMORY).stat().st_uid + 1)
        assert recall(copy) == {}
    assert recall(copy)
    shutil.rmtree(copy / ".cache")
    unknown = pytest.raises(CheckpointError, match="tiny was a directory on the machine that made")
    with unknown:
        dense_of(copy, read_report(copy))
    (copy / MEMORY).parent.mkdir(parents=True)
    for damaged in (b"{", b"[]", b"[" * 100_000, b'{"model": 5, "options": 5}', b"\xff"):
        (copy / MEMORY).write_bytes(damaged)
        with unknown:
            dense_of(copy, read_report(copy))


def test_the_memory_of_a_result_is_not_that_of_another_one(prune: Prune, dense: Path, tmp_path: Path) -> None:
    """Which git or the Hub's tools have put into its directory: they leave the memory alone."""
    other = save(tiny_opt(seed=5), tmp_path / "other")
    prune(dense, tmp_path / "out")
    prune(other, tmp_path / "theirs")
    assert recall(tmp_path / "out")["model"] == str(dense)
    for path in (tmp_path / "theirs").iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path / "out")
    assert recall(tmp_path / "out") == {}
    with pytest.raises(CheckpointError, match="other was a directory on the machine that made"):
        find_dense(tmp_path / "out", read_report(tmp_path / "out"))


@pytest.mark.parametrize("revision", ["/etc/ref", "../ref", "~/ref", "./ref", "a/../ref", "a//b", "", "a b"])
def test_a_revision_is_no_place(prune: Prune, dense: Path, tmp_path: Path, revision: str) -> None:
    """A stranger's report: without a connection the Hub's client would open a file of that name."""
    prune(dense, tmp_path / "out")
    report = read_report(tmp_path / "out")
    report["model"] |= {"name": "ann/tiny", "hub": True}
    report["options"] |= {"model": "ann/tiny", "revision": revision}
    with pytest.raises(CheckpointError, match="which is no branch, tag or commit"):
        find_dense(tmp_path / "out", report)


def test_a_model_of_the_hub_that_has_changed(
    prune: Prune, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its main branch has other weights by now than those that were pruned."""
    prune(dense, tmp_path / "out")
    report = read_report(tmp_path / "out")
    report["model"] |= {"name": "ann/tiny", "hub": True}
    report["options"] |= {"model": "ann/tiny", "revision": None}
    other = save(tiny_opt(seed=5), tmp_path / "other")
    for there, same in ((dense, True), (other, False)):
        monkeypatch.setattr("llm_snp.result.origin.locate", lambda *_, there=there: there)
        assert is_dense_of("ann/tiny", there, tmp_path / "out", report) == same
        if same:
            assert find_dense(tmp_path / "out", report) == dense
        else:
            with pytest.raises(CheckpointError, match="other has other weights than when"):
                find_dense(tmp_path / "out", report)


def test_revisions_that_are_some() -> None:
    for revision in ("main", "refs/pr/3", "release/v1.0", "0123abc", "feature-x+1"):
        assert REVISION.fullmatch(revision)


def test_a_model_that_has_changed_is_not_what_a_result_was_made_of(prune: Prune, dense: Path, tmp_path: Path) -> None:
    """Figures beside it, and what is learned from it, would be said of another one."""
    model = Path(shutil.copytree(dense, tmp_path / "model"))
    prune(model, tmp_path / "out")
    report = read_report(tmp_path / "out")
    assert find_dense(tmp_path / "out", report) == model
    save(tiny_opt(seed=5), model)
    changed = pytest.raises(CheckpointError, match=f"{model} has other weights than when .* was made of it")
    with changed:
        find_dense(tmp_path / "out", report)
    assert not is_dense_of(str(model), model, tmp_path / "out", report)
    # In a file system that a stranger has made he chooses its numbers, and with them who is believed.
    remember(tmp_path / "out", {name: known for name, known in recall(tmp_path / "out").items() if name != "read"})
    with changed:
        find_dense(tmp_path / "out", report)


def test_a_report_does_not_make_a_directory_its_model(
    home: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever heals a stranger's result would distil what lies at a place of his choice into it, and publish that."""
    copy = Path(shutil.copytree(home / "out" / "tiny-30", tmp_path / "copy"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dense, tmp_path / "me" / "secret")
    shutil.copytree(dense, tmp_path / "tiny")
    report = read_report(copy)
    for name in (str(dense), "tiny", "./tiny", "me/secret", "..", "~"):
        for hub in (False, True):
            strange = report | {
                "options": report["options"] | {"model": name},
                "model": report["model"] | {"name": name, "hub": hub},
            }
            why = "was a directory on the machine that made|is on the Hub, and what has that name in the working dir"
            with pytest.raises(CheckpointError, match=why):
                dense_of(copy, strange)
            assert not is_dense_of(name, dense, copy, strange)
            assert ancestors(copy, strange) == []


def options_of(home: Path, **other: Any) -> PruneConfig:
    texts = {"calibration": f"{home}/texts/calibration.txt", "evaluate": (f"{home}/texts/evaluation.txt",)}
    sizes = {"samples": SAMPLES, "sequence_length": LENGTH, "device": "cpu", "quiet": True, "resume": True}
    return PruneConfig(f"{home}/models/tiny", 0.3, f"{home}/out/tiny-30", **(texts | sizes | other))


def test_the_same_call_finds_its_result_and_gives_it_as_before(home: Path) -> None:
    report = finished_before(open_job(options_of(home), weights=False))
    assert report is not None
    assert list(report["evaluation"]) == [f"{home}/texts/evaluation.txt"]
    assert report["output"] == f"{home}/out/tiny-30"
    assert report["options"]["model"] == f"{home}/models/tiny"


def test_the_hint_is_the_call_s_own(home: Path) -> None:
    line = again(options_of(home, resume=False))
    assert line.startswith(f"python -m llm_snp {home}/models/tiny --sparsity 0.3 --output {home}/out/tiny-30 ")
    assert line.endswith(" --quiet --resume")
    assert "pytest" not in line.replace(str(home), "")


def test_a_local_model_is_never_published_as_one_on_the_hub(
    shell: Shell, prune: Prune, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its path looks like one where the run began, and is none where the documents are made anew."""
    shutil.copytree(dense, tmp_path / LOCAL_NAME)
    prune(Path(LOCAL_NAME), Path("out"))
    report = read_report(tmp_path / "out")
    assert (report["model"]["hub"], report["model"]["name"]) == (False, "opt-125m")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for _ in range(2):
        assert not any(LOCAL_NAME.encode() in content for content in published(tmp_path / "out").values())
        code, _, err = shell.run("report", tmp_path / "out")
        assert code == 0, err


def test_a_report_is_cleaned_when_it_is_written_anew(home: Path, tmp_path: Path) -> None:
    """It may have the command line of a program and paths, and be a stranger's: none is believed afterwards."""
    copy = Path(shutil.copytree(home / "out" / "tiny-30", tmp_path / "copy"))
    shutil.rmtree(copy / ".cache")
    report = json.loads((copy / "report.json").read_text())
    del report["model"]["hub"]
    report["command"] = f"program --token {SECRET}"
    report["options"]["model"] = report["model"]["name"] = f"{home}/models/tiny"
    report["evaluation"] = {f"{home}/texts/evaluation.txt": next(iter(report["evaluation"].values()))}
    (copy / "report.json").write_text(json.dumps(report))
    write_documents(copy, read_report(copy))
    for name, content in published(copy).items():
        assert SECRET.encode() not in content, name
        assert str(home).encode() not in content, name
    assert recall(copy) == {}
    with pytest.raises(CheckpointError, match="tiny was a directory on the machine that made"):
        dense_of(copy, read_report(copy))


def test_a_home_directory_is_not_called_by_the_name_of_who_lives_there(
    prune: Prune, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model in it, and it for a place to offload to, would be known by its last component."""
    for path in (home / "models" / "tiny").iterdir():
        shutil.copy(path, home)
    monkeypatch.setenv("HOME", str(home))
    report = prune(home, tmp_path / "result", offload=str(home))
    assert report["model"]["name"] == "home"
    for name, content in published(tmp_path / "result").items():
        assert home.name.encode() not in content, name
    assert default_output(PruneConfig(str(home))) == Path("home-snp-30")
    assert public_name(Path("/home/ann")) == public_name(Path("/Users/ann/")) == "home"
    assert public_name(Path("/home/ann/x")) == "x"
    monkeypatch.setenv("USER", "bob")
    assert public_name(Path("/scratch/bob")) == "home"
    assert public_name(Path("/scratch/bob/x")) == "x"
