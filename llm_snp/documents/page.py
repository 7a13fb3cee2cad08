"""report.html: one page about a finished run, from report.json alone, that needs no network and no script."""

from __future__ import annotations

import io
from functools import cache
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from ..system.files import digest_of_bytes
from .card import with_error
from .comparison import comparisons, duration, scaled
from .drawing import site_names
from .healing import after_pruning, healing_rows, healing_sentences
from .page_template import CSS, TEMPLATE
from .plots import PLOTS, figures, style
from .shareable import before, hub_id, shareable, texts_of
from .steps import HEAD, steps_rows, steps_sentences
from .summary import relative_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPEED = {  # line of the table: key, unit
    "prefill": ("prefill_seconds", "s"),
    "decode, per token": ("decode_seconds_per_token", "s"),
    "tokens per second": ("tokens_per_second", ""),
    "KV cache": ("kv_cache_bytes", "B"),
    "weights": ("weight_bytes", "B"),
    "peak memory": ("peak_bytes", "B"),
}
UNKNOWN = "–"


def html_page(report: dict[str, Any]) -> str:
    """The page, with everything in it: style sheet and plots. Local paths are reduced to their last component."""
    report = shareable(report)
    page = _template().render(
        report=report,
        name=report["output"],
        on_hub=hub_id(report["model"]) is not None,
        css=Markup(CSS),
        percent="{:.2%}".format,
        before=before(report),
        on_device=_on_device,
        numbers=_numbers(report),
        plots=[
            (PLOTS[name].title, PLOTS[name].caption, _svg(name, figure)) for name, figure in figures(report).items()
        ],
        perplexity=_perplexity(report),
        tasks=_tasks(report),
        speed=_speed(report),
        after_pruning=after_pruning(report),
        healing=[(step["command"], healing_sentences(step), healing_rows(step)) for step in report.get("healing", [])],
        steps=steps_rows(report),
        steps_head=HEAD,
        steps_sentences=steps_sentences(report) if report.get("steps") else "",
        sites=site_names(report),
        blocks=_blocks(report),
        facts=[
            ("Calibration", _calibration(report["calibration"])),
            (f"Time and memory; {_on_device(report['device'])}", _costs(report)),
            ("Versions", list(report["versions"].items())),
            ("Options", [(name, _listed(value)) for name, value in report["options"].items()]),
        ],
    )
    return page.rstrip("\n") + "\n" + _seal(page)


def is_page(content: bytes) -> bool:
    """Whether a file is a page of ours that nobody has changed since."""
    page, _, last = content.decode(errors="replace").rpartition("<!-- ")
    return f"<!-- {last}" == _seal(page)


def _seal(page: str) -> str:
    """A comment with the hash of the page above it."""
    return f"<!-- {digest_of_bytes(page.rstrip().encode())} -->\n"


@cache
def _template() -> Template:
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(TEMPLATE)


