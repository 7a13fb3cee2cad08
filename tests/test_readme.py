"""What README, docs/ and CONTRIBUTING tell a person to type works, page by page, in the order in which it stands."""

from __future__ import annotations

import ast
import dataclasses
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import yaml
from conftest import copied, copy_tokenizer, paragraphs, save, tiny_opt
from hub_server import USER, HubServer
from llama_cpp import ask
from test_architecture import ROOMS
from tiny_models import save_tiny

from llm_snp.cli import main
from llm_snp.dense import readers
from llm_snp.families import FAMILIES, MODEL_TYPES, Family, Rows, Site
from llm_snp.families.llama_like import LlamaLike

ROOT = Path(__file__).parent.parent
TASKS = Path(__file__).parent / "harness_tasks"
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, "CHANGELOG.md", "SECURITY.md", "examples/README.md", "benchmarks/results/README.md"]
# Its code describes a family that does not exist; the others' runs.
FRAGMENTS = "docs/families.md"
# Twenty to forty seconds each.
SLOW = {"docs/scale.md", "docs/method.md", "docs/healing.md", "docs/serving.md", "docs/using.md"}
# What a page names without having made it: the result of the README's first command.
RESULT = "opt-1.3b-snp-30"
# What is not downloaded here, is shorter here, or belongs to another user.
INSTEAD = {
    "harness:piqa,arc_easy": f"harness:{TASKS / 'small_choice.yaml'}",
    f"me/{RESULT}": f"{USER}/{RESULT}",
    "experts.py MODEL": "experts.py mixtral",
    "MODEL": "facebook/opt-1.3b",
    "real.py smollm2": "real.py facebook/opt-1.3b",
    "FILE": "text.txt",
    "--nproc-per-node 8": "--nproc-per-node 2",
}
SHORTER = {
    "bench": ["--prompt", "16", "--new", "4", "--runs", "2"],
    "prune": ["--samples", "8", "--device", "cpu"],
    "heal": ["--tokens", "256", "--batch", "4", "--sequence-length", "16", "--device", "cpu"],
}
MORE = {
    "quality.py": ["--samples", "8", "--rows", "^best$", "--sparsity", "0.3"],
    "real.py": ["--samples", "8", "--rows", "^best$", "--own-text", "2"],
    "elimination.py": ["--units", "64"],
    "experts.py": ["--samples", "8", "--gone", "1"],
}
COMMAND = re.compile(r"(python|make|torchrun|pip|llama-completion) ")

