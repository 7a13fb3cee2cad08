"""The command line as a person meets it."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BLOCKS, LENGTH, SAMPLES, Shell, load

import llm_snp
from llm_snp import cli
from llm_snp.cli import parse
from llm_snp.commands import prune
from llm_snp.commands.prune import options_of
from llm_snp.config import METHODS, PruneConfig
from llm_snp.documents.shareable import command_line


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(PruneConfig):
        if field.name == "model":
            assert " MODEL Hub id or local directory" in text
        else:
            assert f"--{field.name.replace('_', '-')} " in text, field.name
        for choice in field.metadata["choices"] or ():
            assert choice in text
    assert "--dry-run print the plan" in text
    assert "--no-evaluate" in text
    assert "example: python -m llm_snp facebook/opt-1.3b --sparsity 0.3" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"llm_snp {llm_snp.__version__}\n"


def test_defaults_of_the_command_line_are_those_of_the_function() -> None:

    def parsed(*arguments: str) -> PruneConfig:
        return prune.options_of(cli.parse(arguments)[1])

    assert parsed() == PruneConfig()
    assert not cli.parse([])[1].dry_run
    arguments = ("model", "--no-evaluate", "--evaluate", "x", "--damping", "auto", "--dry-run")
    assert parsed(*arguments) == PruneConfig("model", evaluate=(), damping="auto")
    assert cli.parse(arguments)[1].dry_run
    assert parsed("--evaluate", "a.txt", "--evaluate", "b.txt").evaluate == ("a.txt", "b.txt")
    assert parsed("--damping", "1e-2").damping == 0.01


def test_a_method_is_a_name_for_choices() -> None:
    for method, choices in METHODS.items():
        resolved = PruneConfig(method=method).resolved()
        assert {name: getattr(resolved, name) for name in choices} == choices
        resolved = PruneConfig(method=method, order="energy").resolved()
        assert resolved.order == "energy"
        assert resolved.allocation == choices["allocation"]


def test_dry_run_loads_no_weights(shell: Shell, dense: Path) -> None:
    model = shell.directory / "tiny"
    model.mkdir()
    shutil.copy(dense / "config.json", model)
    code, out, err = shell.run(model, "--dry-run", "--sparsity", "0.25", "--attention", "dims")
    assert code == 0, err
    assert err == ""
    lines = out.splitlines()
    assert lines[0].startswith(
        f"plan for {model}: best, order greedy, allocation loss, target residual, attention dims"
    )
    assert "allocation loss is decided by a measuring pass; shown is the uniform plan" in lines
    blocks = [line for line in lines if line.startswith("block")]
    assert len(blocks) == BLOCKS
    assert "dims 6/8" in blocks[0]
    assert "neurons 48/64" in blocks[0]
    for word in ("parameters", "windows", "peak memory", "disk"):
        assert sum(line.startswith(word) for line in lines) == 1, word
    assert f"{load(dense).num_parameters():,} -> " in out
    assert "25.0" in out
    assert "tiny-snp-25" in out
    assert sorted(path.name for path in shell.directory.iterdir()) == ["tiny"]
    code, out, _ = shell.run(model, "--dry-run", "--method", "snp", "--allocation", "uniform", "--attention", "heads")
    assert code == 0
    assert "heads 3/4" in out
    assert "measuring pass" not in out


def test_dry_run_shows_the_plan_that_is_carried_out(shell: Shell, dense: Path) -> None:
    flags = ("--allocation", "uniform", "--attention", "dims", "--sparsity", "0.4")
    _, out, _ = shell.run(dense, "--dry-run", *flags)
    assert shell.prune(dense, *flags)[0] == 0
    report = json.loads((shell.output / "report.json").read_text())
    for block, kept in enumerate(report["plan"]["kept"], 1):
        line = next(line for line in out.splitlines() if line.startswith(f"block {block:>3}/"))
        assert all(f"{unit} {count}/" in line for unit, count in kept.items())
    assert f"-> {report['model']['parameters_pruned']:,} " in out


def test_dry_run_refuses_what_a_run_refuses(shell: Shell, dense: Path) -> None:
    assert "would leave a block empty" in shell.refused(dense, "--dry-run", "--sparsity", "0.99")
    shell.output.mkdir()
    (shell.output / "file").touch()
    assert "is not empty and no result of llm_snp" in shell.refused(dense, "--dry-run")


def test_default_output_is_named_after_model_and_sparsity(shell: Shell, dense: Path) -> None:
    short = ("--samples", SAMPLES, "--sequence-length", LENGTH, "--calibration", shell.text, "--no-evaluate", "--quiet")
    for model, sparsity, name in (
        (dense, "0.3", "tiny-snp-30"),
        (f"{dense}/", "0.125", "tiny-snp-12.5"),
        (dense, "0", "tiny-snp-0"),
    ):
        code, out, err = shell.run(model, "--sparsity", sparsity, *short)
        assert code == 0, err
        assert f"result   {name}\n" in out
        assert (shell.directory / name / "config.json").is_file()


def test_what_a_run_prints(shell: Shell, dense: Path, held_out: Path) -> None:
    arguments = ["--samples", SAMPLES, "--sequence-length", LENGTH, "--calibration", shell.text, "--attention", "dims"]
    code, out, err = shell.run(dense, *arguments, "--evaluate", held_out, "--output", shell.output)
    assert code == 0
    assert "perplexity, evaluation.txt" in out
    for block in range(1, BLOCKS + 1):
        assert f"block {block}/{BLOCKS}  dims " in err
    code, quiet, err = shell.run(
        dense, *arguments, "--evaluate", held_out, "--output", shell.output, "--overwrite", "--quiet"
    )
    assert code == 0
    assert err == ""
    report = json.loads((shell.output / "report.json").read_text())
    perplexity = report["evaluation"][held_out.name]
    row = next(line for line in quiet.splitlines() if line.startswith("perplexity"))
    assert f"{perplexity['dense']['perplexity']:,.2f}" in row
    assert f"{perplexity['pruned']['perplexity']:,.2f}" in row
    assert f"{report['model']['parameters_pruned']:,}" in quiet
    assert "load it  AutoModelForCausalLM.from_pretrained(" in quiet


def test_no_evaluate(shell: Shell, dense: Path) -> None:
    code, out, _ = shell.prune(dense)
    assert code == 0
    assert "perplexity" not in out
    assert json.loads((shell.output / "report.json").read_text())["evaluation"] == {}
    assert "Not measured in this run." in (shell.output / "README.md").read_text()


def test_in_a_process_of_its_own(dense: Path, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    command = [sys.executable, "-m", "llm_snp", str(dense), "--quiet"]  # text from the Hub, which is not there
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("llm_snp: dataset Salesforce/wikitext could not be had from the Hugging Face Hub (")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_no_library_tells_what_a_config_says(dense: Path, tmp_path: Path) -> None:
    """transformers logs a value that it cannot set, with what a terminal obeys in it."""
    shutil.copytree(dense, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_return_dict": "\x1b[2J\nllm_snp: run this"}))
    command = [sys.executable, "-m", "llm_snp", "model", "--dry-run", "--no-evaluate", "--calibration", "self"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "\x1b" not in done.stderr + done.stdout
    assert "run this" not in done.stderr + done.stdout


def test_a_working_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers ends with a traceback there, as it is imported."""
    (tmp_path / "gone").mkdir()
    line = f"cd gone && rmdir ../gone && exec {sys.executable} -m llm_snp report {tmp_path}"
    environment = os.environ | {"PYTHONPATH": str(Path(llm_snp.__file__).parent.parent)}
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = "llm_snp: the working directory has been removed; change to another one\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_from_python(dense: Path, text: Path, tmp_path: Path) -> None:
    short = {"samples": SAMPLES, "sequence_length": LENGTH, "calibration": str(text), "evaluate": (), "quiet": True}
    report = llm_snp.prune(str(dense), 0.2, output=str(tmp_path / "out"), **short)
    assert report["sparsity"]["achieved"] == pytest.approx(0.2, abs=0.002)
    with pytest.raises(llm_snp.SnpError, match="--sparsity is 2; it is a share"):
        llm_snp.prune(str(dense), 2)
    with pytest.raises(llm_snp.SnpError, match=r"give several, such as \['c4'\]"):
        llm_snp.prune(str(dense), evaluate="c4")
    with pytest.raises(TypeError, match="sparsty"):
        llm_snp.prune(str(dense), sparsty=0.2)


