"""Publishing on the Hub, against a server on this machine that speaks what the Hub's client calls."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Prune, load, logits, new_connections
from hub_server import FINE, ORGANISATION, READ, USER, WRITE, Commit, HubServer, Repository
from huggingface_hub import constants, snapshot_download

from llm_snp.cli import main
from llm_snp.commands import push as command
from llm_snp.config import PruneConfig
from llm_snp.dense.hub import locate
from llm_snp.errors import CheckpointError, HubError, OptionError, OutputError, ReplacedError, SnpError
from llm_snp.healing.options import HealConfig
from llm_snp.pruning.job import default_output
from llm_snp.result import publish
from llm_snp.result.publish import push
from llm_snp.result.repository import check_push, look_at
from llm_snp.system.files import digest, digest_of_bytes
from llm_snp.system.manifest import changed, manifest, sealed, strays
from llm_snp.system.output import check_output

pytestmark = pytest.mark.documents

REPO = f"{USER}/tiny-pruned"
INITIAL = ".gitattributes"


@pytest.fixture(scope="module")
def pruned(prune: Prune, dense: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result that tests only read."""
    output = tmp_path_factory.mktemp("publish") / "tiny-snp-30"
    prune(dense, output, evaluate=(str(held_out),))
    return output


@pytest.fixture(autouse=True, scope="module")
def drawn_once() -> Iterator[None]:
    """Plots and page of the same report, which are the same (`test_documents`), are made once for all pushes."""

    def once(make: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
        found: dict[str, Any] = {}

        def made(report: dict[str, Any]) -> Any:
            key = json.dumps(report)
            if key not in found:
                found[key] = make(report)
            return found[key]

        return made

    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_images", "html_page"):
            patch.setattr(publish, name, once(getattr(publish, name)))
        yield


@pytest.fixture
def result(pruned: Path, tmp_path: Path) -> Path:
    """A result that a test may change."""
    return Path(shutil.copytree(pruned, tmp_path / pruned.name))


def names(directory: Path) -> set[str]:
    """The files of a result, but for what is of this machine only."""
    found = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith(".cache/")}


def refusal(kind: type[SnpError], *arguments: Any, directory: Path | None = None) -> str:
    """The message of `check_push`, or of `push` with a directory; it is one sentence."""
    with pytest.raises(kind) as error:
        push(directory, *arguments) if directory else check_push(*arguments)
    message = str(error.value)
    assert "\n" not in message
    assert not message.endswith(".")
    return message


def claimed(result: Path, name: str, content: bytes) -> None:
    """Put a file into a result, and into its report as if a run had written it."""
    (result / name).parent.mkdir(exist_ok=True)
    (result / name).write_bytes(content)
    report = json.loads((result / "report.json").read_bytes())
    report["files"][name] = digest(result / name)
    (result / "report.json").write_text(json.dumps(report))


def test_the_code_that_goes_up_is_ours(hub: HubServer, result: Path) -> None:
    """A result may be a stranger's, whose report says that all is well."""
    own = (result / "modeling_snp.py").read_bytes()
    claimed(result, "modeling_snp.py", b"import evil")
    push(result, REPO)
    files = hub.repositories[REPO].files
    assert files["modeling_snp.py"] == own
    assert json.loads(files["report.json"])["files"]["modeling_snp.py"] == digest_of_bytes(own)


