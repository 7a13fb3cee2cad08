"""The single plots of a report: narrow, and to be told apart by line style, marker and filling, not colour alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .comparison import comparisons, duration
from .shareable import before
from .summary import relative_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 3.6  # inches; at 100 pixels per inch this is what a phone shows, and 8 points are 11 pixels
DARK, LIGHT, ACCENT = "#14375e", "#9dbce0", "#b8561b"
SOLID: dict[str, Any] = {"width": 0.72, "color": DARK, "edgecolor": DARK, "linewidth": 0.8}
OUTLINED: dict[str, Any] = SOLID | {"color": "white", "edgecolor": ACCENT}
DENSE: dict[str, Any] = {"facecolor": "white", "edgecolor": "0.35", "linewidth": 0.8}
# Of the blocks where there are few: line style and colour.
LINES = (("-", DARK), ("--", ACCENT), ("-.", "black"), (":", "0.4"))
CUT: dict[str, Any] = {"linestyle": "", "marker": "o", "mfc": "white", "mec": "black", "mew": 0.9}
BESIDE_TITLE: dict[str, Any] = {
    "loc": "lower right",
    "bbox_to_anchor": (1, 1),
    "borderaxespad": 0.2,
    "handlelength": 1.4,
}
TICKS = 8  # at most so many blocks are numbered
ROWS = 12  # so many benchmarks are compared; the page has a table of all
FAR = 1.6  # times the dense model's number
LABEL = 24  # characters of a text's or benchmark's name


def site_names(report: dict[str, Any]) -> list[str]:
    """The sites that blocks have, in the order in which they are pruned."""
    fullest_first = sorted(report["blocks"], key=len, reverse=True)  # not every block has all
    return list(dict.fromkeys(name for block in fullest_first for name in block if name != "block"))


def _figure(height: float, rows: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, 1, squeeze=False, **options)[:, 0])


def _block_axes(panels: list[Axes], count: int) -> None:
    """Blocks along x, numbered below the last panel; the bars of a few are no wider than they have to be."""
    step = 1
    while count / step > TICKS:
        step *= 2
    room = max(0.0, (4 - count) / 2)
    for axes in panels:
        axes.set_xlim(-0.6 - room, count - 0.4 + room)
        axes.set_xticks(range(0, count, step))
        axes.set_xlabel("block")
        axes.grid(axis="y")
        axes.label_outer()


def _percent(axis: Any, ticks: int = 5) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.6g}%"))


def kept(report: dict[str, Any]) -> Figure | None:
    """Share of the units that each block keeps, a panel per site; heads are outlined, what is finer is solid."""
    names = site_names(report)
    if not names:
        return None
    figure, panels = _figure(0.5 + 1.2 * len(names), len(names), sharex=True)
    for axes, name in zip(panels, names, strict=True):
        sites = [(block["block"], block[name]) for block in report["blocks"] if name in block]
        units = sorted({site["unit"] for _, site in sites})
        for unit in units:
            shares = {block: site["kept"] / site["units"] for block, site in sites if site["unit"] == unit}
            axes.bar(list(shares), list(shares.values()), **(OUTLINED if unit == "heads" else SOLID), label=unit)
        axes.set_ylim(0, 1.03)
        axes.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
        axes.set_title(f"{name}, {' or '.join(units)}")
        if len(units) > 1:
            axes.legend(**BESIDE_TITLE, ncols=len(units))
    _block_axes(panels, len(report["blocks"]))
    return figure


def errors(report: dict[str, Any]) -> Figure | None:
    """Relative error of each block, a panel per site, all to one scale."""
    sites = {name: [(b["block"], b[name]) for b in report["blocks"] if name in b] for name in site_names(report)}
    if not any(site["total"] for members in sites.values() for _, site in members):
        return None
    errors = {
        name: {block: error for block, site in members if (error := relative_error(site)) is not None}
        for name, members in sites.items()
    }
    found = {name: lost for name, lost in errors.items() if lost}
    figure, panels = _figure(0.5 + 1.2 * len(found), len(found), sharex=True, sharey=True)
    for axes, (name, lost) in zip(panels, found.items(), strict=True):
        axes.bar(list(lost), list(lost.values()), **SOLID)
        _percent(axes.yaxis, 4)
        axes.set_title(name)
    panels[0].set_ylim(bottom=0)  # of all; not before they are drawn, or the highest would be cut off
    _block_axes(panels, len(report["blocks"]))
    return figure


def _value_at(curve: dict[str, Any], values: list[float], kept: int) -> float:
    """A curve between the counts at which it is stored; along the line that a logarithmic axis shows."""
    at = curve["at_kept"]
    i = next(i for i, count in enumerate(at) if count >= kept)
    if at[i] == kept:
        return values[i]
    weight = (kept - at[i - 1]) / (at[i] - at[i - 1])
    if min(values[i - 1], values[i]) > 0:
        return math.exp((1 - weight) * math.log(values[i - 1]) + weight * math.log(values[i]))
    return (1 - weight) * values[i - 1] + weight * values[i]


def curves(report: dict[str, Any]) -> Figure | None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    plan, count = report["plan"], len(report["plan"]["kept"])
    measure = "variance" if plan["allocation"] == "variance" else "loss"
    curves = [curve for curve in plan["curves"] if any(value > 0 for value in curve.get(measure, ()))]
    if not curves:
        return None
    names = list(dict.fromkeys(curve["site"] for curve in curves))
    few = count <= len(LINES)
    size = 4 if few else 3
    shades = LinearSegmentedColormap.from_list("depth", [LIGHT, DARK])

    def line(block: int) -> dict[str, Any]:
        if few:
            return {"linestyle": LINES[block][0], "color": LINES[block][1], "linewidth": 1.2}
        return {"color": shades(block / (count - 1)), "linewidth": 0.9}

    figure, panels = _figure(0.8 + 1.55 * len(names), len(names), sharex=True, sharey=True)
    for axes, name in zip(panels, names, strict=True):
        for curve in (curve for curve in curves if curve["site"] == name):
            kept = plan["kept"][curve["block"]][curve["unit"]]
            cut = _value_at(curve, curve[measure], kept)
            points = sorted({*zip(curve["at_kept"], curve[measure], strict=True), (kept, cut)})
            shown = [(k / curve["units"], value) for k, value in points if value > 0]
            axes.plot(*zip(*shown, strict=True), **line(curve["block"]))
            if cut > 0:
                axes.plot(kept / curve["units"], cut, **CUT, ms=size, zorder=3)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_locator(NullLocator())
        # Not 10⁻³: on a phone an exponent is too small to read.
        exponent = FuncFormatter(lambda value, _: f"1e{round(math.log10(value))}" if value else "0")
        axes.yaxis.set_major_formatter(exponent)
        axes.set_xlim(0, 1.02)
        _percent(axes.xaxis)
        axes.grid()
        axes.set_title(name)
        axes.set_ylabel("loss" if measure == "loss" else "variance lost")
    panels[-1].set_xlabel("share kept")
    labelled = range(count) if few else (0, count - 1)
    handles = [Line2D([], [], label=f"block {block}", **line(block)) for block in labelled]
    handles.append(Line2D([], [], **CUT, ms=size, label="the cut"))
    figure.legend(handles=handles, loc="outside lower left", ncols=3)
    return figure


def change(report: dict[str, Any]) -> Figure:
    from matplotlib.patches import Patch

    groups = {group: rows[:ROWS] for group, rows in comparisons(report).items()}
    counts = [len(rows) + 0.2 for rows in groups.values()]
    figure, panels = _figure(0.6 + 0.5 * len(counts) + 0.4 * sum(counts), len(counts), height_ratios=counts)
    for axes, (group, rows) in zip(panels, groups.items(), strict=True):
        across = axes.get_yaxis_transform()
        for y, row in enumerate(rows):
            label = row.label if len(row.label) <= LABEL else row.label[: LABEL - 1] + "…"
            axes.text(0, y - 0.28, label, transform=across, va="bottom")
            values = f"{row.dense} → {row.pruned}\u00a0 {row.change}".strip()  # an SVG shows only one of two spaces
            axes.text(1, y - 0.28, values, transform=across, va="bottom", ha="right")
            if row.ratio is not None:
                axes.barh(y, 1, height=0.44, **DENSE)
                axes.barh(
                    y, row.ratio, height=0.22, color=DARK, xerr=row.error, error_kw={"ecolor": ACCENT, "capsize": 3}
                )
        axes.set_ylim(len(rows) - 0.65, -0.65)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        _percent(axes.xaxis)
        axes.set_title(group, pad=4)
    # One scale for all, so that the dense bars are below each other; what is far off has one of its own.
    limits = [max(axes.get_xlim()[1], 1.02) for axes in panels]
    common = max(limit for limit in (*limits, 1.02) if limit <= FAR)
    for axes, limit in zip(panels, limits, strict=True):
        axes.set_xlim(0, max(limit, common))
    first = before(report)
    panels[-1].set_xlabel("share of the dense model's" if first == "dense" else "share of what it was before")
    handles = [Patch(label=first, **DENSE), Patch(label="pruned", color=DARK)]
    panels[0].legend(handles=handles, **BESIDE_TITLE, ncols=2)
    return figure


def steps(report: dict[str, Any]) -> Figure | None:
    """1 - CKA of both candidates of every step with their parent, of what was taken also with the first model."""
    from matplotlib.ticker import MaxNLocator

    steps = report.get("steps", [])
    if not steps:
        return None
    figure, (axes,) = _figure(2.3)
    for name, marker, color, label in (("layer", "s", ACCENT, "without a layer"), ("units", "o", DARK, "fewer units")):
        found = {number: 1 - step[name]["to_parent"] for number, step in enumerate(steps, 1) if step[name]}
        axes.plot(list(found), list(found.values()), linestyle="", marker=marker, color=color, ms=4, label=label)
    taken = [(number, step[step["taken"]]) for number, step in enumerate(steps, 1)]
    numbers = [number for number, _ in taken]
    ring = CUT | {"mfc": "none"}
    axes.plot(numbers, [1 - found["to_parent"] for _, found in taken], **ring, ms=9, label="taken")
    far = [1 - found["to_dense"] for _, found in taken]
    axes.plot(numbers, far, linestyle=":", color="0.35", linewidth=1.2, label="in all")
    axes.set_ylim(bottom=0)
    axes.set_xlim(0.5, len(steps) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(TICKS, integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("1 - CKA")
    axes.grid(axis="y")
    figure.legend(loc="outside lower left", ncols=2)
    return figure


def healing(report: dict[str, Any]) -> Figure | None:
    """The curve of each healing over the tokens that were trained on, a panel for each."""
    steps = [step for step in report.get("healing", []) if step["curve"]]
    if not steps:
        return None
    figure, panels = _figure(0.4 + 1.6 * len(steps), len(steps))
    for axes, step in zip(panels, steps, strict=True):
        each, after = step["tokens"] / step["steps"] / 1e6, step["held_out"]["after"]
        at = [each * entry["step"] for entry in step["curve"]]
        axes.plot(at, [entry["kl"] for entry in step["curve"]], color=DARK, linewidth=1.2, marker=".", markersize=4)
        axes.plot(each * after["step"], after["kl"], **CUT, ms=5)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("KL, nats per token")
        axes.set_xlabel("million tokens")
        axes.grid()
    return figure


def seconds(report: dict[str, Any]) -> Figure | None:
    phases = {name: value for name, value in report["seconds"].items() if value > 0}
    if not phases:
        return None
    figure, (axes,) = _figure(0.3 + 0.24 * len(phases))
    bars = axes.barh(list(phases), list(phases.values()), height=0.62, color=DARK)
    axes.bar_label(bars, [duration(value) for value in phases.values()], padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(phases.values()))  # room for the numbers
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure
