"""The wheel has all that the source tree has: no room, no embedded model can be forgotten."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

import llm_snp

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without a network, from a copy: building leaves things behind, which the next wheel would have."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    shutil.copytree(ROOT / "llm_snp", source / "llm_snp", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*build, "--wheel-dir", directory], cwd=source, check=True, capture_output=True)
    (found,) = directory.glob("*.whl")
    return found


def test_it_has_every_file_of_the_source(wheel: Path) -> None:
    package = ROOT / "llm_snp"
    files = {path.relative_to(ROOT).as_posix() for path in package.rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    folders = {path.parent for path in package.rglob("*.py")}
    assert {folder / "__init__.py" for folder in folders} <= set(package.rglob("__init__.py"))
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
        meta = f"llm_snp-{llm_snp.__version__}.dist-info"
        assert {name for name in names if not name.startswith(f"{meta}/")} == files
        assert {"llm_snp/py.typed", "llm_snp/demo/opt-wiki-1m/model.safetensors"} <= names
        assert f"{meta}/licenses/LICENSE" in names
        assert "llm-snp = llm_snp.cli:main" in archive.read(f"{meta}/entry_points.txt").decode()
        for name in files:
            assert archive.read(name) == (ROOT / name).read_bytes(), name


def test_it_answers_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    with ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "import llm_snp\n"
        "from llm_snp.dense.hub import find\n"
        "print(llm_snp.__file__, find(None), sorted(path.name for path in find(None).iterdir()), sep='\\n')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    file, directory, names = done.stdout.splitlines()
    assert Path(file).parent == tmp_path / "site" / "llm_snp"
    assert Path(directory) == tmp_path / "site" / "llm_snp" / "demo" / "opt-wiki-1m"
    assert "model.safetensors" in names


def test_it_runs_from_links(wheel: Path, tmp_path: Path) -> None:
    """As `uv pip install --link-mode=symlink` has it: links in site-packages, the files in uv's cache."""
    with ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "cache")
    for file in (tmp_path / "cache" / "llm_snp").rglob("*.*"):
        if file.is_file():
            link = tmp_path / "site" / file.relative_to(tmp_path / "cache")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    options = ["--sparsity", "0.3", "--samples", "2", "--sequence-length", "16", "--output", "out"]
    (tmp_path / "text.txt").write_text((ROOT / "README.md").read_text())
    options += ["--evaluate", "text.txt", "--calibration", "text.txt"]
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from llm_snp.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site"), *options], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "modeling_snp.py").is_file()
