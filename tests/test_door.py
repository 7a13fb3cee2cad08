"""What is answered before anything large is imported, what becomes of what is printed, what `import llm_snp` does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Prune, Shell, load, logits

from llm_snp import cli
from llm_snp.system.progress import say

HEAVY = ("torch", "transformers", "datasets", "matplotlib", "huggingface_hub", "accelerate", "numpy", "pyarrow")
RUN = "import sys; from llm_snp.cli import main; sys.exit(main(sys.argv[1:]))"
# Runs the command line, and says on the last line of standard error which large libraries there are then.
THEN_SAY = f"""
import sys
from llm_snp.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""


def python(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """`code` in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    captured = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(command, env=environment, text=True, check=False, **captured)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("--help", 0, "usage: python -m llm_snp"),
        ("push --help", 0, "usage: python -m llm_snp push"),
        ("report --help", 0, "usage: python -m llm_snp report"),
        ("bench --help", 0, "usage: python -m llm_snp bench"),
        ("heal --help", 0, "usage: python -m llm_snp heal"),
        ("--version", 0, "llm_snp 0."),
        ("--sparsty 0.3", 2, "did you mean --sparsity?"),
        ("push dir a/b --privat", 2, "did you mean --private?"),
        ("report dir --outptu x", 2, "did you mean --output?"),
        ("bench dir --agianst x", 2, "did you mean --against?"),
        ("--order greddy", 2, "Did you mean 'greedy'?"),
        ("--allocation even", 2, "--allocation 'even' is not known"),
        ("bench . --dtype int8", 2, "--dtype 'int8' is not known"),
        ("--sparsity 2", 2, "--sparsity is 2; it is a share"),
        ("--samples many", 2, "invalid int value: 'many'"),
        ("bench . --batch 0", 2, "--batch is 0; it must be at least 1"),
        ("./absent", 2, "absent does not exist; give a model directory or a Hub id"),
        ("file", 2, "file is a file; expected a model directory"),
        (".", 2, "is not a model directory: it has no config.json"),
        ("absent?", 2, "absent? is neither a local directory nor a valid Hub id"),
        ("./absent --dry-run", 2, "absent does not exist"),
        ("push absent me/it", 2, "absent does not exist; give the directory that a run of llm_snp has written"),
        ("report absent", 2, "absent does not exist; give the directory"),
        ("report file", 2, "file is a file; give the directory"),
        ("report .", 2, ". has no report.json; give the directory"),
        ("heal absent --text x --tokens 9", 2, "absent does not exist; give the directory"),
        ("heal . --txt x", 2, "did you mean --text?"),
        ("bench ./absent", 2, "absent does not exist; give a model directory or a Hub id"),
        ("bench file", 2, "file is a file; expected a model directory"),
    ],
)
def test_nothing_large_is_imported_for(arguments: str, code: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = python(THEN_SAY, *arguments.split(), cwd=tmp_path)
    assert done.returncode == code, done.stderr
    *lines, imported = done.stderr.splitlines()
    assert imported == "[]"
    assert len(lines) == (code != 0), lines
    assert said in done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_package_is_a_light_import() -> None:
    code = "import sys, llm_snp; print(llm_snp.prune.__name__, llm_snp.SnpError.__name__, llm_snp.__version__)"
    done = python(f"{code}; print([name for name in {HEAVY} if name in sys.modules])")
    assert done.stdout == f"prune SnpError {cli.__version__}\n[]\n", done.stderr


@pytest.fixture(scope="module")
def pruned(dense: Path, prune: Prune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result with a class of its own, whose code is not to be run."""
    output = tmp_path_factory.mktemp("door") / "pruned"
    prune(dense, output, attention="dims")
    (output / "modeling_snp.py").write_text("raise RuntimeError('this was run')")
    return output


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("import llm_snp", "import transformers.generation.utils"),
        ("from transformers.models.auto import modeling_auto", "import llm_snp"),
        ("import llm_snp.pruning.job", "import transformers"),  # of which the families are the first to ask for it
    ],
)
def test_pruned_models_load_without_their_code(first: str, then: str, pruned: Path, ids: torch.Tensor) -> None:
    done = python(
        f"{first}; {then}\n"
        "import importlib, sys, torch, transformers\n"
        "def total():\n"
        "    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).float().eval()\n"
        f"    ids = torch.tensor({ids.tolist()})\n"
        "    with torch.no_grad(): logits = model(input_ids=ids).logits\n"
        "    print(type(model).__module__, logits.double().abs().sum().item())\n"
        "total()\n"
        "importlib.reload(llm_snp); importlib.reload(transformers)\n"
        "total()\n"
        "print([finder for finder in sys.meta_path if 'llm_snp.system' in type(finder).__module__])",
        pruned,
    )
    assert done.returncode == 0, done.stderr
    *loaded, finders = done.stdout.splitlines()
    expected = logits(load(pruned), ids).double().abs().sum().item()
    assert len(loaded) == 2
    for line in loaded:
        module, total = line.split()
        assert module == "llm_snp.modeling.opt"
        assert float(total) == pytest.approx(expected, rel=1e-5)
    assert finders == "[]"


