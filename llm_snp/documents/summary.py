"""What a person sees in the terminal: a line for each block, and the table at the end; from the report alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..evaluation.harness_table import harness_rows
from ..evaluation.speed_table import speed_table
from .healing import healing_line
from .shareable import before, printable
from .steps import steps_lines


def relative_error(site: dict[str, Any]) -> float | None:
    """Lost output energy as a share of the total; None for what has no error of its own."""
    if site["lost"] is None:
        return None
    return site["lost"] / site["total"] if site["total"] else 0.0


def block_line(data: dict[str, Any]) -> str:
    """`block 3/24  heads 9/12  neurons 2100/3072  error: attention 1.2%, mlp 3.4%`"""
    entry = data["blocks"][-1]
    sites = {name: value for name, value in entry.items() if name != "block"}
    total = len(data["plan"]["kept"])
    kept = "  ".join(f"{s['unit']} {s['kept']}/{s['units']}" for s in sites.values())
    found = {name: relative_error(s) for name, s in sites.items()}
    errors = ", ".join(f"{name} {error:.2%}" for name, error in found.items() if error is not None)
    return f"block {entry['block'] + 1:>{len(str(total))}}/{total}  {kept}  error: {errors}"


def summary(data: dict[str, Any], own_code: bool = True) -> str:
    """The table at the end of a run; each text of the report, which may be a stranger's, is within one line.

    own_code: whether code that lies beside the weights, or that settings name, is this version's, and nobody else's.
    """
    data = printable(data)
    model, sparsity = data["model"], data["sparsity"]
    rows = [
        ("", before(data), "pruned", "change"),
        _row("parameters", model["parameters"], model["parameters_pruned"], "{:,.0f}"),
        _row("size on disk, MB", model["bytes"] / 1e6, model["bytes_pruned"] / 1e6, "{:,.1f}"),
    ]
    for source, result in data["evaluation"].items():
        dense, pruned = result["dense"]["perplexity"], result["pruned"]["perplexity"]
        rows.append(_row(f"perplexity, {Path(source).name}", dense, pruned, "{:,.2f}"))
    rows += harness_rows(data.get("harness", {}))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
    trust = ", trust_remote_code=True" if model.get("custom_code", True) else ""
    lines += ["", *speed_table(data["speed"])] if "speed" in data else []
    lines += [
        "",
        f"removed  {sparsity['achieved']:.2%} of the blocks' linear parameters ({sparsity['asked']:.2%} asked), "
        f"{sparsity['of_all_parameters']:.2%} of all"
        + (f"; {sparsity['of_dense']:.2%} of the dense model's blocks in all" if "of_dense" in sparsity else ""),
        *_overfit(data),
        *(f"steps    {line}" for line in steps_lines(data)),
        *(f"healed   {healing_line(step)}" for step in data.get("healing", [])),
        "seconds  " + ", ".join(f"{name} {value:.1f}" for name, value in data["seconds"].items()),
        *(f"note     {note}" for note in data["notes"]),
        f"result   {data['output']}",
        *_how_to_load(data["output"], trust, own_code or not trust),
    ]
    return "\n".join(lines)


def _how_to_load(directory: str, trust: str, own_code: bool) -> list[str]:
    if own_code:
        return [f"load it  AutoModelForCausalLM.from_pretrained({directory!r}{trust})"]
    return [
        "code     there is not what this version writes, or leads elsewhere: trust_remote_code=True would run it",
        f"load it  import llm_snp; AutoModelForCausalLM.from_pretrained({directory!r})",
    ]


def _overfit(data: dict[str, Any]) -> list[str]:
    """By how much more is lost on windows that were not calibrated on."""
    measured = data.get("overfit", [])
    if len(measured) != 2:
        return []
    fitted, unseen = (one["loss"] for one in measured)
    return [
        f"over-fit {unseen - fitted:+.3f} nats a token: {fitted:.3f} over {before(data)} on windows that were "
        f"calibrated on, {unseen:.3f} on others of the same text"
    ]


def _row(name: str, dense: float, pruned: float, style: str) -> tuple[str, str, str, str]:
    return name, style.format(dense), style.format(pruned), f"{pruned / dense - 1:+.1%}" if dense else ""
