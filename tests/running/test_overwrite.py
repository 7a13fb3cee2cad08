"""--overwrite and `report --output` replace what a run of llm_snp wrote, and nothing else."""

from __future__ import annotations

import errno
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
from conftest import Prune, Shell

from llm_snp.config import PruneConfig
from llm_snp.documents.writing import read_report, write_documents
from llm_snp.errors import CheckpointError, OutputError
from llm_snp.pruning.job import open_job
from llm_snp.running.inputs import inputs_of
from llm_snp.system import owned
from llm_snp.system.manifest import is_result, manifest, sealed, strays
from llm_snp.system.workspace import Workspace


@pytest.fixture(scope="module")
def pruned(prune: Prune, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result that tests only read."""
    output = tmp_path_factory.mktemp("overwrite") / "res"
    prune(dense, output)
    return output


@pytest.fixture
def result(shell: Shell, pruned: Path) -> Path:
    """A result that a test may change, in the directory of `shell`."""
    return Path(shutil.copytree(pruned, shell.directory / "res"))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def refused(shell: Shell, *arguments: str | Path) -> str:
    """The sentence of a refusal that leaves every byte as it was, with --dry-run as without."""
    before = contents(shell.directory)
    message = shell.refused(*arguments)
    assert shell.refused(*arguments, "--dry-run") == message
    assert contents(shell.directory) == before
    return message


def test_the_report_lists_what_the_run_wrote(result: Path) -> None:
    listed = read_report(result)["files"]
    there = {path.relative_to(result).as_posix() for path in result.rglob("*") if path.is_file()}
    assert set(listed) == {name for name in there if not name.startswith(".cache/")} - {"report.json"}
    assert strays(result) == []


@pytest.mark.parametrize(
    ("model", "output", "how"),
    [
        ("res/dense", "res", "is or holds"),
        ("res/a/b/dense", "res", "is or holds"),
        ("dense", "dense", "is or holds"),
        ("dense", "./x/../dense", "is or holds"),
        ("dense", "link", "is or holds"),
        ("link", "dense", "is or holds"),
        ("dense", "dense/out", "lies inside"),
        ("dense", "link/deep/out", "lies inside"),
        ("res.partial", "res", "is or holds"),
        ("res.replaced", "res", "is or holds"),
    ],
)
def test_an_output_that_would_touch_the_model_is_refused(
    shell: Shell, result: Path, dense: Path, model: str, output: str, how: str
) -> None:
    """The model has a report, as a result of the stock class would, which --overwrite replaces."""
    place = shell.directory / model.replace("link", "dense")
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(dense, place)
    shutil.copy(result / "report.json", place)
    (shell.directory / "x").mkdir()
    (shell.directory / "link").symlink_to("dense")
    if place.name.endswith(".partial"):
        (place / ".llm_snp").mkdir()
    message = refused(shell, model, "--output", output, "--overwrite")
    if place.suffix not in (".partial", ".replaced"):  # which are in the way anyhow
        assert f"{how} " in message
        assert "which the run reads" in message


def test_weights_that_are_linked_into_the_output(shell: Shell, result: Path, dense: Path) -> None:
    model = Path(shutil.copytree(dense, shell.directory / "model"))
    (model / "model.safetensors").rename(result / "dense.safetensors")
    (model / "model.safetensors").symlink_to(result / "dense.safetensors")
    assert "is or holds" in refused(shell, model, "--output", result, "--overwrite")


@pytest.mark.parametrize("linked", [False, True])
def test_text_inside_the_output(shell: Shell, result: Path, dense: Path, text: Path, linked: bool) -> None:
    inside = result / "texts" / "mine.txt"
    inside.parent.mkdir()
    shutil.copy(text, inside)
    given = inside
    if linked:
        given = shell.directory / "outside.txt"
        given.symlink_to(inside)
    message = refused(shell, dense, "--output", result, "--overwrite", "--calibration", given)
    assert f"is or holds {given}, which the run reads" in message


def test_all_that_a_run_reads_is_an_input(dense: Path, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "task.yaml", "states"):
        (tmp_path / name).touch()
    place = str(tmp_path)
    options = PruneConfig(
        str(dense),
        calibration=f"{place}/a.txt",
        evaluate=("wikitext2", f"{place}/b.txt", f"harness:piqa,{place}/task.yaml"),
        offload=f"{place}/states",
    )
    names = {"a.txt": True, "b.txt": True, "task.yaml": False, "states": False}
    expected = {dense: True} | {tmp_path / name: closed for name, closed in names.items()}
    assert inputs_of(open_job(options, weights=False)) == expected


def test_hidden_states_inside_the_output(shell: Shell, result: Path, dense: Path) -> None:
    (result / "plots").mkdir(exist_ok=True)
    message = refused(shell, dense, "--output", result, "--overwrite", "--offload", result / "plots")
    assert "which the run reads" in message


@pytest.mark.parametrize(
    "name",
    [
        "notes.md",
        ".hidden",
        ".config.json",
        "plots/mine.png",
        "lora/adapter_model.safetensors",
        "model.safetensors",
        "a/b/c/d",
    ],
)
def test_what_a_person_put_into_a_result_is_not_removed(shell: Shell, result: Path, dense: Path, name: str) -> None:
    (result / name).parent.mkdir(parents=True, exist_ok=True)
    (result / name).write_text("mine")
    message = refused(shell, dense, "--output", result, "--overwrite")
    assert f"has files that no run of llm_snp wrote, or that were changed since ({name})" in message


@pytest.mark.parametrize("name", ["README.md", "config.json", "generation_config.json", "tokenizer.json", "shard"])
def test_what_a_person_changed_in_a_result_is_not_removed(shell: Shell, result: Path, dense: Path, name: str) -> None:
    path = sorted(result.glob("model-*.safetensors"))[0] if name == "shard" else result / name
    path.write_bytes(path.read_bytes() + b" ")
    assert f"({path.name})" in refused(shell, dense, "--output", result, "--overwrite")


def test_a_report_that_a_person_changed_is_not_removed(shell: Shell, result: Path, dense: Path) -> None:
    path = result / "report.json"
    before = path.read_text()
    assert strays(result) == []
    path.write_text(json.dumps(json.loads(before) | {"my_notes": "three days by hand"}, indent=2))
    assert "changed since (report.json)" in shell.refused(dense, "--overwrite", "--output", result)
    path.write_text(json.dumps(json.loads(before)))  # with other spaces
    assert strays(result) == []
    path.write_text(json.dumps({name: value for name, value in json.loads(before).items() if name != "seal"}))
    assert strays(result) == ["report.json"]


@pytest.mark.parametrize("place", [".", ".cache", "gone"])
def test_the_working_directory_is_not_replaced(
    shell: Shell, result: Path, dense: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The run, and the shell that began it, would be in a directory that is none any more."""
    if place == "gone":
        (result.parent / "gone").mkdir()
        monkeypatch.chdir(result.parent / "gone")
        (result.parent / "gone").rmdir()
        Workspace(result, overwrite=True, resume=False).discard()
        return
    monkeypatch.chdir(result / place)
    message = shell.refused(dense, "--overwrite", "--output", ".." if place == ".cache" else ".")
    assert "is or holds the directory that this runs in" in message


@pytest.mark.parametrize("mode", [0o700, 0o2750, 0o777])
def test_who_may_read_what_is_replaced_may_read_the_result(
    shell: Shell, dense: Path, mode: int, request: pytest.FixtureRequest
) -> None:
    """Also while it grows: a person may have made the directory for himself alone."""
    request.addfinalizer(partial(os.umask, os.umask(0o022)))
    shell.output.mkdir()
    shell.output.chmod(mode)
    workspace = Workspace(shell.output, overwrite=False, resume=False)
    assert workspace.directory.stat().st_mode & 0o7777 == mode
    workspace.discard()
    assert shell.prune(dense)[0] == 0
    assert shell.output.stat().st_mode & 0o7777 == mode
    assert {path.stat().st_mode & 0o777 for path in shell.output.glob("*.*") if path.is_file()} == {0o644}
    assert shell.prune(dense, "--overwrite")[0] == 0
    assert shell.output.stat().st_mode & 0o7777 == mode
    (shell.output / "README.md").chmod(0o600)
    assert shell.run("report", shell.output)[0] == 0
    assert (shell.output / "README.md").stat().st_mode & 0o777 == 0o600


def test_what_a_killed_command_was_writing_is_nobody_else_s(result: Path) -> None:
    (result / ".report.json.llm_snp").write_text("half")
    (result / ".config.json.llm_snp").write_text("half")
    (result / ".env").write_text("mine")
    (result / ".env.llm_snp").write_text("mine")
    (result / ".report.json").write_text("mine")
    assert strays(result) == [".env", ".env.llm_snp", ".report.json"]


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ("/", "the root of the file system; give a directory below it"),
        ("/proc", "a mount point, which cannot be replaced; give a directory in it"),
    ],
)
def test_a_mount_point_cannot_be_replaced(shell: Shell, dense: Path, output: str, why: str) -> None:
    assert refused(shell, dense, "--output", output, "--overwrite") == f"--output {output} is {why}"


