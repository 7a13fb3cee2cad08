"""`report DIR`: what it says of a result that may be a stranger's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Prune, copied

from llm_snp.cli import main
from llm_snp.result.own_code import MODELING


@pytest.mark.parametrize("format", ["auto", "stock"])
def test_a_result_of_ones_own_is_loaded_as_its_card_says(
    format: str, prune: Prune, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prune(dense, tmp_path / "out", format=format)
    capsys.readouterr()
    assert main(["report", str(tmp_path / "out")]) == 0
    trust = ", trust_remote_code=True" if format == "auto" else ""
    last = f"load it  AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}{trust})"
    assert capsys.readouterr().out.splitlines()[-1] == last


@pytest.mark.parametrize("where", [MODELING, "config.json", "a repository", "tokenizer_config.json", "generate"])
def test_nobody_is_told_to_run_other_code(
    where: str, prune: Prune, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stranger's result may have any; with llm_snp's own classes it loads without."""
    prune(dense, tmp_path / "out")
    strange = copied(tmp_path / "out", tmp_path / "strange")
    (strange / "evil.py").write_text("raise SystemExit('this was run')\n")
    classes = {"AutoModelForCausalLM": f"{'them/theirs--' * (where == 'a repository')}evil.SnpOPTForCausalLM"}
    if where == MODELING:
        (strange / MODELING).write_text("raise SystemExit('this was run')\n" + (strange / MODELING).read_text())
    elif where == "generate":  # transformers looks there when it loads
        (strange / "custom_generate").mkdir()
        (strange / "evil.py").rename(strange / "custom_generate" / "generate.py")
    elif where == "tokenizer_config.json":
        settings(strange / where, auto_map={"AutoTokenizer": [None, "evil.Tokenizer"]})
    else:
        settings(strange / "config.json", auto_map=classes)
    capsys.readouterr()
    assert main(["report", str(strange)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"load it  import llm_snp; AutoModelForCausalLM.from_pretrained({str(strange)!r})"
    assert out[-2].startswith("code     there is not what this version writes")
    card = (strange / "README.md").read_text()
    assert "import llm_snp  # its classes load it" in card
    assert "trust_remote_code=True" not in card
    assert "--trust-remote-code" not in card


def test_what_is_no_code_is_no_reason_to_warn(
    prune: Prune, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prune(dense, tmp_path / "out")
    settings(tmp_path / "out" / "config.json", trained_by="ann")
    assert main(["report", str(tmp_path / "out")]) == 0
    assert "trust_remote_code=True" in capsys.readouterr().out.splitlines()[-1]


def settings(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_home_directory_where_the_shell_leaves_it(
    prune: Prune, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    prune(dense, tmp_path / "out")
    assert main(["report", "~/out", "--output=~/page.html"]) == 0
    assert (tmp_path / "page.html").is_file()