def test_the_page_and_the_plots_that_go_up_are_ours(hub: HubServer, result: Path) -> None:
    """A page is what a browser runs, and a stranger's would go up under another name."""
    own = {name: (result / name).read_bytes() for name in ("report.html", "plots/kept.png")}
    for name in own:
        claimed(result, name, b"<script>alert(document.domain)</script>")
    push(result, REPO)
    files = hub.repositories[REPO].files
    assert {name: files[name] for name in own} == own
    listed = json.loads(files["report.json"])["files"]
    assert {name: listed[name] for name in own} == {name: digest_of_bytes(content) for name, content in own.items()}


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "evil--modeling_snp.Evil"}}),
        ("config.json", {"custom_pipelines": {"text-generation": {"impl": "evil.Evil"}}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil--t.T", None]}}),
        ("generation_config.json", {"custom_generate": "evil/generate"}),
        ("config.json", {"trained_by": "ann"}),
    ],
)
def test_settings_that_name_other_code_do_not_go_up(
    hub: HubServer, result: Path, name: str, field: dict[str, Any]
) -> None:
    path = result / name
    fields = json.loads(path.read_bytes()) if path.exists() else {}
    claimed(result, name, json.dumps(fields | field).encode())
    said = refusal(CheckpointError, REPO, directory=result)
    assert f"{name} has {next(iter(field))}, which leads to code outside of the result, or says of a machine" in said
    assert not hub.repositories


@pytest.mark.parametrize(
    "name", ["tokenization_evil.py", "pytorch_model.bin", "custom_generate/generate.py", "note.txt", "plots/evil.png"]
)
def test_files_of_a_kind_that_no_run_writes_do_not_go_up(hub: HubServer, result: Path, name: str) -> None:
    claimed(result, name, b"import evil")
    assert f"has {name} in its report, " in refusal(CheckpointError, REPO, directory=result)
    assert not hub.repositories


def test_one_commit_with_everything(hub: HubServer, pruned: Path) -> None:
    before = {name: (pruned / name).read_bytes() for name in names(pruned)}
    check_push(REPO)
    assert not hub.repositories
    assert push(pruned, REPO) == f"{hub.url}/{REPO}"
    repository = hub.repositories[REPO]
    assert not repository.private
    assert len(repository.commits) == 2
    assert set(repository.files) == names(pruned) | {INITIAL}
    assert "model.safetensors.index.json" in repository.files
    assert "modeling_snp.py" in repository.files
    assert "plots/kept.png" in repository.files
    assert "custom_code" in json.loads(repository.files["report.json"])["model"]
    for name in names(pruned) - {"README.md", "report.json"}:
        assert repository.files[name] == before[name], name
    assert len(hub.uploads) > len([name for name in names(pruned) if name.endswith(".safetensors")])  # one in parts
    assert "llm_snp" in repository.commits[1].message
    assert before == {name: (pruned / name).read_bytes() for name in names(pruned)}


def test_private_and_the_message_arrive(hub: HubServer, pruned: Path) -> None:
    push(pruned, f"{ORGANISATION}/secret", private=True, message="as asked")
    repository = hub.repositories[f"{ORGANISATION}/secret"]
    assert repository.private
    assert repository.commits[1].message == "as asked"


@pytest.mark.parametrize("files", [False, True])
def test_a_repository_that_is_open_to_all_is_not_private(hub: HubServer, pruned: Path, files: bool) -> None:
    """It keeps who may see it, so what was to be private would be published."""
    hub.repositories[REPO] = Repository(private=False)
    if files:
        push(pruned, REPO)
    before = len(hub.repositories[REPO].commits)
    for upload in (lambda: check_push(REPO, files, True), lambda: push(pruned, REPO, private=True, overwrite=files)):
        with pytest.raises(HubError, match="exists on the Hub, and not as a private repository, which --private asks"):
            upload()
    assert len(hub.repositories[REPO].commits) == before
    hub.repositories[REPO].private = True
    push(pruned, REPO, private=True, overwrite=files)
    assert set(hub.repositories[REPO].files) >= names(pruned)


def test_card_and_report_are_those_for_others(hub: HubServer, pruned: Path, text: Path) -> None:
    push(pruned, REPO)
    files = hub.repositories[REPO].files
    card = files["README.md"].decode()
    assert f'from_pretrained("{REPO}", trust_remote_code=True)' in card
    assert str(text.parent) not in card
    report = json.loads(files["report.json"])
    assert str(text.parent) not in files["report.json"].decode()
    assert text.name in files["report.json"].decode()
    assert report["blocks"] == json.loads((pruned / "report.json").read_text())["blocks"]


