"""One file from a module and those beside it that it imports, for a result to carry.

transformers before 5 cannot load a module that imports its neighbours from a directory whose name has a dot in it, as
`opt-1.3b-snp-30` has.
"""

from __future__ import annotations

import ast
from pathlib import Path


def bundle(source: Path) -> str:
    """The text of a module after that of its neighbours, each once and before what needs it."""
    parts: dict[Path, str] = {}
    _take(source, parts)
    text = parts.pop(source)
    docstring = ast.get_docstring(ast.parse(text), clean=False)
    names = ", ".join(path.name for path in (*parts, source))
    body = text.partition('"""')[2].partition('"""')[2]
    head = f'"""{docstring}"""\n\n# Of llm_snp: {names}\n\nfrom __future__ import annotations\n'
    return "\n\n".join([head, *(part.strip("\n") for part in parts.values()), body.strip("\n")]) + "\n"


def _take(path: Path, parts: dict[Path, str]) -> None:
    """Add a module to `parts`, its neighbours first."""
    text = path.read_text(encoding="utf-8")
    lines: list[str | None] = list(text.splitlines())
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom) and (node.level == 1 or node.module == "__future__"):
            if node.level == 1:
                neighbour = path.with_name(f"{node.module}.py")
                if neighbour not in parts:
                    _take(neighbour, parts)
            for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[number] = None
    parts[path] = "\n".join(line for line in lines if line is not None)
