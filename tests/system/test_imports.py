"""Something to do once a module has been imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_snp.system.imports import when_imported


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `later`, which replaces itself in `sys.modules` as transformers does, with a module `later.part`."""
    package = tmp_path / "later"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import sys, types\n"
        "class Lazy(types.ModuleType):\n"
        "    pass\n"
        "lazy = Lazy(__name__)\n"
        "vars(lazy).update({name: value for name, value in globals().items() if name.startswith('__')})\n"
        "lazy.value = 1\n"
        "sys.modules[__name__] = lazy\n"
    )
    (package / "part.py").write_text("from later import value\nvalue += 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = [*sys.meta_path]
    yield package
    sys.meta_path[:] = finders
    for name in ("later", "later.part"):
        sys.modules.pop(name, None)


def test_at_the_end_of_the_import(there: Path) -> None:
    finders, seen = [*sys.meta_path], []
    when_imported("later", lambda: seen.append(importlib.import_module("later.part").value))
    when_imported("later", lambda: seen.append("twice"))
    assert seen == []
    assert "later" not in sys.modules
    later = importlib.import_module("later")
    assert seen == [2]
    assert sys.meta_path == finders
    assert type(later.__loader__).__name__ == type(later.__spec__.loader).__name__ == "SourceFileLoader"
    assert later.__spec__.origin == later.__file__ == str(there / "__init__.py")
    importlib.reload(later)
    assert seen == [2]


def test_at_once(there: Path) -> None:
    finders, seen = [*sys.meta_path], []
    importlib.import_module("later")
    when_imported("later", lambda: seen.append(1))
    when_imported("later", lambda: seen.append(2))
    assert seen == [1, 2]
    assert sys.meta_path == finders


def test_through_a_part_of_it(there: Path) -> None:
    seen: list[bool] = []
    when_imported("later", lambda: seen.append("later.part" in sys.modules))
    importlib.import_module("later.part")
    assert seen == [False]


def test_looking_for_it_is_not_importing_it(there: Path) -> None:
    seen: list[int] = []
    when_imported("later", lambda: seen.append(1))
    spec = importlib.util.find_spec("later")
    assert spec is not None
    assert spec.loader is not None
    assert spec.loader.get_filename("later") == spec.origin == str(there / "__init__.py")  # type: ignore[attr-defined]
    assert seen == []
    importlib.import_module("later")
    assert seen == [1]


def test_an_import_that_fails(there: Path) -> None:
    finders, seen = [*sys.meta_path], []
    whole = (there / "__init__.py").read_text()
    (there / "__init__.py").write_text("raise ImportError('not today')")
    when_imported("later", lambda: seen.append(1))
    with pytest.raises(ImportError, match="not today"):
        importlib.import_module("later")
    assert "later" not in sys.modules
    assert seen == []
    (there / "__init__.py").write_text(whole)
    importlib.invalidate_caches()
    importlib.import_module("later")
    assert seen == [1]
    assert sys.meta_path == finders


def test_a_module_that_is_not_installed() -> None:
    finders = [*sys.meta_path]
    when_imported("later", lambda: None)
    with pytest.raises(ModuleNotFoundError, match="later"):
        importlib.import_module("later")
    sys.meta_path[:] = finders


def test_what_cannot_be_done_then_does_not_harm_the_import(there: Path) -> None:
    def action() -> None:
        raise ImportError("no torch")

    when_imported("later", action)
    with pytest.warns(RuntimeWarning, match="not done after the import of later: no torch"):
        later = importlib.import_module("later")
    assert later.value == 1
    assert sys.modules["later"] is later


def test_all_threads_wait_for_it(there: Path) -> None:
    begun, done = threading.Event(), threading.Event()
    seen: list[bool] = []

    def action() -> None:
        begun.set()
        importlib.import_module("later.part")
        done.wait(0.2)
        done.set()

    def use() -> None:
        begun.wait(10)
        importlib.import_module("later")
        seen.append(done.is_set())

    when_imported("later", action)
    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    importlib.import_module("later")
    for thread in threads:
        thread.join(10)
    assert seen == [True] * 3
