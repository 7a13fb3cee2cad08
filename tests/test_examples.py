"""Every example, run as a person would: the commands of examples/README.md, where llm_snp cannot be imported."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path

import elsewhere
import pytest
from conftest import Prune, paragraphs
from tiny_models import save_tiny

FOLDER = Path(__file__).parent.parent / "examples"
COMMANDS = re.findall(r"^python examples/(\S+) ?(.*)$", (FOLDER / "README.md").read_text(), re.MULTILINE)
# Run on a model with rotary pairs only: integer tables and all that the others have.
WITH_TABLES = ("generate.py", "onnx_export.py")
# Appended to the commands: shorter, as the tiny model is.
SHORTER = {"compile.py": ["--length", "16", "--runs", "3"], "device_map.py": ["--share", "0.95"]}
NEEDS = {"lora.py": ("peft",), "quantize.py": ("torchao",), "onnx_export.py": ("onnxruntime", "onnxscript")}
# The Makefile installs torchao there: transformers would import it in every other test, too. These need a new
# interpreter, as do those with an environment of their own; all others are forked from one.
BESIDE = {"quantize.py": Path(sys.prefix) / "torchao"}


@pytest.fixture(scope="module", params=["dims", "heads"])
def model(request: pytest.FixtureRequest, prune: Prune, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model with different widths in every block."""
    output = tmp_path_factory.mktemp("result") / request.param
    family, _, mode = request.param.rpartition("-")
    if family:
        dense = save_tiny(family, output.with_name(f"dense-{request.param}"))
    prune(dense, output, 0.4 if mode != "queries" else 0.3, attention=mode)
    widths = [
        tuple(sorted(width.items())) for width in json.loads((output / "config.json").read_text())["block_widths"]
    ]
    assert len(set(widths)) > 1
    return output


@pytest.fixture
def workplace(model: Path, tmp_path: Path) -> Path:
    """A directory as the README supposes it: a pruned model, and a text."""
    shutil.copytree(model, tmp_path / "demo-output")
    (tmp_path / "README.md").write_text("\n\n".join(paragraphs(20, seed=5)))
    return tmp_path