def test_links_in_a_result_are_not_followed(shell: Shell, result: Path, dense: Path) -> None:
    (shell.directory / "far").mkdir()
    (shell.directory / "far" / "notes").write_text("mine")
    (result / "linked").symlink_to(shell.directory / "far")
    assert "(linked)" in refused(shell, dense, "--output", result, "--overwrite")


def test_a_result_is_replaced_as_a_whole(shell: Shell, result: Path, dense: Path) -> None:
    before = (result / "config.json").read_bytes()
    (result / "empty").mkdir()
    code, _, err = shell.prune(dense, "--output", result, "--overwrite", "--sparsity", "0.5")
    assert code == 0, err
    assert (result / "config.json").read_bytes() != before
    assert strays(result) == []
    assert sorted(path.name for path in shell.directory.iterdir()) == ["res"]


def test_a_report_that_lists_no_files_owns_none(shell: Shell, result: Path, dense: Path) -> None:
    """It may be a stranger's, laid over files that are called as those of a result are."""
    report = json.loads((result / "report.json").read_text())
    del report["files"]
    (result / "report.json").write_bytes(sealed(report))
    before = contents(result)
    assert "README.md" in refused(shell, dense, "--output", result, "--overwrite")
    code, _, err = shell.run("report", result)
    assert (code, "report.json is damaged: files: field required" in err) == (2, True), err
    assert contents(result) == before


