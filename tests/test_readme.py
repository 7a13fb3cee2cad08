"""What the README tells a person to type works, in the order in which it stands there."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import copy_tokenizer, paragraphs, save, tiny_opt
from hub_server import USER, HubServer

from llm_snp.cli import main
from llm_snp.dense import data
from llm_snp.families import FAMILIES, FILES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TASKS = Path(__file__).parent / "harness_tasks"
# ("python", code) and ("", commands) as they follow each other
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
# What is not downloaded here, is shorter here, or belongs to another user.
INSTEAD = {
    "harness:piqa,arc_easy": f"harness:{TASKS / 'small_choice.yaml'}",
    "me/opt-1.3b-snp-30": f"{USER}/opt-1.3b-snp-30",
    "MODEL": "facebook/opt-1.3b",
    "FILE": "text.txt",
    "--nproc-per-node 8": "--nproc-per-node 2",
}
SHORTER = {"bench": ["--prompt", "16", "--new", "4", "--runs", "2"], "prune": ["--samples", "8", "--device", "cpu"]}
MORE = {"quality.py": ["--samples", "8", "--rows", "^best$", "--sparsity", "0.3"], "perplexity.py": []}

pytestmark = pytest.mark.documents


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: HubServer) -> HubServer:
    """A directory with models under the names of the README, texts for those of the Hub, and a Hub."""
    for name in ("opt-1.3b", "opt-13b", "opt-125m"):
        (tmp_path / "facebook").mkdir(exist_ok=True)
        save(tiny_opt(), tmp_path / "facebook" / name)
        copy_tokenizer(tmp_path / "facebook" / name)
    (tmp_path / "text.txt").write_text("\n\n".join(paragraphs(300, seed=1)))
    for corpus in ("wikitext2", "c4"):
        text = lambda purpose, corpus=corpus: iter(paragraphs(100, seed=len(corpus + purpose)))  # noqa: E731
        monkeypatch.setitem(data.HUB_CORPORA, corpus, text)
    monkeypatch.chdir(tmp_path)
    return hub


def run(line: str) -> None:
    """One command as it stands in the README, but for `INSTEAD`; shorter, as the tiny models are."""
    for there, here in INSTEAD.items():
        line = line.replace(there, here)
    program, *arguments = shlex.split(line, comments=True)
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "torchrun":
        torchrun = [str(Path(sys.executable).with_name("torchrun")), *arguments, *SHORTER["prune"]]
        subprocess.run([*torchrun, "--calibration", "text.txt", "--no-evaluate"], check=True, capture_output=True)
    elif arguments[:2] == ["-m", "llm_snp"]:
        name = arguments[2] if arguments[2] in ("push", "report", "bench") else "prune"
        assert main([*arguments[2:], *SHORTER.get(name, [])]) == 0, line
    else:
        assert program == "python", line
        script = ROOT / arguments[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [*arguments, *MORE[script.name]])
            patch.syspath_prepend(script.parent)
            with pytest.raises(SystemExit) as end:
                runpy.run_path(str(script), run_name="__main__")
        assert not end.value.code, line


def test_commands_and_code_in_their_order(
    workplace: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = 0
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, "README.md", "exec"), {})
            continue
        for line in block.splitlines():
            if not re.match(r"(python|make|torchrun) ", line):
                continue
            if "opt-125m-snp-30" in line:  # which is not pruned there
                shutil.copytree("opt-1.3b-snp-30", "opt-125m-snp-30")
            run(line)
            seen += 1
    assert seen >= 12
    for name in ("opt-1.3b-snp-30", "opt-1.3b-stock", "opt-1.3b-tasks", "opt-13b-snp-30", "smaller"):
        assert (tmp_path / name / "report.html").stat().st_size > 10_000, name
        assert (tmp_path / name / "plots" / "kept.png").is_file(), name
    assert not list((tmp_path / "opt-1.3b-stock").glob("*.py"))
    assert workplace.repositories[f"{USER}/opt-1.3b-snp-30"].private
    out = capsys.readouterr().out
    assert "small_choice acc" in out
    assert "decode, tokens/s" in out


@pytest.mark.skipif(set(FAMILIES) != set(FILES), reason="this transformers does not have all of them")
def test_the_table_of_models_is_that_of_the_code() -> None:
    support = runpy.run_path(str(ROOT / "docs" / "support.py"))["table"]()
    assert support in README


@pytest.mark.parametrize("page", ["README.md", "examples/README.md", "docs/families.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            headings = {
                line.strip("# ").lower().replace(" ", "-") for line in text.splitlines() if line.startswith("#")
            }
            assert target[1:] in headings, target
        else:
            assert ((ROOT / page).parent / target).exists(), target


def test_every_flag_it_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    known = set()
    for command in ((), ("push",), ("report",), ("bench",)):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        known |= set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    others = {"--nproc-per-node", "--multi", "--cpu", "--runs", "--max-windows", "--json", "--against"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert named <= known | others, named - known - others
