"""Who may import whom, read from the source."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import llm_snp
from llm_snp import config
from llm_snp.config import ATTENTION_MODES, METHODS
from llm_snp.core.allocation import ALLOCATIONS
from llm_snp.core.orders import ORDERS
from llm_snp.families import FAMILIES, OWN

PACKAGE = Path(llm_snp.__file__).parent
MODULES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}
CORE = sorted(name for name in MODULES if name.startswith("core/"))
MODELING = sorted(name for name in MODULES if name.startswith("modeling/"))
# What the descriptions of families are written in.
VOCABULARY = {f"families/{name}" for name in ("sites", "attention", "base", "checks", "grouped", "left", "mixture")}
FAMILY_FILES = sorted(name for name in MODULES if name.startswith("families/"))


def imports(name: str) -> set[str]:
    """What a module imports: "core/moments" for its own package, "torch" (the top) for others."""
    found = imported(MODULES[name])
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            folder = PACKAGE.joinpath(name).parents[node.level - 1].relative_to(PACKAGE)
            target = (folder / (node.module or "").replace(".", "/")).as_posix()
            if target in MODULES:
                found.add(target)
            else:  # a package: its modules, or names of its __init__
                for alias in node.names:
                    module = (Path(target) / alias.name).as_posix()
                    found.add(module if module in MODULES else (Path(target) / "__init__").as_posix())
    return found


def imported(path: Path) -> set[str]:
    """The tops ("torch" of "torch.nn") of what a file imports by absolute names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