pytestmark = pytest.mark.documents


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def blocks_of(page: str) -> list[tuple[str, str]]:
    """("python", code) and ("", commands or what they print) as they follow each other."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)


def commands_of(page: str) -> list[str]:
    return [line for kind, block in blocks_of(page) if not kind for line in block.splitlines() if COMMAND.match(line)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models under the names of the pages, a text, and what the README's first command makes of them."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("opt-1.3b", "opt-13b", "opt-125m"):
        (folder / "facebook").mkdir(exist_ok=True)
        save(tiny_opt(), folder / "facebook" / name)
        copy_tokenizer(folder / "facebook" / name)
    save_tiny("llama", folder / "meta-llama" / "Llama-3.2-1B")
    save_tiny("mixtral", folder / "mixtral")
    (folder / "text.txt").write_text("\n\n".join(paragraphs(300, seed=1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        arguments = ["facebook/opt-1.3b", "--calibration", "text.txt", "--evaluate", "text.txt", *SHORTER["prune"]]
        assert main([*arguments, "--output", f"made/{RESULT}", "--quiet"]) == 0
    return folder


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: HubServer, models: Path) -> HubServer:
    """A directory with the models and the text, texts for those of the Hub, and a Hub."""
    for owner in ("facebook", "meta-llama", "mixtral"):
        shutil.copytree(models / owner, tmp_path / owner)
    shutil.copy(models / "text.txt", tmp_path)
    for corpus in ("wikitext2", "c4"):
        text = lambda purpose, corpus=corpus: iter(paragraphs(100, seed=len(corpus + purpose)))  # noqa: E731
        monkeypatch.setitem(readers.HUB_CORPORA, corpus, text)
    monkeypatch.chdir(tmp_path)
    return hub


def bring(models: Path, names: list[str]) -> None:
    """The results that a command or code reads, if the page has not made them."""
    for name in names:
        if not Path(name).exists():
            copied(models / "made" / RESULT, Path(name))


def run(line: str) -> None:
    """One command as it stands on a page, but for `INSTEAD`; shorter, as the tiny models are."""
    for there, here in INSTEAD.items():
        line = line.replace(there, here)
    program, *arguments = shlex.split(line, comments=True)
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", text_of("Makefile"), re.MULTILINE), line
    elif program == "pip":
        assert arguments == ["install", "-e", "."], line
    elif program == "torchrun":
        torchrun = [str(Path(sys.executable).with_name("torchrun")), *arguments, *SHORTER["prune"]]
        subprocess.run([*torchrun, "--calibration", "text.txt", "--no-evaluate"], check=True, capture_output=True)
    elif program == "llama-completion":  # by its wheel, where that is installed
        assert arguments[::2] == ["-m", "-p", "-n"], line
        if PathFinder.find_spec("xllamacpp") is not None:
            (ids,) = ask(Path(arguments[1]), ["tokenize", arguments[3]])
            (new,) = ask(Path(arguments[1]), ["greedy", ids.tolist(), int(arguments[5])])
            assert new.shape == (int(arguments[5]),)
    elif arguments[:2] == ["-m", "pytest"]:
        path, words = arguments[2], arguments[4:]
        assert arguments[3] == "-k", line
        assert re.search(rf"def test_\w*{words[0]}", text_of(path)), line
    elif arguments[:2] == ["-m", "llm_snp"]:
        name = arguments[2] if arguments[2] in ("heal", "push", "report", "bench", "export") else "prune"
        assert main([*arguments[2:], *SHORTER.get(name, [])]) == 0, line
    else:
        assert program == "python", line
        script = ROOT / arguments[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [*arguments, *MORE.get(script.name, [])])
            patch.syspath_prepend(script.parent)
            code = None
            try:
                runpy.run_path(str(script), run_name="__main__")
            except SystemExit as end:
                code = end.code
        assert not code, line


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW))
        for page in PAGES
        if blocks_of(page) and page != FRAGMENTS
    ],
)
def test_commands_and_code_in_their_order(page: str, workplace: HubServer, models: Path, tmp_path: Path) -> None:
    for kind, block in blocks_of(page):
        if kind:
            assert kind == "python", f"{page} has a block of {kind}, which is not tested"
            bring(models, re.findall(r'from_pretrained\("([^"]+)"', block))
            exec(compile(block, page, "exec"), {})
            continue
        for line in filter(COMMAND.match, block.splitlines()):
            if " --sparsity" not in line:
                bring(models, re.findall(r"(?<=[ /])opt-[\w.]+-snp-30", line.replace(f"me/{RESULT}", "")))
            run(line)
    for line in commands_of(page):
        if "push" in line.split():
            assert workplace.repositories[f"{USER}/{RESULT}"].private
        output = re.search(r"--output ([\w.-]+)", line)
        if output and "--sparsity" in line:
            assert (tmp_path / output[1] / "report.html").stat().st_size > 10_000, line
            assert (tmp_path / output[1] / "plots" / "kept.png").is_file(), line
            assert ("--format stock" in line) != bool(list((tmp_path / output[1]).glob("*.py"))), line


def test_what_the_pages_are_for_is_among_the_commands() -> None:
    """And the reader of commands reads them."""
    for page, least in {"README.md": 5, "docs/using.md": 7, "docs/scale.md": 3, "docs/formats.md": 1}.items():
        assert len(commands_of(page)) >= least, page
    everything = "\n".join(line for page in PAGES for line in commands_of(page))
    for command in (
        "export ",
        "push ",
        "report ",
        "bench ",
        "heal ",
        "--resume",
        "--dry-run",
        "torchrun",
        "harness:",
        "quality.py",
    ):
        assert command in everything, command


def test_the_first_visit_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= 150


def test_every_page_can_be_reached() -> None:
    for page in PAGES:
        if page.startswith("docs/") and page != "docs/README.md":
            assert f"]({page})" in text_of("README.md"), page
            assert f"]({page.removeprefix('docs/')})" in text_of("docs/README.md"), page


@pytest.mark.skipif(set(FAMILIES) != set(MODEL_TYPES), reason="this transformers does not have all of them")
def test_the_table_of_models_is_that_of_the_code() -> None:
    support = runpy.run_path(str(ROOT / "docs" / "support.py"))["table"]()
    assert support in text_of("docs/families.md")


def test_the_page_on_families_uses_words_that_exist() -> None:
    words = {cls.__name__: {field.name for field in dataclasses.fields(cls)} for cls in (LlamaLike, Site, Rows, Family)}
    seen = set()
    for kind, block in blocks_of(FRAGMENTS):
        for node in ast.walk(ast.parse(block)) if kind else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in words:
                seen.add(node.func.id)
                assert {word.arg for word in node.keywords} <= words[node.func.id], ast.unparse(node)
    assert seen == set(words)


PACKAGE = ROOT / "llm_snp"


def defined(path: Path) -> set[str]:
    """Names that a module defines: functions, classes, constants, and Class.method, .field and .attribute."""
    names: set[str] = set()

    def targets(node: ast.AST) -> list[ast.expr]:
        if isinstance(node, ast.Assign):
            return node.targets
        return [node.target] if isinstance(node, ast.AnnAssign) else []

    def look(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            names.update(prefix + target.id for target in targets(node) if isinstance(target, ast.Name))
            if isinstance(node, ast.FunctionDef):
                names.add(prefix + node.name)
                for inner in ast.walk(node) if prefix else ():
                    for target in targets(inner):
                        if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                            names.add(prefix + target.attr)
            elif isinstance(node, ast.ClassDef):
                names.add(node.name)
                look(node.body, f"{node.name}.")

    look(ast.parse(path.read_text()).body, "")
    return names


def test_the_page_on_architecture_names_what_exists() -> None:
    page = re.sub(r"^```.*?^```", "", text_of("docs/architecture.md"), flags=re.MULTILINE | re.DOTALL)
    everywhere = set().union(*(defined(path) for path in PACKAGE.rglob("*.py")))
    layers = set(re.findall(r'"(\w+)"', (PACKAGE / "families" / "opt.py").read_text()))
    for token in re.findall(r"`([^`]+)`", page):
        if token.startswith("--"):
            continue  # `test_every_flag_they_name_exists`
        if "/" in token or token.endswith(".py"):
            assert (PACKAGE / token).exists() or (ROOT / token).exists(), token
        else:
            assert token in everywhere | layers, token
    placed = re.findall(r"\| `([\w.]+)` \| `([\w/]+\.py)` \||`([\w.]+)` \(`([\w/]+\.py)`\)", page)
    assert len(placed) > 20
    for a, b, c, d in placed:
        assert (a or c) in defined(PACKAGE / (b or d)), (a or c, b or d)


def test_its_rooms_are_those_of_the_code_in_their_order() -> None:
    diagram = re.findall(r"^  (\w+)  +\w", text_of("docs/architecture.md"), re.MULTILINE)
    assert diagram == list(reversed(ROOMS))


def anchors(page: Path) -> set[str]:
    """As forges make them of headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", text_of(page)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_flag_they_name_exists(capsys: pytest.CaptureFixture[str]) -> None:
    known = set()
    for command in ((), ("heal",), ("push",), ("report",), ("bench",), ("export",)):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        known |= set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    # Of torchrun, accelerate, the benchmarks and vLLM.
    others = {"--nproc-per-node", "--multi", "--cpu", "--runs", "--max-windows", "--json", "--again", "--rows"}
    others |= {"--trust-remote-code", "--model-impl", "--over-dense", "--gone", "--jobs"}
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text_of(page)))
        assert named <= known | others, (page, named - known - others)


