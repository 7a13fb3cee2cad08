"""The system's directory for temporary files: gone or full, it ends nothing without a sentence."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import Prune

from llm_snp.dense.hub import load_config
from llm_snp.dense.whole import whole_model
from llm_snp.errors import CheckpointError, OutputError
from llm_snp.result.assembly import open_result
from llm_snp.running import run
from llm_snp.system.files import scratch


@pytest.fixture
def gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    return tmp_path / "gone"


def test_no_directory_for_temporary_files(gone: Path, dense: Path) -> None:
    with (
        pytest.raises(OutputError, match=rf"no temporary file can be made \(No such file .*: {gone}/.*; free"),
        scratch(),
    ):
        pass
    config = load_config(dense)
    with pytest.raises(OutputError, match="or set TMPDIR"):
        whole_model(dense, config, None, CheckpointError)


def test_it_may_go_while_it_is_used(tmp_path: Path) -> None:
    with scratch() as folder:
        folder.rmdir()


def test_a_run_ends_well_though_it_is_gone_by_then(
    prune: Prune, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's directory is cleaned up while it runs, or another job has filled it."""

    def opened(*given: Any) -> Any:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
        return open_result(*given)

    monkeypatch.setattr(run, "open_result", opened)
    prune(dense, tmp_path / "out")
    assert (tmp_path / "out" / "report.json").is_file()
    assert tempfile.tempdir == str(tmp_path / "gone")
