"""What a run does after its result is finished, and that nothing of it can harm the result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LENGTH, SAMPLES, Prune, Shell, copied, raising, save, tiny_opt, weight_files
from hub_server import USER, HubServer

from llm_snp.documents.page import html_page
from llm_snp.documents.report import Report
from llm_snp.documents.writing import read_report
from llm_snp.errors import DiskFullError, OptionError, first_line
from llm_snp.evaluation import harness, speed
from llm_snp.running import afterwards
from llm_snp.system.manifest import changed, strays
from llm_snp.system.remembering import recall

TASK = f"harness:{Path(__file__).parent.parent / 'harness_tasks' / 'small_choice.yaml'}"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much timing as shows that it is done."""
    whole = speed.measure_speed

    def short(*models: object, **options: object) -> object:
        return whole(*models, prompt=8, new=2, runs=1, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("llm_snp.running.afterwards.measure_speed", short)


def report(shell: Shell) -> dict[str, object]:
    return json.loads((shell.output / "report.json").read_text())  # type: ignore[no-any-return]


def test_all_of_it(shell: Shell, dense: Path, hub: HubServer) -> None:
    name = f"{USER}/small"
    short = ("--samples", SAMPLES, "--sequence-length", LENGTH, "--calibration", shell.text, "--output", shell.output)
    after = ("--evaluate", TASK, "--measure-speed", "--push-to-hub", name, "--private")
    code, out, err = shell.run(dense, *short, *after, "--quiet")
    assert code == 0, err
    assert "small_choice acc" in out
    assert "prefill, ms" in out
    found = report(shell)
    assert {"harness", "speed"} <= set(found)
    assert {"harness", "speed"} <= set(found["seconds"])  # type: ignore[call-overload]
    card = (shell.output / "README.md").read_text()
    assert "small_choice" in card
    assert "## Speed" in card
    repository = hub.repositories[name]
    assert repository.private
    assert len(repository.commits) == 2  # the Hub's own, and one with everything
    assert json.loads(repository.files["report.json"])["speed"] == found["speed"]
    assert f'from_pretrained("{name}"' in repository.files["README.md"].decode()


def test_another_model_by_then_is_not_taken_for_the_dense_one(
    shell: Shell, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its directory was updated while the run went on: tasks and speed would be told of a model that was not pruned."""
    model = copied(dense, tmp_path / "model")
    before, seeds = afterwards.afterwards, iter((5, 6))

    def updated(*arguments: Any) -> Any:
        save(tiny_opt(seed=next(seeds)), model)
        return before(*arguments)

    monkeypatch.setattr("llm_snp.running.run.afterwards", updated)
    short = ("--samples", SAMPLES, "--sequence-length", LENGTH, "--calibration", shell.text, "--output", shell.output)
    for flag in (("--evaluate", TASK), ("--measure-speed", "--no-evaluate")):
        code, _, err = shell.run(model, *short, *flag, "--quiet", "--overwrite")
        assert code == 2
        assert f"{model} has other weights than when {shell.output} was made of it; the pruned model is finished" in err
        assert "harness" not in report(shell)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--push-to-hub", "other/small"), "may not write to other"),
        (("--push-to-hub", "small"), "'small' does not say whose repository it is; give user/name"),
        (("--private",), "--private is for the repository that --push-to-hub makes"),
    ],
)
def test_what_would_fail_is_known_before_the_work(
    shell: Shell, dense: Path, hub: HubServer, flags: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_snp.running.run._Run.__init__", None)  # is not reached
    hub.repositories.clear()
    assert message in shell.refused(dense, *flags)


def test_a_report_that_could_not_be_read_is_known_before_the_work(
    shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `report`, `push` and `heal` would refuse then is asked of a rehearsed one."""
    monkeypatch.setattr("llm_snp.running.run.decide", None)  # is not reached
    whole = Report.finished

    def finished(report: Report, *arguments: Any) -> None:
        whole(report, *arguments)
        report.data["seconds"] = {"prune": -1.0}

    monkeypatch.setattr(Report, "finished", finished)
    message = shell.refused(dense)
    assert (
        "would get a report that cannot be read (seconds.prune: input should be greater than or equal to 0" in message
    )


def test_a_task_that_cannot_be_run_is_left_out_of_a_finished_result(
    shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --resume: it costs no pruning anew. Tasks that were run are part of the result."""
    short = ("--samples", SAMPLES, "--sequence-length", LENGTH, "--calibration", shell.text, "--output", shell.output)

    def fails(*arguments: Any, **options: Any) -> None:
        raise OptionError("task x cannot be run on this model; leave it out")

    with monkeypatch.context() as patch:
        patch.setattr(afterwards, "evaluate_harness", fails)
        assert shell.run(dense, *short, "--evaluate", f"{TASK},{TASK.removeprefix('harness:')}", "--quiet")[0] == 2
    before = weight_files(shell.output)
    code, _, err = shell.run(dense, *short, "--no-evaluate", "--resume", "--quiet")
    assert code == 0, err
    code, out, err = shell.run(dense, *short, "--evaluate", TASK, "--resume", "--quiet")
    assert code == 0, err
    assert "small_choice acc" in out
    assert weight_files(shell.output) == before
    assert report(shell)["options"]["evaluate"] == ["harness:small_choice.yaml"]  # type: ignore[index]
    assert shell.run(dense, *short, "--evaluate", TASK, "--resume", "--quiet")[0] == 0
    code, _, err = shell.run(dense, *short, "--no-evaluate", "--resume", "--quiet")
    assert code == 2
    assert "is finished, and --evaluate is [] now" in err


def test_tasks_that_were_run_are_not_run_again(shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later one cannot be run on the pruned model: what was measured until then is kept, on this machine."""
    short = ("--samples", SAMPLES, "--sequence-length", LENGTH, "--calibration", shell.text, "--output", shell.output)
    other = TASK.replace("choice", "text")
    run, ran = harness._run, []

    def fails(model: Any, name: str, tasks: Any, seed: int, limit: int | None) -> Any:
        if limit is None and len(ran) == 3:
            raise OptionError(f"task {name} cannot be run on this model; leave it out")
        ran.extend([name] * (limit is None))  # with a limit it is tried at the start
        return run(model, name, tasks, seed, limit)

    monkeypatch.setattr(harness, "_run", fails)
    code, _, err = shell.run(dense, *short, "--evaluate", TASK, "--evaluate", other, "--quiet")
    assert code == 2
    assert "cannot be run on this model" in err
    assert [Path(name).stem for name in ran] == ["small_choice", "small_text", "small_choice"]
    assert "harness" not in report(shell)
    ran.append("")
    code, _, err = shell.run(dense, *short, "--evaluate", TASK, "--evaluate", other, "--resume", "--quiet")
    assert code == 0, err
    assert [Path(name).stem for name in ran[4:]] == ["small_text"]
    assert set(report(shell)["harness"]) == {"small_choice", "small_text"}  # type: ignore[arg-type]
    assert "tasks" not in recall(shell.output)


def test_a_result_that_was_damaged_since_is_not_finished(shell: Shell, dense: Path) -> None:
    """Whoever resumes to be sure is told."""
    short = ("--samples", SAMPLES, "--sequence-length", LENGTH, "--calibration", shell.text, "--output", shell.output)
    assert shell.run(dense, *short, "--no-evaluate", "--quiet")[0] == 0
    shard = min(shell.output.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    code, _, err = shell.run(dense, *short, "--no-evaluate", "--quiet", "--resume")
    assert code == 2
    assert f"is not as it was written: {shard.name} changed" in err


def test_a_task_that_is_not_there_is_known_before_the_work(
    shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_snp.running.run._Run.__init__", None)  # is not reached
    code, _, err = shell.run(dense, "--evaluate", "harness:nowhere.yaml", "--output", shell.output)
    assert code == 2
    assert "nowhere.yaml" in err
    assert not shell.output.exists()


def test_a_result_survives_a_push_that_fails_and_the_same_command_goes_on(
    shell: Shell, dense: Path, hub: HubServer
) -> None:
    name = f"{USER}/small"
    hub.commit_status = 500
    code, out, err = shell.prune(dense, "--push-to-hub", name)
    assert code == 2
    assert not out
    assert err.count("\n") == 1
    assert f"the pruned model is finished in {shell.output}; the same command with --resume does the rest" in err
    before = weight_files(shell.output)
    hub.commit_status = None
    code, out, err = shell.prune(dense, "--push-to-hub", name, "--resume")
    assert code == 0, err
    assert weight_files(shell.output) == before
    assert set(before) <= set(hub.repositories[name].files)


def test_a_card_that_somebody_has_edited_goes_up_again_and_no_new_one_instead(
    shell: Shell, dense: Path, hub: HubServer
) -> None:
    """`--resume` with `--overwrite`, which the repository asks for, is about the result that is there."""
    name = f"{USER}/small"
    there = ("--push-to-hub", name, "--resume", "--overwrite")
    assert shell.prune(dense, "--push-to-hub", name)[0] == 0
    before = (shell.output / "config.json").stat().st_mtime_ns
    with (shell.output / "README.md").open("a") as card:
        card.write("My words.")
    code, _, err = shell.run("push", shell.output, name, "--overwrite")
    assert code == 0, err
    code, _, err = shell.prune(dense, *there, "--measure-speed")
    assert code == 0, err
    assert "speed" in report(shell)
    assert (shell.output / "config.json").stat().st_mtime_ns == before
    mine = hub.repositories[name].files["README.md"]
    assert mine.endswith(b"My words.")
    code, _, err = shell.prune(dense, *there, "--seed", "1")
    assert code == 2
    assert "has README.md on the Hub, which no run of llm_snp wrote" in err
    assert hub.repositories[name].files["README.md"] == mine


@pytest.mark.parametrize("how", ["interrupted", "beside nothing", "damaged", "a copy"])
def test_with_overwrite_the_same_command_goes_on_or_prunes_again(
    how: str, shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is finished in a run with --overwrite is not pruned again to do the rest."""
    assert shell.prune(dense, "--seed", "1")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("llm_snp.running.afterwards.measure_speed", raising(KeyboardInterrupt()))
        assert shell.prune(dense, "--overwrite", "--measure-speed")[0] == 130
    before = (shell.output / "config.json").stat().st_mtime_ns
    if how == "damaged":
        next(shell.output.glob("*.safetensors")).unlink()
    elif how == "beside nothing":  # of a run that was killed before it had done anything
        (shell.directory / "out.partial").mkdir()
    elif how == "a copy":  # nothing tells whether the model and the text are still what they were
        shutil.copytree(shell.output, shell.directory / "copy")
        shutil.rmtree(shell.output)
        (shell.directory / "copy").rename(shell.output)
    code, _, err = shell.prune(dense, "--overwrite", "--measure-speed", "--resume")
    assert code == 0, err
    assert ((shell.output / "config.json").stat().st_mtime_ns == before) == (how in ("interrupted", "beside nothing"))
    assert "speed" in report(shell)


def test_a_result_survives_ctrl_c_while_it_is_timed(shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*models: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("llm_snp.running.afterwards.measure_speed", interrupted)
        code, _, err = shell.prune(dense, "--measure-speed")
    assert code == 130
    assert f"interrupted; the pruned model is finished in {shell.output}" in err
    assert "speed" not in report(shell)
    code, out, err = shell.prune(dense, "--measure-speed", "--resume")
    assert code == 0, err
    assert "speed" in report(shell)
    assert "prefill, ms" in out


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_result_survives_a_machine_without_memory(
    shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("llm_snp.running.afterwards.measure_speed", raising(error))
    code, _, err = shell.prune(dense, "--measure-speed")
    assert code == 2
    assert f"ran out of memory with a whole model on it ({first_line(error)}); the pruned model is finished in" in err


def come_between(how: str, shell: Shell, prune: Prune, other: Path, aside: Path) -> dict[str, bytes]:
    """What another terminal does to a result meanwhile; the files that are in its place then."""
    if how == "replaced":
        prune(other, shell.output, overwrite=True)
    else:
        shell.output.rename(aside)
    if how == "gone":
        shell.output.mkdir()
    return {path.name: path.read_bytes() for path in shell.output.glob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["prune", "bench"])
@pytest.mark.parametrize("how", ["replaced", "renamed", "gone"])
def test_a_result_that_was_replaced_while_it_was_timed_keeps_its_report(
    shell: Shell, prune: Prune, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, how: str
) -> None:
    """Another terminal prunes another model into the same place, or moves the result, in the hours that it takes."""
    if command == "bench":
        assert shell.prune(dense)[0] == 0
    other = save(tiny_opt(seed=1), tmp_path / "other")
    there: dict[str, bytes] = {}

    def meanwhile(*models: object, **options: object) -> object:
        there.update(come_between(how, shell, prune, other, tmp_path / "moved"))
        return {}

    for module in ("llm_snp.running.afterwards", "llm_snp.evaluation.speed"):
        monkeypatch.setattr(f"{module}.measure_speed", meanwhile)
    monkeypatch.setattr("llm_snp.evaluation.speed_table.speed_table", lambda found: [])
    if command == "bench":
        code, _, err = shell.run("bench", shell.output, "--prompt", 8, "--device", "cpu")
    else:
        code, _, err = shell.prune(dense, "--measure-speed")
    assert code == 2
    assert err.endswith("it was replaced or moved meanwhile; what was measured or drawn is written nowhere\n")
    assert "--resume" not in err
    found = {path.name: path.read_bytes() for path in shell.output.iterdir() if path.is_file()} if there else there
    assert found == there
    if how != "replaced":
        assert shell.output.exists() == (how == "gone")
        assert not any(shell.output.glob("*"))
        assert "speed" not in json.loads((tmp_path / "moved" / "report.json").read_text())


def test_a_report_of_a_model_that_knows_nothing_can_be_read(
    shell: Shell, prune: Prune, tmp_path: Path, held_out: Path
) -> None:
    """Its perplexity is beyond 1e30, which `report`, `push` and `heal` took for damage."""
    model = tiny_opt()
    with torch.no_grad():
        model.model.decoder.final_layer_norm.weight.mul_(1e4)
    found = prune(save(model, tmp_path / "dense"), shell.output, evaluate=(str(held_out),))
    assert found["evaluation"][str(held_out)]["dense"]["perplexity"] > 1e30
    assert read_report(shell.output)["evaluation"][held_out.name]["dense"]["perplexity"] == 1e30
    assert shell.run("report", shell.output)[0] == 0


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (DiskFullError("no room"), 2, "no room; {out} is finished all the same"),
        (ValueError("drawn badly"), 2, "the documents of the result cannot be made (drawn badly); {out} is "),
        (KeyboardInterrupt(), 130, "interrupted; {out} is finished all the same, but for its documents"),
    ],
    ids=["disk", "library", "Ctrl-C"],
)
def test_documents_that_fail_leave_a_whole_result(
    shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, sentence: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("llm_snp.result.finishing.write_documents", fail)
        found, out, err = shell.prune(dense)
    assert (found, out, err.count("\n")) == (code, "", 1), err
    assert err.startswith("llm_snp: " + sentence.format(out=shell.output)), err
    said = f"; {shell.output} is finished all the same, but for its documents, which `python -m llm_snp report "
    assert err.endswith(f"{said}{shell.output}` makes\n")
    assert [path.name for path in shell.directory.iterdir()] == ["out"]
    report = read_report(shell.output)
    assert report["files"]
    assert changed(shell.output, report["files"]) == ([], [])
    assert strays(shell.output) == []
    assert not (shell.output / "README.md").exists()
    assert shell.run("report", shell.output)[0] == 0
    assert (shell.output / "README.md").exists()


@pytest.mark.parametrize("how", ["replaced", "gone", "moved"])
def test_a_report_drawn_anew_is_not_written_over_another_result(
    shell: Shell, prune: Prune, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Another terminal prunes into the same place, or moves the result, while the plots are drawn."""
    assert shell.prune(dense)[0] == 0
    other = save(tiny_opt(seed=1), tmp_path / "other")
    there: dict[str, bytes] = {}

    def page(report: dict[str, Any]) -> str:
        monkeypatch.setattr("llm_snp.documents.writing.html_page", html_page)
        there.update(come_between(how, shell, prune, other, tmp_path / "elsewhere"))
        return html_page(report)

    monkeypatch.setattr("llm_snp.documents.writing.html_page", page)
    code, out, err = shell.run("report", shell.output)
    assert (code, out) == (2, "")
    assert err.startswith(f"llm_snp: {shell.output} has another result by now, or none: it was replaced or moved")
    assert shell.output.exists() == (how != "moved")
    assert {path.name: path.read_bytes() for path in shell.output.glob("*") if path.is_file()} == there