def test_the_card_keeps_its_plots(hub: HubServer, pruned: Path) -> None:
    push(pruned, REPO)
    card = hub.repositories[REPO].files["README.md"].decode()
    assert "](plots/kept.png)" in card
    assert REPO in card


def test_an_edited_card_goes_up_as_it_is(hub: HubServer, result: Path) -> None:
    readme = result / "README.md"
    report = json.loads((result / "report.json").read_text())
    push(result, REPO)
    assert REPO in hub.repositories[REPO].files["README.md"].decode()
    assert not publish.card_is_edited(result, report)
    readme.write_text(readme.read_text() + "\nMy own words.\n")
    assert publish.card_is_edited(result, report)
    push(result, REPO, overwrite=True)
    assert hub.repositories[REPO].files["README.md"] == readme.read_bytes()
    # In a copy of the repository it is nobody's but its author's, too.
    published = json.loads(hub.repositories[REPO].files["report.json"])
    assert "README.md" not in published["files"]
    push(result, REPO, overwrite=True)  # nothing has changed there
    readme.write_text(readme.read_text() + "\nAnd more.\n")
    push(result, REPO, overwrite=True)
    assert hub.repositories[REPO].files["README.md"] == readme.read_bytes()
    hub.repositories[REPO].commits.append(Commit("theirs", {"README.md"}, set(), {"README.md": b"# Mine"}))
    with pytest.raises(HubError, match=r"has README\.md on the Hub, which no run of llm_snp wrote"):
        push(result, REPO, overwrite=True)
    hub.repositories[REPO].commits.pop()
    (result / "report.json").write_text(json.dumps(published))
    assert publish.card_is_edited(result, published)
    push(result, f"{USER}/edited")
    assert hub.repositories[f"{USER}/edited"].files["README.md"] == readme.read_bytes()
    mine = readme.read_bytes()
    readme.unlink()
    with pytest.raises(HubError, match=r"has README\.md on the Hub, which no run of llm_snp wrote"):
        push(result, f"{USER}/edited", overwrite=True)
    readme.write_bytes(mine + b"More words.")
    push(result, f"{USER}/edited", overwrite=True)
    assert hub.repositories[f"{USER}/edited"].files["README.md"] == readme.read_bytes()