def short(shell: Shell, dense: Path) -> list[object]:
    """A run that takes no time."""
    return [dense, "--samples", 4, "--sequence-length", 16, "--calibration", shell.text, "--output", shell.output]


def test_a_log_has_lines(shell: Shell, dense: Path) -> None:
    code, _, err = shell.run(*short(shell, dense), "--evaluate", shell.text)
    assert code == 0
    assert "\r" not in err
    assert "\x1b" not in err
    lines = err.splitlines()
    assert all(lines)
    assert lines[0] == f"look for {dense} ..."
    for phase in ("load", "text", "sensitivity", "measure", "prune", "save"):
        assert lines.count(f"{phase} ...") == 1, phase
    for block in (1, 2, 3):
        assert sum(line.startswith(f"block {block}/3  ") for line in lines) == 1
        assert sum(line.startswith(f"measure: block {block}/3") for line in lines) == 1
    assert not any(line.startswith("prune: ") for line in lines)
    code, _, err = shell.run("bench", shell.output, "--prompt", 4, "--new", 1, "--runs", 1)
    assert code == 0
    lines = [re.sub(r"  \(.* left\)", "", line) for line in err.splitlines()]
    assert lines == ["speed ...", *(f"speed: run {run}/5" for run in range(1, 6))]


@pytest.mark.parametrize("arguments", ["--help", "--version"])
def test_nobody_reads_what_is_printed(arguments: str) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stream:
        done = python(RUN, arguments, stdout=stream)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no such device")
def test_no_room_for_what_is_printed(shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        code, _, err = shell.run(*short(shell, dense), "--no-evaluate", "--quiet")
        print("what is left in the buffer")
        stream.flush()
    assert code == 0
    assert err == "llm_snp: what there was to print cannot be written (No space left on device); all else is done\n"
    assert (shell.output / "report.json").is_file()


def test_closed_from_the_beginning(shell: Shell, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, None)
    assert cli.main([str(argument) for argument in (*short(shell, dense), "--no-evaluate")]) == 0
    assert (shell.output / "report.json").is_file()
    assert cli.main([str(dense), "--sparsity", "2"]) == 2


def test_what_a_terminal_obeys_is_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with cli._printed():
        print("note\tone \x1b[2J\x1b]0;title\x07 two \x9b31m\u202e")
    say("three \x1b[31m\r")
    found = capfd.readouterr()
    assert found.out == "note\tone \ufffd[2J\ufffd]0;title\ufffd two \ufffd31m\ufffd\n"
    assert found.err == "three \ufffd[31m\ufffd\n"


def test_names_that_are_no_text_are_printed_all_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    with cli._printed():
        print("result   caf\udce9")
    assert capfd.readouterr().out == "result   caf\\udce9\n"