def run(workplace: Path, name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """An example as a person would run it."""
    fixed = {"HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"} | environment
    if name not in BESIDE and not environment:
        return elsewhere.run(FOLDER / name, *arguments, folder=workplace, **fixed)
    (workplace / "absent").mkdir()
    (workplace / "absent" / "llm_snp.py").write_text("raise ImportError('llm_snp is not here')")
    fixed |= {
        "PYTHONPATH": os.pathsep.join(map(str, [workplace / "absent", *([BESIDE[name]] if name in BESIDE else [])])),
        "HF_MODULES_CACHE": str(workplace / "modules"),
    }
    return subprocess.run(
        [sys.executable, str(FOLDER / name), *arguments],
        cwd=workplace,
        env=os.environ | fixed,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def figures(pattern: str, out: str) -> list[float]:
    """The number that follows each occurrence of `pattern`."""
    return [float(found.replace(",", "")) for found in re.findall(pattern + r"\D*?([\d.,]+(?:e[-+]\d+)?)", out)]


def widths(directory: Path) -> list[dict[str, int]]:
    return json.loads((directory / "config.json").read_text())["block_widths"]  # type: ignore[no-any-return]


def differences(out: str, count: int, limit: float) -> None:
    found = figures("largest difference of the logits", out)
    assert len(found) == count
    assert max(found) < limit


def losses(out: str, *names: str) -> list[float]:
    """The first figure of the line that begins with each name."""
    return [figures(rf"(?m:^{name})", out)[0] for name in names]


def check_generate(out: str, workplace: Path) -> None:
    for name in ("greedy", "sampled", "beams"):
        assert re.search(rf"^{name} +The city of'.+'$|^{name} +The city of\".+\"$", out, re.MULTILINE), name
    assert figures("tokens as one prompt at a time", out) == [100]
    assert figures("tokens as with a dynamic cache", out) == [100] or "needs transformers 4.56" in out
    kept = 0
    for width in widths(workplace / "demo-output"):
        both = 2 * width["head_dim"] if "head_dim" in width else 2 * width["pairs"] + width["values"]
        kept += width["heads"] * both
    assert figures("values per token", out)[0] == kept


def check_pipeline(out: str, workplace: Path) -> None:
    written = out.split("---")
    assert written[0].startswith("The city of")
    assert written[1].strip().startswith("In the morning")
    assert len(written[0]) > len("The city of") + 10


def check_compile(out: str, workplace: Path) -> None:
    differences(out, 2, 1e-4)
    assert figures("eager", out)[0] > 0
    assert figures("compiled", out)[-1] > 0


def check_device_map(out: str, workplace: Path) -> None:
    differences(out, 2, 1e-5)
    assert min(figures("modules on disk:", out)) > 0
    assert len(figures(r"modules on (?!disk)\w+:", out)) >= 2


def check_quantize(out: str, workplace: Path) -> None:
    differences(out, 1, 1e-5)
    before, after = (float(number) for number in re.findall(r"size on disk, MB +([\d.]+) -> ([\d.]+)", out)[0])
    assert after < before
    before, after = (float(number) for number in re.findall(r"perplexity +([\d.]+) -> ([\d.]+)", out)[0])
    assert after == pytest.approx(before, rel=0.05)
    assert list((workplace / "demo-output-int8").glob("*.safetensors"))


def check_finetune(out: str, workplace: Path) -> None:
    before, after, again = losses(out, "before", "after", "loaded again")
    assert after < before
    assert again == pytest.approx(after, abs=2e-4)
    assert widths(workplace / "demo-output-tuned") == widths(workplace / "demo-output")


def check_lora(out: str, workplace: Path) -> None:
    before, trained, merged, again = losses(out, "before", "trained", "merged", "loaded again")
    assert trained < before
    assert merged == pytest.approx(trained, abs=2e-4)
    assert again == pytest.approx(merged, abs=2e-4)
    output = workplace / "demo-output-lora"
    assert widths(output) == widths(workplace / "demo-output")
    assert not list(output.glob("adapter*"))


def check_onnx_export(out: str, workplace: Path) -> None:
    differences(out, 2, 1e-4)
    assert (workplace / "demo-output.onnx").stat().st_size > 0


CHECKS: dict[str, Callable[[str, Path], None]] = {
    name.removeprefix("check_") + ".py": check for name, check in globals().items() if name.startswith("check_")
}


def test_every_example_has_a_command_and_a_check() -> None:
    examples = {path.name for path in FOLDER.glob("*.py")}
    assert examples == {name for name, _ in COMMANDS}
    assert examples == set(CHECKS)


def follow(name: str, arguments: str, workplace: Path) -> None:
    """Run a command of the README and check what it printed."""
    beside = [str(BESIDE[name])] if name in BESIDE else []
    missing = [module for module in NEEDS.get(name, ()) if PathFinder.find_spec(module, [*sys.path, *beside]) is None]
    if missing:
        pytest.skip(f"{name} needs {' and '.join(missing)}")
    if name == "compile.py" and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile needs a C++ compiler")
    done = run(workplace, name, *shlex.split(arguments), *SHORTER.get(name, ()))
    assert done.returncode == 0, done.stderr
    CHECKS[name](done.stdout, workplace)


SLOW = {"compile.py", "onnx_export.py", "quantize.py"}  # they compile, or trace, or import what takes as long
MARKED = [
    pytest.param(name, arguments, marks=[pytest.mark.slow] * (name in SLOW), id=name) for name, arguments in COMMANDS
]


@pytest.mark.parametrize(("name", "arguments"), MARKED)
@pytest.mark.parametrize("model", ["dims"], indirect=True)
def test_commands_of_the_readme(name: str, arguments: str, workplace: Path) -> None:
    if name in WITH_TABLES:
        pytest.skip("test_models_with_tables runs it")
    follow(name, arguments, workplace)


@pytest.mark.parametrize("model", ["heads", "llama-queries"], indirect=True)
def test_fewer_heads_in_some_blocks(workplace: Path) -> None:
    done = run(workplace, "generate.py")
    assert done.returncode == 0, done.stderr
    check_generate(done.stdout, workplace)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in WITH_TABLES]
)
@pytest.mark.parametrize("model", ["llama-dims"], indirect=True)
def test_models_with_tables(name: str, workplace: Path) -> None:
    """Which rotary pairs are left is an integer buffer, with which other tools have to get along."""
    follow(name, dict(COMMANDS)[name], workplace)


@pytest.mark.parametrize("model", ["heads"], indirect=True)
def test_compile_without_a_compiler_says_so(workplace: Path) -> None:
    done = run(workplace, "compile.py", CXX="no-such-compiler", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("torch.compile needs a C++ compiler")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("model", ["heads"], indirect=True)
def test_a_directory_that_is_not_there(workplace: Path) -> None:
    done = run(workplace, "pipeline.py", "nowhere")
    assert done.returncode == 2
    assert "nowhere is no directory; give that of a pruned model, or make one with: make demo" in done.stderr