def test_what_goes_up_as_it_is_is_told(hub: HubServer, result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever a stranger's report says of the card: either it is made anew, or it is said that it was not."""
    readme, report = result / "README.md", json.loads((result / "report.json").read_text())
    readme.write_text(readme.read_text() + "<a href=evil>y</a>")
    for number, found in enumerate([{"README.md": digest(readme)}, {"README.md": "0" * 32}, {}]):
        files = {name: one for name, one in report["files"].items() if name != "README.md"} | found
        report |= {"files": files, "card": "0" * 32}
        (result / "report.json").write_bytes(sealed(report))
        assert main(["push", str(result), f"{USER}/told-{number}"]) == 0
        evil = b"evil" in hub.repositories[f"{USER}/told-{number}"].files["README.md"]
        assert evil == ("edited   README.md went up as it is" in capsys.readouterr().out) == bool(number)


def test_a_tokenizer_that_leads_to_code_is_not_published(hub: HubServer, result: Path) -> None:
    """A stranger's result: whoever loads it from the user's repository would get another package's settings."""
    path, report = result / "tokenizer_config.json", json.loads((result / "report.json").read_text())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sudachi_kwargs": {"sudachi_config_path": "s.json"}}))
    report["files"][path.name] = digest(path)
    (result / "report.json").write_bytes(sealed(report))
    assert "'sudachi_kwargs', settings for another package" in refusal(CheckpointError, REPO, directory=result)
    assert REPO not in hub.repositories


def test_names_that_stay_are_on_one_line(hub: HubServer, result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (result / "x\nload it  evil").touch()
    assert main(["push", str(result), REPO]) == 0
    assert "left     x load it  evil: no run of llm_snp wrote what stays here\n" in capsys.readouterr().out


def test_a_card_that_is_a_link_is_not_published(hub: HubServer, result: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    (result / "README.md").unlink()
    (result / "README.md").symlink_to(tmp_path / "key")
    assert "README.md is a link, or no file, and would be published" in refusal(CheckpointError, REPO, directory=result)
    assert not hub.uploads


def test_without_a_card_one_is_made(hub: HubServer, result: Path) -> None:
    (result / "README.md").unlink()
    push(result, REPO)
    assert REPO in hub.repositories[REPO].files["README.md"].decode()
    assert not (result / "README.md").exists()


def test_a_card_with_broken_metadata_is_refused_before_the_upload(hub: HubServer, result: Path) -> None:
    (result / "README.md").write_text("---\nlicense: [\n---\n")
    assert "Invalid metadata in README.md" in refusal(HubError, REPO, directory=result)
    assert not hub.uploads


STRAYS = ("token.txt", ".env", "plots/mine.png", "lora/adapter_config.json", ".llm_snp/lock", "evil.py")


def test_what_no_run_wrote_stays_here(
    hub: HubServer, pruned: Path, result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in STRAYS:
        (result / name).parent.mkdir(exist_ok=True)
        (result / name).write_text("secret")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "key").write_text("secret")
    (result / "linked").symlink_to(tmp_path / "elsewhere")
    assert main(["push", str(result), REPO]) == 0
    files = hub.repositories[REPO].files
    assert set(files) == names(pruned) | {INITIAL}
    assert not any(b"secret" in content for content in files.values())
    said = capsys.readouterr().out
    assert "left     .env, evil.py, linked, token.txt, lora/adapter_config.json and 1 more: " in said


@pytest.mark.parametrize("spoil", ["truncate", "empty", "other", "unlink", "link"])
@pytest.mark.parametrize("which", ["shard", "config.json", "modeling_snp.py", "tokenizer.json", "plots/kept.png"])
def test_a_damaged_result_is_refused(hub: HubServer, result: Path, which: str, spoil: str) -> None:
    path = sorted(result.glob("model-*.safetensors"))[1] if which == "shard" else result / which
    content = path.read_bytes()
    if spoil in ("truncate", "empty"):
        path.write_bytes(content[: len(content) // 2 if spoil == "truncate" else 0])
    elif spoil == "other":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        path.rename(result.parent / "moved")
        if spoil == "link":
            path.symlink_to(result.parent / "moved")
    message = refusal(CheckpointError, REPO, directory=result)
    if which != "config.json" or spoil not in ("truncate", "empty", "other"):  # then it may be no JSON
        assert f"{path.name} {'missing' if spoil == 'unlink' else 'changed'}" in message
    assert str(result) in message
    assert not hub.uploads


@pytest.mark.parametrize("left", [".*", "model-00002.*", "config.json", "modeling_snp.py"])
def test_a_report_that_says_nothing_of_what_is_needed(hub: HubServer, result: Path, left: str) -> None:
    """What goes up is what the report lists: without a shard it would be no model."""
    report = json.loads((result / "report.json").read_text())
    report["files"] = {name: found for name, found in report["files"].items() if not re.fullmatch(left, name)}
    (result / "report.json").write_text(json.dumps(report))
    message = refusal(CheckpointError, REPO, directory=result)
    assert message.endswith("of which its report says nothing; prune again")
    assert not hub.uploads


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "plots/../../secret", "", "."])
def test_a_report_cannot_make_us_push_what_lies_elsewhere(hub: HubServer, result: Path, name: str) -> None:
    (result.parent / "secret").write_text("secret")
    report = json.loads((result / "report.json").read_text())
    report["files"][name] = digest(result.parent / "secret")
    (result / "report.json").write_text(json.dumps(report))
    assert "which is no file below its directory" in refusal(CheckpointError, REPO, directory=result)
    assert not hub.uploads


def test_what_was_pushed_is_whole_where_it_arrives(hub: HubServer, pruned: Path, tmp_path: Path) -> None:
    push(pruned, REPO)
    copy = tmp_path / "copy"
    for name, content in hub.repositories[REPO].files.items():
        if name != INITIAL:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(content)
    assert strays(copy) == []
    assert changed(copy, manifest(copy)) == ([], [])
    push(copy, f"{USER}/again")
    assert set(hub.repositories[f"{USER}/again"].files) == set(hub.repositories[REPO].files)


def test_overwriting_removes_what_is_no_longer_there(
    hub: HubServer, pruned: Path, prune: Prune, dense: Path, tmp_path: Path
) -> None:
    push(pruned, REPO)
    prune(dense, tmp_path / "stock", 0.2, attention="heads", allocation="uniform")
    for shard in (tmp_path / "stock").glob("model-*"):
        shard.rename(shard.with_name(shard.name.replace("-of-", "-of-1")))
    for name in ("model.safetensors.index.json", "report.json"):
        path = tmp_path / "stock" / name
        path.write_text(path.read_text().replace("-of-", "-of-1"))
    report = json.loads((tmp_path / "stock" / "report.json").read_text())
    report["files"]["model.safetensors.index.json"] = digest(tmp_path / "stock" / "model.safetensors.index.json")
    (tmp_path / "stock" / "report.json").write_text(json.dumps(report))
    push(tmp_path / "stock", REPO, overwrite=True)
    repository = hub.repositories[REPO]
    assert len(repository.commits) == 3
    assert set(repository.files) == names(tmp_path / "stock") | {INITIAL}
    assert repository.commits[2].deleted >= {path.name for path in pruned.glob("model-*.safetensors")}


@pytest.mark.parametrize("lost_after", [0, 2])
def test_after_a_lost_connection_the_same_command_ends_well(
    hub: HubServer, pruned: Path, monkeypatch: pytest.MonkeyPatch, lost_after: int
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client tries a few times by itself
    hub.lost_after = lost_after
    message = refusal(HubError, REPO, directory=pruned)
    assert message.startswith(f"the upload of {pruned} to {REPO} broke off (")
    assert message.endswith(f"the directory is intact, and `python -m llm_snp push {pruned} {REPO}` repeats it")
    assert len(hub.repositories[REPO].commits) == 1
    hub.lost_after = None
    kept = set(hub.large)
    hub.uploads.clear()
    push(pruned, REPO)
    assert not kept & set(hub.uploads)  # what had arrived is not sent again
    assert len(hub.repositories[REPO].commits) == 2
    assert set(hub.repositories[REPO].files) == names(pruned) | {INITIAL}


def test_after_a_failed_commit_the_same_command_ends_well(hub: HubServer, pruned: Path) -> None:
    hub.commit_status = 500
    with pytest.raises(HubError) as error:
        push(pruned, REPO, private=True, overwrite=True)
    message = str(error.value)
    assert message.endswith(f"`python -m llm_snp push {pruned} {REPO} --private --overwrite` repeats it")
    assert "500" in message
    hub.commit_status = None
    push(pruned, REPO)
    assert len(hub.repositories[REPO].commits) == 2
    assert set(hub.repositories[REPO].files) == names(pruned) | {INITIAL}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_has_come_meanwhile_is_not_written_over(hub: HubServer, result: Path, overwrite: bool) -> None:
    """Large files take hours, in which a colleague may push there, too."""
    if overwrite:
        push(result, REPO)
        with open(result / "README.md", "a") as card:
            card.write("Edited since.\n")
    theirs = {"README.md": b"# Mine", "notes.md": b"1"}
    hub.on_upload = lambda: hub.repositories[REPO].commits.append(Commit("theirs", set(theirs), set(), theirs))
    message = refusal(HubError, REPO, False, overwrite, directory=result)
    assert message.startswith(f"{REPO} has changed on the Hub meanwhile")
    assert hub.repositories[REPO].files == theirs


@pytest.mark.parametrize("change", ["weights", "card", "gone"])
def test_another_result_that_has_come_meanwhile_is_not_published_in_parts(
    hub: HubServer, result: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """What was checked against the hashes of its report is what goes up."""
    [shard] = result.glob("*00001-of*.safetensors")

    def replaced(*arguments: Any, **options: Any) -> Any:
        found = look_at(*arguments, **options)
        if change == "gone" and result.exists():
            result.rename(result.with_name("moved"))
        elif change != "gone":
            file = shard if change == "weights" else result / "README.md"
            Path(shutil.copyfile(file, result / "new")).rename(file)
        return found

    monkeypatch.setattr("llm_snp.result.publish.look_at", replaced)
    message = refusal(ReplacedError, REPO, directory=result)
    assert message.endswith("was replaced or moved while it was looked at, and nothing went up; push again")
    assert set(hub.repositories[REPO].files) == {INITIAL}


def test_interrupting_is_passed_on(hub: HubServer, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        push(pruned, REPO)


def test_an_existing_repository_is_refused(hub: HubServer, pruned: Path) -> None:
    push(pruned, REPO)
    for directory in (None, pruned):
        message = refusal(HubError, REPO, directory=directory)
        assert message.startswith(f"{REPO} exists on the Hub and has ")
        assert "--overwrite" in message
    check_push(REPO, overwrite=True)
    assert len(hub.repositories[REPO].commits) == 2


def test_what_a_card_shows_is_not_taken_from_it(hub: HubServer, result: Path) -> None:
    """A stranger's report has the hash of his card, too."""
    readme, report = result / "README.md", json.loads((result / "report.json").read_text())
    text = readme.read_text().replace("![", "![x](https://evil/t.png) <a href=evil>y</a> ![")
    readme.write_text(f"{text}\n![z](plots/none.png)\n")
    report["files"]["README.md"] = digest(readme)
    (result / "report.json").write_text(json.dumps(report))
    push(result, REPO)
    card = hub.repositories[REPO].files["README.md"].decode()
    assert "](plots/kept.png)" in card
    assert "evil" not in card
    assert "none.png" not in card


@pytest.mark.parametrize("there", ["nothing of ours", "a result and more", "another program's report"])
def test_overwriting_replaces_results_only(hub: HubServer, pruned: Path, there: str) -> None:
    """`--overwrite` of a run is meant for its directory; a repository of other things is not to be emptied by it."""
    if there == "a result and more":
        push(pruned, REPO)
    repository = hub.repositories.setdefault(REPO, Repository(private=False))
    repository.files["precious.bin"] = b"1"
    if there == "another program's report":
        repository.files["report.json"] = b'{"files": {"precious.bin": "00"}}'
    before = dict(repository.files)
    others = "precious.bin, report.json" if there == "another program's report" else "precious.bin"
    for upload in (lambda: check_push(REPO, overwrite=True), lambda: push(pruned, REPO, overwrite=True)):
        with pytest.raises(HubError, match=f"{REPO} has {others} on the Hub, which no run of llm_snp wrote"):
            upload()
    assert repository.files == before
    repository.commits[-1].files = {"README.md": b"---\nlicense: mit\n---\n# Mine", ".gitattributes": b""}
    with pytest.raises(HubError, match=f"{REPO} has README.md on the Hub, which no run of llm_snp wrote"):
        push(pruned, REPO, overwrite=True)
    repository.commits[-1].files["README.md"] = b"---\nlicense: mit\n---\n"  # as the Hub's page makes one
    push(pruned, REPO, overwrite=True)
    assert names(pruned) <= set(repository.files)


@pytest.mark.parametrize("name", ["README.md", "report.json", "shard", "config.json"])
def test_what_was_changed_on_the_hub_is_not_written_over(hub: HubServer, pruned: Path, name: str) -> None:
    push(pruned, REPO)
    push(pruned, REPO, overwrite=True)
    repository = hub.repositories[REPO]
    name = next(one for one in repository.files if one.endswith(".safetensors")) if name == "shard" else name
    content = repository.files[name]
    changed = json.dumps(json.loads(content) | {"mine": 1}).encode() if name == "report.json" else content + b" "
    repository.commits.append(Commit("by hand", {name}, set(), repository.files | {name: changed}))
    for upload in (lambda: check_push(REPO, overwrite=True), lambda: push(pruned, REPO, overwrite=True)):
        with pytest.raises(
            HubError, match=f"{REPO} has {name} on the Hub, which no run of llm_snp wrote, or which were"
        ):
            upload()
    assert repository.files[name] == changed


@pytest.mark.parametrize("token", ["hf_schlüssel", "hf two words", "hf_\n"])
def test_a_token_that_is_none(hub: HubServer, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    assert refusal(HubError, REPO).startswith("the token for the Hugging Face Hub has characters that no token has; ")
    with pytest.raises(HubError, match="has characters that no token has"):
        locate("ann/model")


def test_no_token(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    message = refusal(HubError, REPO)
    assert message == "there is no token for the Hugging Face Hub; run `hf auth login`, or set HF_TOKEN"
    Path(constants.HF_TOKEN_PATH).write_text(WRITE)  # what `hf auth login` leaves
    check_push(REPO)


def test_a_refused_token(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert refusal(HubError, REPO).startswith("the Hugging Face Hub refused the token; ")


def test_no_permission(hub: HubServer, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_push(f"{ORGANISATION}/x")
    check_push(f"{USER.upper()}/x")
    message = refusal(HubError, "somebody/x")
    assert message == f"the token is one of {USER}, who may not write to somebody; give {USER}/x"
    monkeypatch.setenv("HF_TOKEN", READ)
    assert "may only read" in refusal(HubError, REPO)
    monkeypatch.setenv("HF_TOKEN", FINE)  # it lists no organisations
    check_push(f"{ORGANISATION}/x")
    message = refusal(HubError, "somebody/x", directory=pruned)  # the Hub answers 403
    assert message.startswith("the token may not write to somebody/x (")
    assert "give a token with write permission for somebody" in message
    assert not hub.repositories


def test_no_network(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert refusal(HubError, REPO).startswith("the Hugging Face Hub cannot be reached (")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    new_connections()
    assert "HF_HUB_OFFLINE" in refusal(HubError, REPO)


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "ann/ti ny", "ann/", "/tmp/x", "ann/x.git", "ann/-x", ""])
def test_names_that_are_none(hub: HubServer, pruned: Path, name: str) -> None:
    for directory in (None, pruned):
        assert "give user/name" in refusal(OptionError, name, directory=directory)


def test_what_is_no_finished_result(hub: HubServer, dense: Path, result: Path, tmp_path: Path) -> None:
    assert "has no report.json; give the directory" in refusal(CheckpointError, REPO, directory=dense)
    assert "does not exist; give the directory" in refusal(CheckpointError, REPO, directory=tmp_path / "nowhere")
    index = result / "model.safetensors.index.json"
    index.write_text("[]")
    assert "is damaged: its config or index cannot be read" in refusal(CheckpointError, REPO, directory=result)
    index.unlink()
    (result / "config.json").unlink()
    assert f"config.json, {index.name} missing" in refusal(CheckpointError, REPO, directory=result)
    assert not hub.repositories


def test_the_command(hub: HubServer, pruned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    capsys.readouterr()
    command.main(parser.parse_args([str(pruned), REPO, "--private", "--message", "by hand"]))
    assert capsys.readouterr().out == (
        f"pushed   {hub.url}/{REPO}\nload it  AutoModelForCausalLM.from_pretrained({REPO!r}, trust_remote_code=True)\n"
    )
    assert hub.repositories[REPO].private
    assert hub.repositories[REPO].commits[1].message == "by hand"
    with pytest.raises(HubError):
        command.main(parser.parse_args([str(pruned), REPO]))
    command.main(parser.parse_args([str(pruned), REPO, "--overwrite"]))


LOAD = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
repo, ids, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True).float().eval()
tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
assert tokenizer("den lo")["input_ids"]
assert not any(name.split(".")[0] == "llm_snp" for name in sys.modules)
with torch.no_grad():
    torch.save(model(input_ids=torch.load(ids)).logits, out)
"""


def test_anyone_can_load_it_from_the_hub(hub: HubServer, pruned: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    push(pruned, REPO)
    torch.save(ids, tmp_path / "ids.pt")
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, REPO, str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(load(pruned), ids), rtol=0, atol=0)


def test_a_copy_in_the_cache_of_the_hub_is_read_and_not_written(
    hub: HubServer,
    pruned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its files are links to blobs, which other snapshots share."""
    push(pruned, REPO)
    snapshot = Path(snapshot_download(REPO, cache_dir=tmp_path / "cache"))
    assert any(path.is_symlink() for path in snapshot.iterdir())
    before = {path: (path.is_symlink(), path.read_bytes()) for path in snapshot.rglob("*") if path.is_file()}
    assert set(strays(snapshot)) <= {INITIAL}
    assert changed(snapshot, manifest(snapshot)) == ([], [])
    assert main(["report", str(snapshot), "--output", str(tmp_path / "x.html")]) == 0
    capsys.readouterr()
    assert main(["report", str(snapshot)]) == 2
    assert "is in the cache of the Hub, where nothing is changed; download it with" in capsys.readouterr().err
    assert main(["bench", str(snapshot), "--runs", "1", "--new", "2", "--prompt", "4", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["push", str(snapshot), f"{USER}/other"]) == 2
    assert "is in the cache of the Hub, where nothing is changed; download it with" in capsys.readouterr().err
    # Nor is what is made of it, which is called by its repository and not by a commit.
    assert HealConfig(str(snapshot)).destination == Path("tiny-pruned-healed")
    assert default_output(PruneConfig(str(snapshot), sparsity=0.3)) == Path("tiny-pruned-snp-30")
    for output in (snapshot / "x", snapshot.parent / "x"):
        with pytest.raises(OutputError, match="lies in the cache of the Hub, whose tools remove it when they clean up"):
            check_output(output, overwrite=True)
    capsys.readouterr()
    for words in (["export", str(pruned), "--gguf"], ["report", str(snapshot), "--output"]):
        assert main([*words, str(snapshot / "x.gguf.html")]) == 2
        assert "lies in the cache of the Hub" in capsys.readouterr().err
    assert {path: (path.is_symlink(), path.read_bytes()) for path in snapshot.rglob("*") if path.is_file()} == before


def test_a_card_that_a_program_wrote_a_place_into_is_not_published(hub: HubServer, result: Path) -> None:
    """peft does where an adapter is saved beside a model: with its path, as what it is an adapter of."""
    card = result / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\nbase_model: /home/ann/models/x\n", 1))
    said = refusal(CheckpointError, REPO, directory=result)
    assert "has a place of this machine, or a secret, in its metadata (base_model: /home/ann/models/x)" in said
    assert REPO not in hub.repositories


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_pipe_is_not_read(result: Path, name: str) -> None:
    (result / name).unlink()
    os.mkfifo(result / name)
    assert "is no regular file" in refusal(CheckpointError, REPO, directory=result)