# What the forge and the package registries read at the root of the project.


def test_the_licence_is_the_whole_text() -> None:
    text = text_of("LICENSE")
    assert text.split()[:5] == ["Apache", "License", "Version", "2.0,", "January"]
    assert "END OF TERMS AND CONDITIONS" in text
    assert text.rstrip().endswith("limitations under the License.")
    assert 'license = "Apache-2.0"' in text_of("pyproject.toml")


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load(text_of("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors", "type", "license", "references"} <= set(cited)
    assert (cited["cff-version"], cited["type"], cited["license"]) == ("1.2.0", "software", "Apache-2.0")
    version = runpy.run_path(str(ROOT / "llm_snp" / "version.py"))["__version__"]
    assert str(cited["version"]) == version
    assert f"\n## {version}" in text_of("CHANGELOG.md")
    for paper in cited["references"]:
        assert {"type", "title", "authors", "year", "url"} <= set(paper), paper
        assert all("family-names" in author for author in paper["authors"]), paper
    assert any("2405.17506" in paper["url"] for paper in cited["references"])


def test_the_workflow_runs_what_can_be_run_here() -> None:
    jobs = yaml.safe_load(text_of(".github/workflows/ci.yml"))["jobs"]
    steps = {step["run"]: job for job in jobs.values() for step in job["steps"] if "run" in step}
    assert set(steps) == {".ci/run", "make test-slow", "make test-oldest"}
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    pythons = {version for job in jobs.values() for version in job["strategy"]["matrix"]["python"]}
    named = set(re.findall(r"Programming Language :: Python :: (3\.\d+)", text_of("pyproject.toml")))
    assert pythons == named