def code(name: str) -> str:
    """The source without comments and docstrings."""
    tree = ast.parse(MODULES[name].read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            node.body = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    return ast.unparse(tree)


def own(name: str) -> set[str]:
    return imports(name) & set(MODULES)


def foreign(name: str) -> set[str]:
    standard = {*__import__("sys").stdlib_module_names, "__future__"}
    return imports(name) - set(MODULES) - standard


def test_the_reader_of_imports_reads_them() -> None:
    assert {"core/moments", "families/__init__", "errors"} <= own("pruning/calibrate")
    assert "version" in own("documents/report")
    assert "torch" in foreign("core/moments")


@pytest.mark.parametrize("name", CORE)
def test_core_is_numerics_only(name: str) -> None:
    assert foreign(name) <= {"torch", "numpy"} | ({"triton"} if name == "core/elimination_kernels" else set())
    assert all(module.startswith("core/") or module == "errors" for module in own(name))


@pytest.mark.parametrize("name", MODELING)
def test_what_travels_with_a_result_stands_alone(name: str) -> None:
    assert foreign(name) <= {"torch", "transformers"}
    assert own(name) <= {"modeling/narrowing", "modeling/rotary", "modeling/mixture"}


def test_errors_need_nothing() -> None:
    assert imports("errors") <= {"__future__", "difflib", "collections"}


def test_the_card_reads_only_the_report() -> None:
    parts = {"documents/card_metadata", "documents/markdown"}
    assert own("documents/card") == {"documents/shareable", "documents/healing", "documents/steps", *parts}
    assert set().union(*map(own, parts)) == {"documents/shareable"}
    for words in ("documents/healing", "documents/steps"):
        assert not own(words) | foreign(words)
    assert own("documents/shareable") == {"config", "system/plain", "system/private"}
    for part in ("documents/card", *parts):
        assert foreign(part) <= {"huggingface_hub"}


@pytest.mark.parametrize("name", OWN)
def test_a_family_is_a_short_file(name: str) -> None:
    file = f"families/{name}"
    assert len(MODULES[file].read_text().splitlines()) < 60
    assert own(file) <= {*VOCABULARY, "errors", f"modeling/{name}"}


def test_a_family_is_a_short_file_or_a_row() -> None:
    assert own("families/llama_like") <= VOCABULARY
    assert not own("families/gguf") | foreign("families/gguf")  # what an engine knows of them: data alone
    described = {f"families/{name}" for name in ("__init__", "registration", "llama_like", "gguf", *OWN)}
    assert set(FAMILY_FILES) == described | VOCABULARY


def test_what_people_read_is_made_from_the_report_only() -> None:
    tree = ast.parse(MODULES["documents/summary"].read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    reads = {"before", "harness_rows", "healing_line", "printable", "speed_table", "steps_lines"}
    allowed = {*functions, *dir(__builtins__), "Any", "Path", "Report", *reads}
    for name in ("summary", "block_line", "relative_error"):
        function = functions[name]
        local = {arg.arg for arg in ast.walk(function) if isinstance(arg, ast.arg)}
        local |= {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        used = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        assert used <= allowed | local | set(dir(__import__("builtins"))), name


def test_the_executor_names_no_family_and_no_criterion() -> None:
    source = MODULES["pruning/executor"].read_text().lower()
    names = {*FAMILIES, *ORDERS, *ALLOCATIONS, *METHODS, *ATTENTION_MODES, "llama", "q_proj", "fc1", "fc2"}
    # `dims`, `heads`, `queries` and `both` are units and modes of every family; `auto`, variance and loss are words.
    names -= {
        "auto",
        "dims",
        "heads",
        "queries",
        "both",
        "none",
        "loss",
        "variance",
        "random",
        "energy",
        "best",
        "uniform",
    }
    assert {"opt", "zca", "greedy"} <= names
    for name in names:
        assert not re.search(rf"(?<![a-z]){re.escape(name)}(?![a-z])", source), name
    assert not any(module.startswith("core/orders") or module == "families/opt" for module in own("pruning/executor"))


def test_names_of_choices_are_those_of_the_tables() -> None:
    """`config` has them a second time, as the tables need torch."""
    assert tuple(ORDERS) == config.ORDERS
    assert tuple(ALLOCATIONS) == config.ALLOCATIONS


def test_only_families_know_a_family() -> None:
    for name in MODULES:
        if name.startswith(("families/", "modeling/")):
            continue
        assert not own(name) & {*FAMILY_FILES} - {"families/__init__", "families/registration"}, name
        assert not own(name) & {*MODELING}, name
        assert not re.search(r"\b(OPTConfig|OPTForCausalLM|q_proj|k_proj|v_proj|fc1|fc2)\b", code(name)), name


# From the bottom to the top: the way of the data, from the dense checkpoint to what people read about the smaller one.
# A room may import the rooms named beside it, itself, and `errors`.
ROOMS: dict[str, set[str]] = {
    "system": set(),
    "core": set(),
    "modeling": set(),
    "families": {"modeling"},
    "dense": {"families", "core", "system"},
    "pruning": {"dense", "families", "core", "system"},
    "evaluation": {"pruning", "dense", "families", "core", "system"},
    "documents": {"evaluation", "pruning", "dense", "families", "core", "system"},
    "result": {"documents", "evaluation", "pruning", "dense", "families", "core", "system"},
    "healing": {"result", "documents", "evaluation", "pruning", "dense", "families", "core", "system"},
    "running": {"result", "documents", "evaluation", "pruning", "dense", "families", "core", "system"},
    "commands": {
        "running",
        "healing",
        "result",
        "documents",
        "evaluation",
        "pruning",
        "dense",
        "families",
        "core",
        "system",
    },
}
# Beside the rooms, and who may import them.
DOOR = {"__init__", "__main__", "cli", "config", "errors", "search_path", "version"}
OPTIONS = {"dense", "pruning", "evaluation", "documents", "result", "healing", "running", "commands"}
VERSION = {"documents", "result", "healing", "running"}


def room_of(name: str) -> str:
    return name.split("/")[0]


def test_every_module_has_a_room() -> None:
    assert {name for name in MODULES if "/" not in name} == DOOR
    assert {room_of(name) for name in MODULES} == {*ROOMS, *DOOR}
    for room in ROOMS:
        docstring = ast.get_docstring(ast.parse(MODULES[f"{room}/__init__"].read_text()))
        assert docstring, f"{room} does not say what belongs there"


def test_imports_point_downwards() -> None:
    order = list(ROOMS)
    for room, below in ROOMS.items():
        assert all(order.index(other) < order.index(room) for other in below), room
    allowed = {room: {room, "errors", *below} for room, below in ROOMS.items()}
    for room in OPTIONS:
        allowed[room].add("config")
    for room in VERSION:
        allowed[room].add("version")
    allowed |= {
        "errors": set(),
        "version": set(),
        "search_path": set(),
        "config": {"errors", "system"},
        # `llm_snp.prune` imports the run when it is called.
        "__init__": {"errors", "search_path", "version", "system", "families", "config", "running"},
        "cli": {"__init__", "errors", "system"},
        "__main__": {"cli"},
    }
    for name in MODULES:
        for module in own(name):
            assert room_of(module) in allowed[room_of(name)], f"{name} imports {module}"


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Those that import each other, directly or not, and who imports them."""
    while leaves := {name for name, needs in graph.items() if not needs & graph.keys()}:
        graph = {name: needs - leaves for name, needs in graph.items() if name not in leaves}
    return sorted(graph)


def test_no_circles() -> None:
    graph = {name: own(name) - ({"config", "running/run"} if name == "__init__" else set()) for name in MODULES}
    assert not circle(graph), "these import each other"


def test_no_circles_in_the_benchmarks() -> None:
    """Also none for annotations only."""
    scripts = {path.stem: imported(path) for path in (PACKAGE.parent / "benchmarks").glob("*.py")}
    assert "perplexity" in scripts["quality"]
    assert circle({"a": {"b"}, "b": {"a"}, "c": {"a"}, "d": {"torch"}}) == ["a", "b", "c"]
    assert not circle(scripts), "these import each other"


# Calls and names that came after torch 2.6, the oldest that is supported, and the module that asks whether they are
# there. Most would sit where a GPU or a type decides, which no test on the CPU runs.
NEWER = {
    "out_dtype": "core/moments",  # of products, 2.8; `_gives_sums` asks
    "fp32_precision": None,  # of backends, 2.9
    "grouped_mm": None,  # 2.10
    "float8_e8m0fnu": None,  # 2.7
    "float4_e2m1fn_x2": None,  # 2.8
    "host_memory_stats": None,  # 2.7
    "varlen_attn": None,  # 2.10
}


@pytest.mark.parametrize("name", NEWER)
def test_nothing_is_called_that_the_oldest_torch_has_not(name: str) -> None:
    found = {module for module in MODULES if re.search(rf"\b_?{name}\b", code(module))}
    assert found == ({NEWER[name]} if NEWER[name] else set())