@pytest.mark.parametrize(
    ("processes", "nodes", "head"),
    [(1, 1, "python"), (8, 1, "torchrun --nproc-per-node 8"), (16, 2, "torchrun --nnodes 2 --nproc-per-node 8")],
)
def test_the_command_can_be_typed_again(processes: int, nodes: int, head: str) -> None:
    words = ["my model", "--sparsity", "0.25", "--output=-x", "--seed", "1", "--evaluate", "a", "--evaluate", "b"]
    for arguments in ([], words, ["m", "--no-evaluate", "--method", "snp", "--damping", "auto", "--quiet", "--resume"]):
        _, args = parse(arguments)
        options = options_of(args)
        for given in (options, options.resolved()):
            line = command_line(dataclasses.asdict(given), processes, nodes)
            assert line.startswith(f"{head} -m llm_snp ")
            _, again = parse(shlex.split(line.split("-m llm_snp ")[1]))
            assert options_of(again).resolved() == options.resolved()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["report", ""], "an argument"),
        (["bench", "out", "--against", ""], "--against"),
        (["export", "out", "--gguf="], "--gguf"),
        (["--sparsity", "0.3", "--output= "], "--output"),
    ],
)
def test_what_is_empty(arguments: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As of a shell's variable that is not set; as a path it would be the working directory."""
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == f"llm_snp: {name} is empty; give something, or leave it out\n"