LINKS = {
    ".README.md.llm_snp": "far/mine",
    "plots": "far",
    ".report.json.llm_snp": "far/mine",
    ".cache": "far",
    "README.md": "far/mine",
}


@pytest.mark.parametrize("name", LINKS)
def test_documents_are_not_written_through_links(shell: Shell, result: Path, name: str) -> None:
    """A result of a stranger may have links to files of whoever makes its documents anew."""
    (shell.directory / "far").mkdir()
    for mine in ("mine", "kept.png", "seconds.png"):
        (shell.directory / "far" / mine).write_text("mine")
    if (result / name).is_dir():
        shutil.rmtree(result / name)
    (result / name).unlink(missing_ok=True)
    (result / name).symlink_to(shell.directory / LINKS[name])
    before = contents(shell.directory / "far")
    code, _, err = shell.run("report", result)
    assert contents(shell.directory / "far") == before
    if name == "plots":
        assert code == 2
        assert f"{result / name} is a link to another place, where nothing may be written" in err
    else:
        assert code == 0, err


@pytest.mark.parametrize("name", ["report.json", "README.md", ".cache/huggingface/llm_snp.json", "config.json"])
def test_what_never_ends_is_not_read(shell: Shell, result: Path, dense: Path, name: str) -> None:
    (result / name).unlink()
    (result / name).symlink_to("/dev/zero")
    for arguments in (["report", result], [dense, "--output", result, "--dry-run"], [result, "--dry-run"]):
        code, _, err = shell.run(*arguments)
        assert "Traceback" not in err
        needed = {"report": ["report.json"], result: ["config.json"]}.get(arguments[0], [name])
        assert code == (2 if name in needed else 0), err


def test_a_report_cannot_make_us_remove_what_lies_elsewhere(shell: Shell, result: Path, dense: Path) -> None:
    victim = shell.directory / "victim"
    victim.write_text("mine")
    report = json.loads((result / "report.json").read_text())
    names = ("../victim", str(victim), "plots/../../victim", "linked/victim")
    (result / "report.json").write_text(
        json.dumps(report | {"files": report["files"] | dict.fromkeys(names, "0" * 32)})
    )
    assert set(manifest(result)) == {*report["files"], "linked/victim"}
    shell.prune(dense, "--output", result, "--overwrite")
    assert victim.read_text() == "mine"


