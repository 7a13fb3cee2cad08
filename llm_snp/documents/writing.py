"""The documents of a finished result: model card, page, plots, and the report that they are made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..system.files import digest, disk, write_json, write_text
from ..system.workspace import REPORT, expect_result
from .card import model_card
from .page import html_page
from .plots import FOLDER, PLOTS, write_plots
from .report import FORMAT

CARD = "README.md"
PAGE = "report.html"
# What every reader of a report relies on.
NEEDED = ("model", "sparsity", "plan", "blocks", "evaluation", "calibration", "options", "seconds", "output")


def write_documents(directory: Path, report: dict[str, Any]) -> list[Path]:
    """Write plots/*.png, report.html, README.md and report.json; returns the paths of what was written.

    A README.md that a person has edited since it was written here is left alone; `report["card"]`, which is set, is
    the hash that tells. Raises `OutputError` if the disk does not take them.
    """
    plots = write_plots(report, directory)
    with disk(directory / FOLDER):
        for name in PLOTS:
            path = directory / FOLDER / f"{name}.png"
            if path not in plots:
                path.unlink(missing_ok=True)
    page, card = directory / PAGE, directory / CARD
    write_text(page, html_page(report))
    written = [*plots, page]
    if not _edited(card, report):
        titles = [(PLOTS[path.stem].title, f"{FOLDER}/{path.name}") for path in plots]
        write_text(card, model_card(report, plots=titles))
        report["card"] = digest(card)
        written.append(card)
    write_json(directory / REPORT, report)  # last: a directory with it is a result
    return [*written, directory / REPORT]


def _edited(card: Path, report: dict[str, Any]) -> bool:
    """Whether the card is not what was written here. One without a report beside it is of a run that was killed."""
    with disk(card):
        finished = card.exists() and card.with_name(REPORT).exists()
        return finished and digest(card) != report.get("card")


def read_report(directory: Path) -> dict[str, Any]:
    """The report of a result. Raises `CheckpointError` if `directory` is none that this llm_snp can read."""
    path, advice = directory / REPORT, "give the directory that a run of llm_snp has written"
    expect_result(directory)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); {advice}") from error
    versions = report.get("versions") if isinstance(report, dict) else None
    if not isinstance(versions, dict) or "llm_snp" not in versions or not isinstance(report.get("format"), int):
        raise CheckpointError(f"{path} is no report of llm_snp; {advice}")
    if report["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {report['format']}, of llm_snp {versions['llm_snp']}; this llm_snp knows {FORMAT} and "
            "older: install a newer one"
        )
    missing = [key for key in NEEDED if key not in report]
    if missing:
        raise CheckpointError(f"{path} is damaged: it lacks {', '.join(missing)}; prune again, or restore the file")
    # Earlier reports do not say it.
    report["model"].setdefault("custom_code", any(directory.glob("modeling_*.py")))
    return report