def _svg(name: str, figure: Figure) -> Markup:
    """A figure as part of a page: ids that no other figure has, no style for the rest of the page, a text for ears."""
    buffer = io.StringIO()
    with style(salt=name):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("metadata", "style")):
                parent.remove(child)
    for element in root.iter():
        # HTML knows the names of SVG without their namespaces.
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        if "id" in attributes:
            attributes["id"] = f"{name}-{attributes['id']}"
        if "href" in attributes:
            attributes["href"] = attributes["href"].replace("#", f"#{name}-", 1)
        element.attrib.clear()
        element.attrib.update({key: value.replace("url(#", f"url(#{name}-") for key, value in attributes.items()})
    for size in ("width", "height", "version"):
        del root.attrib[size]  # the view box has the proportions, the page the size
    root.attrib.update({"role": "img", "aria-label": f"{PLOTS[name].title}. {PLOTS[name].caption}"})
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _numbers(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The headline: label, the pruned model's number, what it was before."""
    sparsity = report["sparsity"]
    shown = [("removed", f"{sparsity['achieved']:.1%}", f"of the blocks; {sparsity['of_all_parameters']:.1%} of all")]
    if "of_dense" in sparsity:
        parents = ", ".join(one["name"] for one in report["parents"])
        shown.append(("removed in all", f"{sparsity['of_dense']:.1%}", f"of the dense model’s blocks; after {parents}"))
    groups = comparisons(report)
    perplexities = [group for group in groups if group.startswith("perplexity")]
    for group, rows in groups.items():
        if group != "tasks":
            prefix = "perplexity, " if group in perplexities else ""
            shown += [(prefix + row.label, row.pruned, f"{before(report)} {row.dense}, {row.change}") for row in rows]
    return shown


def _change(dense: float | None, pruned: float | None) -> str:
    return f"{pruned / dense - 1:+.1%}" if dense and pruned is not None and dense > 0 else ""


def _perplexity(report: dict[str, Any]) -> list[list[str]]:
    rows = []
    for source, found in report["evaluation"].items():
        dense, pruned = found["dense"]["perplexity"], found["pruned"]["perplexity"]
        counts = (f"{found['pruned'][key]:,}" for key in ("tokens", "windows", "sequence_length"))
        rows.append([source, f"{dense:,.2f}", f"{pruned:,.2f}", _change(dense, pruned), *counts])
    return rows


def _tasks(report: dict[str, Any]) -> list[list[str]]:
    rows = []
    for task, found in report.get("harness", {}).items():
        shots = UNKNOWN if found["num_fewshot"] is None else str(found["num_fewshot"])
        for metric, both in found["metrics"].items():
            dense, pruned = both.get("dense"), both["pruned"]
            change = _change(dense and dense["value"], pruned["value"])
            facts = (f"{found['samples']:,}", shots, str(found["version"]))
            rows.append(
                [f"{task}, {metric}", with_error(dense) if dense else UNKNOWN, with_error(pruned), change, *facts]
            )
    return rows


def _speed(report: dict[str, Any]) -> list[list[str]]:
    rows = []
    for label, (key, unit) in SPEED.items() if "speed" in report else ():
        dense, pruned = report["speed"].get("dense", {}).get(key), report["speed"]["pruned"][key]
        reference = dense if dense is not None else pruned
        if reference is not None:
            text = scaled(reference, unit)
            cells = (UNKNOWN if value is None else text(value) for value in (dense, pruned))
            rows.append([label, *cells, _change(dense, pruned)])
    return rows


def _blocks(report: dict[str, Any]) -> list[list[str]]:
    """Lines of the table: block, then what is kept, the error and the damping of each site."""
    rows = []
    for block in report["blocks"]:
        row = [str(block["block"])]
        for name in site_names(report):
            site = block.get(name)
            if site is None:
                row += [UNKNOWN] * 3
                continue
            damping = UNKNOWN if site["damping"] is None else f"{site['damping']:g}"
            error = relative_error(site)
            shown = UNKNOWN if error is None else f"{error:.2%}"
            row += [f"{site['kept']:,} of {site['units']:,} {site['unit']}", shown, damping]
        rows.append(row)
    return rows


def _calibration(calibration: dict[str, Any]) -> list[tuple[str, str]]:
    windows, length = calibration["windows"], calibration["sequence_length"]
    texts = texts_of(calibration)
    rows = [("text", texts[0]["source"])]
    if len(texts) > 1:
        rows = [("text", f"{one['source']}: {one['windows']:,} windows") for one in texts]
    return [
        *rows,
        ("windows", f"{windows:,} of {length:,} tokens ({calibration['windows_available']:,} available)"),
        ("SHA-256 of the tokens", calibration["sha256"]),
    ]


def _costs(report: dict[str, Any]) -> list[tuple[str, str]]:
    host, device = (report["peak_memory"][f"{which}_bytes"] for which in ("host", "device"))
    rows = [(phase, duration(seconds)) for phase, seconds in report["seconds"].items()]
    rows.append(("peak memory of the host", scaled(host, "B")(host)))
    if device:
        rows.append(("peak memory of the device", scaled(device, "B")(device)))
    return rows


def _on_device(device: dict[str, Any]) -> str:
    threads = f", {device['threads']} thread{'s' if device['threads'] != 1 else ''}" if device["type"] == "cpu" else ""
    several = f", {device['processes']} processes" if device.get("processes", 1) > 1 else ""
    return f"{device['name']}, {device['dtype']}{threads}{several}"


def _listed(value: Any) -> str:
    """An option as text."""
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return UNKNOWN if value is None or not text else text