def test_a_report_cannot_claim_a_file_whose_content_it_does_not_know(result: Path) -> None:
    (result / ".env").write_text("mine")
    report = json.loads((result / "report.json").read_text())
    for unknown in ("", "0" * 31, "0" * 32 + "\n", "x" * 32):
        claimed = report | {"files": report["files"] | {".env": unknown}}
        (result / "report.json").write_bytes(sealed(claimed))
        assert strays(result) == [".env"]
        with pytest.raises(CheckpointError, match=r"damaged: files\.\.env: string should match pattern"):
            read_report(result)
        with pytest.raises(OutputError, match=r"could not be read again \(files\.\.env"):
            write_documents(result, claimed)  # whoever has not read it there
        assert ".env" not in manifest(result)


def test_documents_are_not_made_over_what_no_run_wrote(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots that this report has none of go, if they are ours; the others stay, whatever they are called."""
    monkeypatch.setattr(
        "llm_snp.documents.writing.plot_images", lambda _: {"plots/kept.png": b"1", "plots/change.png": b"1"}
    )
    write_documents(result, read_report(result))
    (result / "plots" / "healing.png").write_text("mine")
    (result / "plots" / "change.png").write_text("mine now")
    monkeypatch.setattr("llm_snp.documents.writing.plot_images", lambda _: {})
    write_documents(result, read_report(result))
    assert sorted(path.name for path in (result / "plots").iterdir()) == ["change.png", "healing.png"]
    assert strays(result) == ["plots/change.png", "plots/healing.png"]
    monkeypatch.setattr("llm_snp.documents.writing.plot_images", lambda _: {"plots/change.png": b"2"})
    before = contents(result)
    with pytest.raises(OutputError, match=r"change\.png is none that a run of llm_snp wrote"):
        write_documents(result, read_report(result))
    assert contents(result) == before


def test_what_comes_while_a_result_is_replaced_is_kept(result: Path) -> None:
    workspace = Workspace(result, overwrite=True, resume=False)
    for name in ("report.json", "config.json"):
        shutil.copy(result / name, workspace.directory)
    (result / "notes.md").write_text("mine")
    (result / "README.md").write_text("mine, too")
    workspace.finish()
    assert workspace.left == result.with_name("res.replaced")
    assert {path.name for path in workspace.left.iterdir()} == {"notes.md", "README.md"}
    with pytest.raises(OutputError, match=r"res\.replaced is in the way"):
        Workspace(result, overwrite=True, resume=False)


def test_a_damaged_report_is_said_to_be_one(shell: Shell, result: Path, dense: Path) -> None:
    content = (result / "report.json").read_bytes()
    for broken in (content[:100], b"", b"[" * 100_000):
        (result / "report.json").write_bytes(broken)
        message = refused(shell, dense, "--output", result, "--overwrite")
        assert "is not empty and its report.json is damaged; give another directory" in message
        for command in ("report", "bench"):
            code, _, err = shell.run(command, result)
            assert code == 2
            assert "report.json is damaged or truncated, it is no JSON" in err


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("res/config.json", "is no name for a page"),
        ("res/model.safetensors.index.json", "is no name for a page"),
        ("res/README.md", "is no name for a page"),
        ("res/report.html", "is part of a result"),
        ("other/report.html", "is part of a result"),
        ("mine.html", "is there, and no page of llm_snp"),
        ("link.html", "is there, and no page of llm_snp"),
    ],
)
def test_a_page_is_written_over_nothing_else(shell: Shell, result: Path, name: str, sentence: str) -> None:
    shutil.copytree(result, shell.directory / "other")
    (shell.directory / "mine.html").write_text("<html>my page</html>")
    os.symlink("mine.html", shell.directory / "link.html")
    before = contents(shell.directory)
    code, out, err = shell.run("report", result, "--output", name)
    assert (code, out) == (2, "")
    assert f"--output {name} {sentence}" in err
    assert contents(shell.directory) == before


@pytest.mark.parametrize("link", ["lock", "owner", "training", "training/checkpoint-7", "curves-0.json"])
def test_a_journal_with_a_link_is_nobody_s(tmp_path: Path, link: str) -> None:
    """An unfinished run of a stranger: what it holds is written to, and removed."""
    (tmp_path / "mine" / "checkpoint-7").mkdir(parents=True)
    journal = tmp_path / "out.partial" / ".llm_snp"
    (journal / link).parent.mkdir(parents=True)
    (journal / "owner").touch()
    (journal / link).unlink(missing_ok=True)
    (journal / link).symlink_to(tmp_path / "mine")
    for resume in (False, True):
        with pytest.raises(OutputError, match=r"out\.partial is in the way and no unfinished run of yours"):
            Workspace(tmp_path / "out", overwrite=True, resume=resume)
    assert (tmp_path / "mine" / "checkpoint-7").is_dir()


@pytest.mark.parametrize("content", ["nothing", "a result"])
@pytest.mark.parametrize("reason", [errno.EXDEV, errno.EPERM])
def test_what_cannot_be_replaced_is_told_at_the_start(
    shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch, content: str, reason: int
) -> None:
    """What a container's image brought (EXDEV), or what is another user's in /tmp (EPERM): at the end it is late."""
    out = shell.output.resolve()
    out.mkdir(mode=0o770)
    if content == "a result":
        assert shell.prune(dense)[0] == 0
    before, rename, tried = contents(shell.directory), os.rename, []

    def refused(source: Path, target: Path) -> None:
        if Path(source) == out and not tried:  # what is made anew can be renamed
            tried.append(out)
            raise OSError(reason, os.strerror(reason))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refused)
    code, _, err = shell.prune(dense, "--overwrite")
    if content == "nothing" and reason == errno.EXDEV:  # which can be made anew
        assert code == 0, err
        assert is_result(out)
        return
    assert code == 2
    assert f"--output {out} is there and cannot be replaced ({os.strerror(reason)}); remove it, or give" in err
    assert contents(shell.directory) == before


def test_what_can_be_replaced_is_as_it_was(result: Path) -> None:
    """Trying is not doing: an interrupted run leaves an earlier result, or an empty directory, as it found them."""
    place = result.parent
    (place / "empty").mkdir(mode=0o750)
    before = [(path, path.stat().st_ino, path.stat().st_mode) for path in sorted(place.rglob("*"))]
    for directory in (place / "empty", result):
        Workspace(directory, overwrite=True, resume=False).discard()
    assert [(path, path.stat().st_ino, path.stat().st_mode) for path in sorted(place.rglob("*"))] == before


def test_an_unfinished_run_of_another_user_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody may make OUTPUT.partial in /tmp, and can change what lies in his directory until it is loaded."""
    workspace = Workspace(tmp_path / "out", overwrite=False, resume=False)
    workspace.keep()
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    Workspace(tmp_path / "out", overwrite=False, resume=True).keep()  # a disk on which everything is one user's
    monkeypatch.setattr(owned, "_new_file_of", lambda _: uid + 1)
    for resume in (False, True):
        with pytest.raises(OutputError, match=r"out\.partial is in the way and no unfinished run of yours"):
            Workspace(tmp_path / "out", overwrite=True, resume=resume)
    assert workspace.directory.is_dir()


@pytest.mark.parametrize(
    ("record", "what"),
    [("curves-0001", "what was measured"), ("dense-0f", "what was measured"), ("teacher-0f", "what was measured"),
     ("state-00000004", "the state"), ("block-0001", "1 finished blocks"), ("settings", None), ("models", None)],
)  # fmt: skip
def test_nothing_that_cost_time_is_thrown_away(tmp_path: Path, record: str, what: str | None) -> None:
    Workspace(tmp_path / "out", overwrite=False, resume=False).keep()
    path = tmp_path / "out.partial" / ".llm_snp" / f"{record}.json"
    path.write_text("{}")
    if what:
        with pytest.raises(OutputError, match=f"holds {what} of an interrupted run; add --resume"):
            Workspace(tmp_path / "out", overwrite=False, resume=False)
        assert path.exists()
    workspace = Workspace(tmp_path / "out", overwrite=bool(what), resume=False)
    assert path.exists() == bool(what)
    workspace.begin()
    workspace.keep()
    assert not path.exists()


def test_a_text_that_is_not_there_costs_no_unfinished_run(shell: Shell, dense: Path) -> None:
    """`--overwrite` throws such a run away, where there is one to take its place."""
    Workspace(shell.output, overwrite=False, resume=False).keep()
    path = shell.directory / "out.partial" / ".llm_snp" / "block-0001.json"
    path.write_text("{}")
    said = shell.refused(dense, "--overwrite", "--calibration", "nofile.txt")
    assert "nofile.txt is neither a file nor a known corpus" in said
    assert path.exists()


def test_an_earlier_result_that_cannot_be_removed_is_refused_at_once(
    shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its remains would be in the way of the next run."""
    assert shell.prune(dense)[0] == 0
    (shell.output / "plots").mkdir(exist_ok=True)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "plots" and access(path, mode))
    message = shell.refused(dense, "--overwrite")
    assert message.endswith(f"cannot be replaced: {shell.output / 'plots'} is not writable; give another directory")
