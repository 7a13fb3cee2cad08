"""The table, the verdict and the plot of `quality.py`, from its results alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from perplexity import markdown_table
from quality_results import Results, Row

# Rows of the plot, from worst to best: label, marker, line style, grey.
PLOTTED: dict[str, tuple[str, str, str, str]] = {
    "magnitude, no repair": ("magnitude, no repair", "x", ":", "0.4"),
    "greedy, no repair": ("greedy, no repair", "+", "--", "0.4"),
    "snp": ("snp", "s", "-.", "0.0"),
    "random": ("random, repaired", "v", ":", "0.0"),
    "greedy": ("greedy, repaired", "^", "--", "0.0"),
    "+ target residual": ("+ target residual", "D", "-.", "0.4"),
    "+ dims": ("+ dims", "P", "-", "0.5"),
    "best": ("best", "o", "-", "0.0"),
}
# Where a logarithmic axis has ticks, in each decade.
NARROW_TICKS = (1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)
WIDE_TICKS = (1.0, 2.0, 5.0)
LISTED = 5  # at most so many rows below `best` are named


def cells(
    results: Results, rows: Sequence[Row], sparsities: Sequence[float], markdown: bool, over_dense: bool = False
) -> list[list[str]]:
    """The table: a line per row, under its group; the lowest perplexity of each column is marked.

    With `over_dense` nats per token over the dense model in place of perplexities, and how many times as fast as the
    dense model the result is (`Results.faster`); where that was measured by `bench`, in each cell for decoding.
    """
    corpora = list(results.data["corpora"])
    columns = [(sparsity, corpus) for sparsity in sparsities for corpus in corpora]
    values = {(row.name, *column): results.value(row, *column) for row in rows for column in columns}
    lowest = {c: min((v for (_, *at), v in values.items() if tuple(at) == c and v), default=None) for c in columns}
    marked, plain = ("**{}**", "{}") if markdown else ("{}*", "{} ")

    def number(value: float, corpus: str) -> str:
        return f"{math.log(value / results.data['dense'][corpus]):.3f}" if over_dense else f"{value:,.2f}"

    text = {key: number(value, key[2]) if value else "-" for key, value in values.items()}
    dense = {corpus: f"{results.data['dense'][corpus]:,.2f}" for corpus in corpora}
    # Values of a corpus are equally wide, so that the slashes are below each other.
    wide = {
        corpus: max(map(len, [dense[corpus], *(t for k, t in text.items() if k[2] == corpus)])) for corpus in corpora
    }

    def joined(shown: dict[str, str], best: Iterable[str] = ()) -> str:
        return " / ".join(
            (marked if corpus in best else plain).format(value if markdown else value.rjust(wide[corpus]))
            for corpus, value in shown.items()
        )

    def cell(row: Row, sparsity: float) -> str:
        best = [c for c in corpora if lowest[sparsity, c] and values[row.name, sparsity, c] == lowest[sparsity, c]]
        speed = (results.find(row, sparsity) or {}).get("speed")
        beside = f" ×{speed['decode']:.2f}" if over_dense and speed else ""
        return joined({corpus: text[row.name, sparsity, corpus] for corpus in corpora}, best) + beside

    lines = [
        ["", *(f"{100 * s:g} %{'' if markdown else ' '}" for s in sparsities), "seconds", *["speed"] * over_dense],
        ["dense, perplexity" if over_dense else "dense", *[joined(dense) for _ in sparsities], "", *[""] * over_dense],
    ]
    group = ""
    for row in rows:
        if row.group != group:
            group = row.group
            lines.append([f"*{group}*" if markdown else group, *["" for _ in lines[0][1:]]])
        seconds = results.seconds(row, sparsities)
        name = row.name if markdown else f"  {row.name}"
        lines.append([name, *(cell(row, s) for s in sparsities), f"{seconds:.1f}" if seconds is not None else "-"])
        if over_dense:
            faster = results.faster(row, sparsities)
            lines[-1].append(f"{faster:.2f}" if faster is not None else "-")
    return lines


def verdict(results: Results, rows: Sequence[Row], sparsities: Sequence[float]) -> list[str]:
    """Whether `best` is at or below every other row, what it costs, and what else a reader must know."""
    by_name = {row.name: row for row in rows}
    lines = []
    if "best" in by_name:
        best = by_name["best"]
        for sparsity in sparsities:
            lines.append(f"{100 * sparsity:g} %: " + _against(results, best, rows, sparsity))
    if {"best", "snp"} <= by_name.keys():
        best_seconds, snp_seconds = (results.seconds(by_name[name], sparsities) for name in ("best", "snp"))
        if best_seconds and snp_seconds:
            ratio = best_seconds / snp_seconds
            lines.append(f"time: best {best_seconds:.1f} s, snp {snp_seconds:.1f} s: {ratio:.2f} times as long")
    shown = [(row, s, found) for row in rows for s in sparsities if (found := results.find(row, s))]
    lines += [f"not measured: {row.name}, {s:g}: {found['error']}" for row, s, found in shown if "error" in found]
    old = sum(found["code"] != results.data["code"] for _, _, found in shown)
    if old:
        lines.append(f"{old} of {len(shown)} results were measured with other code of llm_snp than there is now")
    return lines


def _against(results: Results, best: Row, rows: Sequence[Row], sparsity: float) -> str:
    """How `best` compares with all rows that are something else, at one budget."""
    below = []
    for corpus in results.data["corpora"]:
        value = results.value(best, sparsity, corpus)
        if value is None:
            return "best was not measured"
        for row in rows:
            other = results.value(row, sparsity, corpus)
            if other is not None and other < value and row.choices != best.choices:
                below.append((other / value - 1, f"{row.name} ({other / value - 1:+.2%} on {corpus})"))
    if not below:
        return "best is at or below every other row"
    named = [text for _, text in sorted(below)]
    more = f" and {len(named) - LISTED} more" if len(named) > LISTED else ""
    return "below best: " + ", ".join(named[:LISTED]) + more


def markdown(results: Results, rows: Sequence[Row], sparsities: Sequence[float], over_dense: bool = False) -> str:
    """The table with where it comes from; over_dense: see `cells`."""
    data = results.data
    table = cells(results, rows, sparsities, True, over_dense)
    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    device, date = data["device"], max(result["date"] for result in data["results"])
    lines = [
        f"# Quality on {data['model']['name']}",
        "",
        f"{heading(data, over_dense)} Lowest value of a column in bold; seconds: median over budgets, pruning only.",
        "",
        markdown_table(table, "---:"),
        "",
        *(f"- {line}" for line in verdict(results, rows, sparsities)),
        "",
        f"{date}, {device['name']}, {device['dtype']}, {device['threads']} threads; {versions}, code {data['code']}.",
        "",
        *(f"    {command}" for command in data["commands"]),
    ]
    return "\n".join(lines) + "\n"


def heading(data: dict[str, Any], over_dense: bool = False) -> str:
    """What the table shows, in a sentence or two; over_dense: see `cells`."""
    c = data["calibration"]
    corpora = " / ".join(f"{name} ({corpus['windows']} windows)" for name, corpus in data["corpora"].items())
    what = "Loss over dense, nats per token," if over_dense else "Perplexity"
    speed = " Speed: dense over pruned seconds for these windows." if over_dense else ""
    if over_dense and any("speed" in result for result in data["results"]):
        speed = " Speed: dense over pruned seconds of a prefill, measured in turn; ×: of decoding, at each budget."
    return (
        f"{what} on {corpora}, calibrated on {c['windows']} windows of {c['sequence_length']} tokens of "
        f"{c['source']}, seed {c['seed']}.{speed}"
    )


def plot(results: Results, rows: Sequence[Row], file: Path) -> None:
    """Perplexity against the share removed, a panel per corpus, to be read in black and white and on a phone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    corpora, by_name = list(results.data["corpora"]), {row.name: row for row in rows}
    figure, axes = pyplot.subplots(len(corpora), 1, figsize=(6.4, 1.4 + 4.6 * len(corpora)), sharex=True, squeeze=False)
    for axis, corpus in zip(axes[:, 0], corpora, strict=True):
        dense = results.data["dense"][corpus]
        for name, (label, marker, style, grey) in PLOTTED.items():
            row = by_name[name]
            known = [r for r in results.data["results"] if r["choices"] == row.choices and "perplexity" in r]
            points = sorted((100 * r["achieved"], r["perplexity"][corpus]) for r in known)
            if points:
                x, y = zip((0.0, dense), *points, strict=True)
                axis.plot(x, y, label=label, marker=marker, linestyle=style, color=grey, linewidth=2, markersize=8)
        axis.axhline(dense, label="dense", color="0.6", linewidth=1, zorder=0)
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=WIDE_TICKS if high > 4 * low else NARROW_TICKS))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_ylabel(f"perplexity, {corpus}", fontsize=14)
        axis.tick_params(labelsize=13)
        axis.grid(color="0.9")
    axes[-1, 0].set_xlabel("parameters of the blocks removed, %", fontsize=14)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", ncols=2, fontsize=13, frameon=False, handlelength=3)
    lines = math.ceil(len(names) / 2)
    figure.tight_layout(rect=(0, 0, 1, 1 - (0.28 * lines + 0.15) / figure.get_figheight()))
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
