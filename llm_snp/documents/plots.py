"""Plots of a finished run, from report.json alone: to be read on a phone, and in black and white."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

from ..system.libraries import ONE_AT_A_TIME
from . import drawing
from .shareable import shareable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "plots"
PNG_DPI = 200
TITLE_HEIGHT = 0.3  # inches
STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "figure.titlesize": 9.5,
    "figure.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "grid.color": "0.88",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "legend.columnspacing": 1.2,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a `$` in a name is no formula
}


@dataclass(frozen=True)
class Plot:
    """title: a few words; caption: one sentence; draw: report -> Figure, or None where there is nothing to show."""

    title: str
    caption: str
    draw: Callable[[dict[str, Any]], Figure | None]


def figures(report: dict[str, Any]) -> dict[str, Figure]:
    """The plots for which `report` has data, by name, in the order of `PLOTS`."""
    report = shareable(report)
    with style():
        drawn = {name: plot.draw(report) for name, plot in PLOTS.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def plot_images(report: dict[str, Any]) -> dict[str, bytes]:
    """The plots with titles, in the order of `PLOTS`: `plots/NAME.png` -> its bytes; the same report gives the same."""
    images = {}
    for name, figure in figures(report).items():
        image = BytesIO()
        figure.set_figheight(figure.get_figheight() + TITLE_HEIGHT)
        with style():
            figure.suptitle(PLOTS[name].title, x=0.01, ha="left")
            figure.savefig(image, format="png", dpi=PNG_DPI, metadata={"Software": None})
        images[plot_path(name)] = image.getvalue()
    return images


def plot_path(name: str) -> str:
    """Where a plot is in a result."""
    return f"{FOLDER}/{name}.png"


@contextmanager
def style(salt: str = "") -> Iterator[None]:
    """The settings in which the plots are drawn and saved, whatever the user's own are; salt: of the ids in an SVG."""
    from matplotlib import style as styles

    with ONE_AT_A_TIME, styles.context(["default", STYLE | {"svg.hashsalt": salt}]):
        yield


PLOTS: dict[str, Plot] = {
    "change": Plot(
        "Before and after",
        "Each number of the pruned model as a share of the one before pruning, which is the outlined bar.",
        drawing.change,
    ),
    "kept": Plot(
        "Share kept per block",
        "How much of each block's attention and MLP stays, first block on the left (no bar for pairs where heads "
        "went).",
        drawing.kept,
    ),
    "errors": Plot(
        "Relative error along the depth",
        "Share of the output energy of each layer that pruning lost, after the repair.",
        drawing.errors,
    ),
    "curves": Plot(
        "What removing costs",
        "What each share kept would lose by the measurement before pruning, a line per block, with a mark where the "
        "budget cut it (none where everything stays).",
        drawing.curves,
    ),
    "steps": Plot(
        "Layers or units, step by step",
        "How unlike its parent's the hidden states of each candidate are, as 1 - CKA, with a ring around what was "
        "taken, and dotted how unlike those before the first step.",
        drawing.steps,
    ),
    "healing": Plot(
        "Healing",
        "KL divergence from the teacher on windows that were not trained on; the mark is what was kept.",
        drawing.healing,
    ),
    "seconds": Plot("Time per phase", "Wall-clock time of each phase of the run.", drawing.seconds),
}
