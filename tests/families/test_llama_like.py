"""A row of `llama_like` and the file of `modeling` that is written from it."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from llm_snp.families import FAMILIES
from llm_snp.families.llama_like import LLAMA_LIKE

SCRIPT = Path(__file__).parents[2] / "docs" / "families.py"


@pytest.fixture
def writer() -> ModuleType:
    """docs/families.py."""
    spec = importlib.util.spec_from_file_location("docs_families", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_are_those_of_the_rows(writer: ModuleType) -> None:
    files = writer.files()
    for path, text in files.items():
        assert path.read_text() == text, f"{path.name} is not what its row says: make families"
    assert len(files) == len(LLAMA_LIKE) - 1
    written = {path for path in writer.MODELING.glob("*.py") if path.read_text().startswith(writer.HEAD)}
    assert written == set(files), "a file without a row"


def test_the_template_is_the_file_of_its_own_row(writer: ModuleType) -> None:
    assert writer.source(LLAMA_LIKE["llama"]) == (writer.MODELING / "llama.py").read_text()


def test_a_row_says_all_that_is_different(writer: ModuleType) -> None:
    """Another name and window, one by one: the rest of the text stays."""
    llama = LLAMA_LIKE["llama"]
    named = writer.source(replace(llama, model_type="kin", classes="Kin", title="Kin 7"))
    assert "Llama" not in named
    assert named.replace("Kin 7", "Kin").replace("Kin", "Llama").replace("kin", "llama") == writer.source(llama)
    window = '{"sliding_window": 16}'
    added = set(writer.source(replace(llama, hands_on=window)).splitlines()) - set(writer.source(llama).splitlines())
    assert added == {
        "from typing import Any",
        "    def attention_options(self) -> dict[str, Any]:",
        f"        return {window}",
    }


def test_a_template_that_has_changed_is_not_taken_for_llamas(
    writer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (writer.MODELING / "llama.py").read_text()
    (tmp_path / "llama.py").write_text(text.replace("eager = staticmethod", "plain = staticmethod"))
    monkeypatch.setattr(writer, "MODELING", tmp_path)
    with pytest.raises(ValueError, match=r"llama\.py no longer has '    eager = "):
        writer.source(LLAMA_LIKE["olmo2"])


def test_a_row_gives_the_classes_of_its_file() -> None:
    for model_type, row in LLAMA_LIKE.items():
        if model_type in FAMILIES:
            pruned = FAMILIES[model_type].pruned_class
            assert pruned.__module__ == f"llm_snp.modeling.{row.file}"
            assert pruned.config_class.model_type == f"snp_{model_type}"
            assert pruned.config_class.__bases__[0].model_type == model_type
