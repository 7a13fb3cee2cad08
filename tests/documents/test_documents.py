"""What a person reads about a result: plots, page, and the documents beside the weights."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
from conftest import Prune, Shell
from PIL import Image

from llm_snp.documents.comparison import comparisons, duration, scaled
from llm_snp.documents.page import html_page
from llm_snp.documents.plots import PLOTS, figures, plot_images
from llm_snp.documents.summary import block_line
from llm_snp.documents.writing import read_report, store, write_documents
from llm_snp.errors import CheckpointError, OutputError
from llm_snp.system import files
from llm_snp.system.manifest import changed, manifest, strays

pytestmark = pytest.mark.documents

VOID = {"meta", "link", "br", "hr", "img", "input"}


def made_up(blocks: int = 3, allocation: str = "loss", both: bool = False) -> dict[str, Any]:
    """A report as a run of `blocks` blocks would write it."""
    entries, kept, curves = [], [], []
    for block in range(blocks):
        entry: dict[str, Any] = {"block": block}
        counts = {}
        heads = both and block % 2 == 0
        for site, unit, units in (("attention", "heads" if heads else "dims", 32), ("mlp", "neurons", 512)):
            counts[unit] = left = units - (block + 1) * units // (2 * blocks)
            entry[site] = {
                "unit": unit,
                "units": units,
                "kept": left,
                "lost": 0.01 * block,
                "total": 2.0,
                "damping": 1e-3,
            }
            curve: dict[str, Any] = {
                "block": block,
                "site": site,
                "unit": unit,
                "units": units,
                "parameters_per_unit": 9,
            }
            if allocation != "uniform":
                curve["at_kept"] = [round(j * units / 32) for j in range(33)]
                curve["variance"] = [math.exp(-at / units * 7) for at in curve["at_kept"][:-1]] + [0.0]
            if allocation == "loss":
                curve["loss"] = [value * (block + 1) for value in curve["variance"]]
            curves.append(curve)
        entries.append(entry)
        kept.append(counts)
    return {
        "format": 1,
        "files": {},
        "versions": {"llm_snp": "0.1.0", "python": "3.11.7", "torch": "2.6.0"},
        "command": "python -m llm_snp facebook/opt-125m --sparsity 0.3",
        "options": {
            "model": "facebook/opt-125m",
            "sparsity": 0.3,
            "order": "greedy",
            "target": "residual",
            "attention": "both",
            "evaluate": ["wikitext2", "c4"],
            "offload": None,
        },
        "seed": 0,
        "model": {
            "name": "facebook/opt-125m",
            "hub": True,
            "type": "opt",
            "dtype": "float16",
            "bytes": 250_540_000,
            "parameters": 125_239_296,
            "parameters_pruned": 99_800_000,
            "bytes_pruned": 199_600_000,
            "custom_code": True,
        },
        "device": {"name": "cpu", "type": "cpu", "dtype": "float32", "threads": 1, "processes": 2},
        "calibration": {
            "source": "c4",
            "sha256": "0" * 64,
            "windows": 128,
            "windows_available": 400,
            "text_tokens": 900_000,
            "sequence_length": 2048,
            "sequence_length_asked": 2048,
        },
        "blocks": entries,
        "evaluation": {
            source: {"dense": perplexity(27.65), "pruned": perplexity(31.2)} for source in ("wikitext2", "c4")
        },
        "notes": ["block 1 mlp: moments were singular, damping raised from 0.001 to 0.1"],
        "sparsity": {
            "asked": 0.3,
            "achieved": 0.2999,
            "of_all_parameters": 0.2031,
            "block_parameters": 84_900_000,
            "block_parameters_removed": 25_439_296,
        },
        "plan": {"allocation": allocation, "why": "units go in order of loss", "kept": kept, "curves": curves},
        "output": "opt-125m-snp-30",
        "seconds": {"load": 0.051, "text": 12.3, "prune": 245.0, "save": 0.0},
        "peak_memory": {"host_bytes": 2_000_000_000, "device_bytes": 0},
    }


def perplexity(value: float) -> dict[str, Any]:
    return {"perplexity": value, "nll": 1.0, "tokens": 287_645, "windows": 141, "sequence_length": 2048, "source": "x"}


def healed(report: dict[str, Any], lora: int | None = None) -> dict[str, Any]:
    """The same, healed once more: the second of two measurements was the best."""
    curve = [
        {"step": step, "loss": kl, "kl": kl, "nll": 3.0 + kl, "perplexity": 20.1 * math.exp(kl)}
        for step, kl in ((0, 0.5), (40, 0.25), (80, 0.3))
    ]
    step = {
        "command": "python -m llm_snp heal pruned --text wiki.txt --tokens 327680",
        "teacher": {"name": "dense", "hub": False},
        "text": {"source": "wiki.txt", "windows": 640, "held_out": 20, "sequence_length": 512, "passes": 0.5},
        "lora": lora,
        "trained": 120_000,
        "device": {"name": "cpu", "type": "cpu", "dtype": "float32", "threads": 4},
        "tokens": 327_680,
        "steps": 80,
        "steps_planned": 80,
        "seconds": 12.25,
        "held_out": {"before": curve[0], "after": curve[1], "teacher_perplexity": 20.0},
        "curve": curve,
        "evaluation": {"wikitext2": {"teacher": 27.6, "before": 35.0, "after": 30.0}},
    }
    return report | {"healing": [*report.get("healing", []), step]}


def with_measurements(report: dict[str, Any]) -> dict[str, Any]:
    """The same with measured speed and tasks."""
    dense = {
        "prefill_seconds": 0.4,
        "prefill_range": [0.3, 0.5],
        "decode_seconds_per_token": 0.02,
        "decode_range": [0.01, 0.03],
        "tokens_per_second": 50.0,
        "kv_cache_bytes": 1_400_000,
        "weight_bytes": 250_540_000,
        "peak_bytes": None,
    }
    report["speed"] = {
        "device": {"name": "cpu", "type": "cpu", "dtype": "float32", "threads": 4},
        "batch": 1,
        "prompt": 512,
        "new": 64,
        "runs": 5,
        "dense": dense,
        "pruned": dense | {"prefill_seconds": 0.3, "kv_cache_bytes": 900_000},
        "notes": ["the machine was busy"],
    }
    report["harness"] = {
        "piqa": {
            "metrics": {
                "acc": {
                    "dense": {"value": 0.62, "stderr": 0.011},
                    "pruned": {"value": 0.60, "stderr": 0.012},
                    "higher_is_better": True,
                },
                "zero": {
                    "dense": {"value": 0.0, "stderr": None},
                    "pruned": {"value": 0.0, "stderr": None},
                    "higher_is_better": None,
                },
            },
            "version": "1.0",
            "samples": 1838,
            "num_fewshot": None,
        }
    }
    return report


def nothing_removed(report: dict[str, Any]) -> dict[str, Any]:
    """As with `--sparsity 0 --no-evaluate`."""
    for block in report["blocks"]:
        for site in (block["attention"], block["mlp"]):
            site.update(kept=site["units"], lost=0.0, total=None, damping=None)
    report["plan"]["kept"] = [{"dims": 32, "neurons": 512} for _ in report["blocks"]]
    report["model"].update(parameters_pruned=125_239_296, bytes_pruned=250_540_000)
    report["evaluation"], report["notes"], report["sparsity"]["achieved"] = {}, [], 0.0
    return report


def without_attention(report: dict[str, Any]) -> dict[str, Any]:
    """As with `--attention none`."""
    for block in report["blocks"]:
        del block["attention"]
    report["plan"]["curves"] = [curve for curve in report["plan"]["curves"] if curve["site"] == "mlp"]
    return report


def first_untouched(report: dict[str, Any]) -> dict[str, Any]:
    """The first block keeps everything, so nothing was measured there."""
    for site in (report["blocks"][0]["attention"], report["blocks"][0]["mlp"]):
        site.update(kept=site["units"], lost=0.0, total=None, damping=None)
    report["plan"]["kept"][0] = {"dims": 32, "neurons": 512}
    return report


def pruned_speed_only(report: dict[str, Any]) -> dict[str, Any]:
    del with_measurements(report)["speed"]["dense"]
    return report


ALL = ["change", "kept", "errors", "curves", "seconds"]
WITH_HEALING = [*ALL[:-1], "healing", "seconds"]
SHAPES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "usual": (made_up(), ALL),
    "two blocks by variance": (made_up(2, "variance"), ALL),
    "heads or dims, measured": (with_measurements(made_up(6, both=True)), ALL),
    "64 blocks": (made_up(64, both=True), ALL),
    "one block": (made_up(1), ALL),
    "uniform": (made_up(allocation="uniform"), ["change", "kept", "errors", "seconds"]),
    "nothing removed": (nothing_removed(made_up(allocation="uniform")), ["change", "kept", "seconds"]),
    "first block untouched": (first_untouched(made_up()), ALL),
    "mlp only": (without_attention(made_up()), ALL),
    "no dense speed": (pruned_speed_only(made_up()), ALL),
    "healed twice": (healed(healed(made_up(2)), lora=8), WITH_HEALING),
}


class Page(HTMLParser):
    """What a page consists of; complains about tags that are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.labels: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert value is not None
            assert not name.startswith("on")
            if name in ("href", "src"):
                self.links.append((tag, value))
            if name == "id":
                self.ids.append(value)
            if tag == "svg" and name == "aria-label":
                self.labels.append(value)
            self.references += re.findall(r"url\(#([^)]*)\)", value)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.text += data


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_report_has_its_plots_and_its_page(shape: str) -> None:
    report, expected = SHAPES[shape]
    before = copy.deepcopy(report)
    settings = dict(matplotlib.rcParams)
    assert list(figures(report)) == expected
    page = Page(html_page(report))
    assert report == before
    assert dict(matplotlib.rcParams) == settings
    assert page.tags.count("svg") == page.tags.count("figure") == len(expected)
    assert page.labels == [f"{PLOTS[name].title}. {PLOTS[name].caption}" for name in expected]
    for block in report["blocks"]:
        assert f"{block['mlp']['kept']:,} of {block['mlp']['units']:,} neurons" in page.text
    assert ("Perplexity was not measured" in page.text) == (not report["evaluation"])
    assert ("piqa, acc" in page.text) == ("harness" in report)
    assert ("tokens per second" in page.text) == ("speed" in report)


def test_plots_have_names_titles_and_captions_of_one_sentence() -> None:
    assert list(PLOTS) == [*ALL[:-1], "steps", "healing", "seconds"]
    for plot in PLOTS.values():
        assert plot.title
        assert re.fullmatch(r"[A-Z][^.]*\.", plot.caption)


def test_bars_are_the_shares_kept_and_heads_are_outlined() -> None:
    report = made_up(4, both=True)
    attention, mlp = figures(report)["kept"].axes
    heights = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in mlp.patches}
    assert heights == {b["block"]: b["mlp"]["kept"] / b["mlp"]["units"] for b in report["blocks"]}
    white = matplotlib.colors.to_rgba("white")
    outlined = {round(bar.get_x() + bar.get_width() / 2) for bar in attention.patches if bar.get_facecolor() == white}
    assert outlined == {0, 2}
    assert [text.get_text() for text in attention.get_legend().get_texts()] == ["dims", "heads"]
    assert mlp.get_legend() is None
    assert attention.get_ylim()[0] == 0


def test_bars_of_errors_are_all_inside_one_scale_from_zero() -> None:
    report = made_up(5)
    report["blocks"][4]["mlp"]["lost"] = 1.0
    panels = figures(report)["errors"].axes
    assert {axes.get_ylim() for axes in panels} == {panels[0].get_ylim()}
    low, high = panels[0].get_ylim()
    assert low == 0
    assert high > 0.5
    assert [bar.get_height() for bar in panels[1].patches] == [0.0, 0.005, 0.01, 0.015, 0.5]


def with_pairs(report: dict[str, Any]) -> dict[str, Any]:
    """Its last block has lost rotary pairs, whose error is part of the attention's."""
    pairs = {"unit": "pairs", "units": 8, "kept": 3, "lost": None, "total": None, "damping": None}
    block = report["blocks"][-1]
    block["scores"], block["mlp"] = pairs, block.pop("mlp")  # between the others
    return report


def test_what_has_no_error_of_its_own_shows_none() -> None:
    report = with_pairs(made_up())
    drawn = {name: [axes.get_title("left") for axes in figure.axes] for name, figure in figures(report).items()}
    assert drawn["errors"] == ["attention", "mlp"]
    assert drawn["kept"] == ["attention, dims", "scores, pairs", "mlp, neurons"]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", html_page(report))
    assert cells[cells.index("3 of 8 pairs") + 1] == "–"
    line = block_line({"blocks": report["blocks"], "plan": {"kept": report["plan"]["kept"]}})
    assert "pairs 3/8" in line
    assert re.findall(r"(\w+) [\d.]+%", line) == ["attention", "mlp"]


def test_the_cut_is_marked_on_the_curve() -> None:
    report = first_untouched(made_up(6))
    _, mlp = figures(report)["curves"].axes
    marks = [line for line in mlp.lines if line.get_marker() == "o"]
    assert len(marks) == 5  # where everything stays the loss is 0, which a logarithmic axis does not have
    for block, mark in enumerate(marks, 1):
        (share,), (loss,) = mark.get_data()
        assert share == report["plan"]["kept"][block]["neurons"] / 512
        assert loss == pytest.approx((block + 1) * math.exp(-7 * share))


def test_comparisons_share_a_scale_unless_one_is_far_off() -> None:
    report = with_measurements(made_up())
    limits = [axes.get_xlim() for axes in figures(report)["change"].axes]
    assert len(limits) == 4
    assert len(set(limits)) == 1
    report["evaluation"]["c4"]["pruned"]["perplexity"] = 2765.0
    size, perplexities, *rest = (axes.get_xlim()[1] for axes in figures(report)["change"].axes)
    assert perplexities > 100
    assert {size, *rest} == {size}
    assert size < 1.6


def test_comparisons_are_those_of_the_report() -> None:
    groups = comparisons(with_measurements(made_up()))
    rows = {row.label: row for group in groups.values() for row in group}
    assert (rows["parameters"].dense, rows["parameters"].pruned, rows["parameters"].change) == (
        "125.24 M",
        "99.80 M",
        "-20.3%",
    )
    assert rows["KV cache"].ratio == 0.9 / 1.4
    assert rows["wikitext2"].change == "+12.8%"
    assert rows["piqa acc"].error == pytest.approx(0.012 / 0.62)
    assert rows["piqa zero"].ratio is None
    assert "time (less is better)" not in comparisons(pruned_speed_only(made_up()))


def test_numbers_as_a_person_reads_them() -> None:
    assert [scaled(1.3e9)(value) for value in (1.3e9, 9.1e8)] == ["1.30 B", "0.91 B"]
    assert scaled(2.5e9, "B")(2e9) == "2.00 GB"
    assert scaled(0.0123, "s")(0.0001) == "0.10 ms"
    assert scaled(0)(0) == "0.00 µ"
    assert [duration(s) for s in (0.051, 12.34, 59.99, 245, 12_010)] == [
        "0.05 s",
        "12.3 s",
        "60.0 s",
        "4 min 05 s",
        "3 h 20 min",
    ]


def test_the_page_needs_no_network_and_no_script() -> None:
    page = Page(html_page(with_measurements(made_up())))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    outside = [(tag, target) for tag, target in page.links if not target.startswith("#")]
    assert outside == [("a", "https://huggingface.co/facebook/opt-125m"), ("a", "https://arxiv.org/abs/2405.17506")]
    assert len(set(page.ids)) == len(page.ids)
    assert {target[1:] for _, target in page.links if target.startswith("#")} | set(page.references) <= set(page.ids)
    text = html_page(made_up())
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert '<html lang="en">' in text


def test_whatever_stands_in_a_report_is_text() -> None:
    evil = "<script>alert(1)</script>"
    report = with_measurements(made_up())
    report["model"]["name"] = report["options"]["model"] = f'a"b{evil}'
    report["output"] = f"x-{evil}"
    report["notes"] = [evil]
    report["plan"]["why"] = evil
    report["evaluation"] = {f'" onload="x{evil}': report["evaluation"]["c4"]}
    report["harness"] = {f"]]>{evil}": report["harness"]["piqa"]}
    report["speed"]["notes"] = [evil]
    report["speed"]["device"]["name"] = evil
    text = html_page(report)
    assert "<script" not in text
    page = Page(text)
    assert "script" not in page.tags
    assert "alert(1)" in page.text


def test_local_paths_do_not_show() -> None:
    report = made_up()
    report["model"] |= {"name": "/home/someone/models/tiny", "hub": False}
    report["options"] |= {"model": "/home/someone/models/tiny", "calibration": "/home/someone/text.txt"}
    report["command"] = "/home/someone/program --key someone"
    report["evaluation"] = {"/home/someone/held-out.txt": report["evaluation"]["c4"]}
    text = html_page(report)
    assert "someone" not in text
    assert "held-out.txt" in text
    assert "huggingface.co" not in text


def test_plots_are_sharp_images_of_a_phone_s_width() -> None:
    images = plot_images(made_up())
    assert list(images) == [f"plots/{name}.png" for name in ALL]
    for content in images.values():
        with Image.open(BytesIO(content)) as image:
            assert image.width == 720
            assert 250 <= image.height <= 2000
            assert "Software" not in image.info
            assert len(image.convert("L").getcolors()) > 10
        assert len(content) < 200_000


def test_the_same_report_gives_the_same_bytes() -> None:
    report = with_measurements(made_up())
    page = html_page(report)
    first = plot_images(report)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "svg.fonttype": "path"}):
        assert html_page(json.loads(json.dumps(report))) == page
        assert plot_images(report) == first


def test_the_smallest_text_has_eleven_pixels_on_a_phone() -> None:
    """Which shows a figure 358 pixels wide."""
    text = html_page(with_measurements(made_up(48)))
    for found in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        root = ElementTree.fromstring(found)
        width = float(root.attrib["viewBox"].split()[2])
        sizes = [float(size) for size in re.findall(r"font(?:-size)?:\s*(?:\w+ )*([\d.]+)px", found)]
        assert sizes
        assert min(sizes) * 358 / width >= 11


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("documents") / "result"
    directory.mkdir()
    write_documents(directory, made_up(), new=True)
    return directory


@pytest.fixture
def result(written: Path, tmp_path: Path) -> Path:
    """A directory with the documents of a run."""
    return Path(shutil.copytree(written, tmp_path / "result"))


def test_documents_show_what_the_report_has(result: Path) -> None:
    names = sorted(str(path.relative_to(result)) for path in result.rglob("*.*"))
    assert names == ["README.md", *sorted(f"plots/{name}.png" for name in ALL), "report.html", "report.json"]
    card = (result / "README.md").read_text()
    for name in ALL:
        assert f"![{PLOTS[name].title}](plots/{name}.png)" in card
    assert read_report(result)["plan"] == made_up()["plan"]


def test_plots_of_an_earlier_report_go(result: Path) -> None:
    own = result / "plots" / "mine.png"
    own.touch()
    there = {"files": read_report(result)["files"]}
    write_documents(result, nothing_removed(made_up(allocation="uniform")) | there)
    assert sorted(path.stem for path in (result / "plots").iterdir()) == ["change", "kept", "mine", "seconds"]
    assert "plots/curves.png" not in (result / "README.md").read_text()


def test_an_edited_card_is_left_alone(result: Path) -> None:
    card = result / "README.md"
    before = card.read_text()
    written = write_documents(result, with_measurements(read_report(result)))
    assert card in written
    assert card.read_text() != before  # it was as it had been written
    card.write_text("Mine.\n")
    written = write_documents(result, read_report(result))
    assert card not in written
    assert result / "report.json" in written
    assert card.read_text() == "Mine.\n"
    card.unlink()
    assert card in write_documents(result, read_report(result))


def test_a_card_of_unknown_origin_is_left_alone(result: Path) -> None:
    """Of which the report does not have the hash."""
    report = read_report(result)
    del report["files"]["README.md"]
    (result / "report.json").write_text(json.dumps(report))
    (result / "README.md").write_text("From somebody.\n")
    write_documents(result, read_report(result))
    assert (result / "README.md").read_text() == "From somebody.\n"


@pytest.mark.parametrize("renamed", range(1, 7))
def test_documents_that_were_half_replaced_are_ours(
    result: Path, monkeypatch: pytest.MonkeyPatch, renamed: int
) -> None:
    """Killed between two renames: what is new is known by its hash, and everything is made anew by the next."""
    settle, done = files._settle, iter(range(100))

    def killed(temporary: Path, final: Path) -> None:
        if next(done) == renamed:
            raise KeyboardInterrupt
        settle(temporary, final)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_settle", killed)
        with pytest.raises(KeyboardInterrupt):
            write_documents(result, with_measurements(read_report(result)))
    assert "speed" not in read_report(result)
    assert "replacing" in read_report(result)
    assert strays(result) == []
    done = iter(range(100))
    with monkeypatch.context() as patch:  # and once more, with others
        patch.setattr(files, "_settle", killed)
        with pytest.raises(KeyboardInterrupt):
            write_documents(result, read_report(result) | {"notes": ["another"]})
    assert strays(result) == []
    written = write_documents(result, read_report(result))
    assert {path.name for path in written} >= {"README.md", "report.html", "change.png"}
    assert "replacing" not in read_report(result)
    assert strays(result) == []


def test_what_another_process_has_stored_meanwhile_stays(result: Path) -> None:
    """A report that was read before it: nothing of the other is lost, and the documents show both."""
    before, other = read_report(result), read_report(result)
    measured = with_measurements(copy.deepcopy(before))
    store(result, other, "harness", measured["harness"], 1.5)
    store(result, before, "speed", measured["speed"])
    now = read_report(result)
    assert now["harness"] == measured["harness"]
    assert now["speed"] == measured["speed"]
    assert now["seconds"]["harness"] == 1.5
    assert before["speed"] == measured["speed"]
    assert strays(result) == []


def test_who_writes_documents_waits_for_the_other(result: Path) -> None:
    measured = with_measurements(read_report(result))
    with ThreadPoolExecutor(1) as pool:
        with files.alone(result):
            stored = pool.submit(store, result, read_report(result), "speed", measured["speed"])
            write_documents(result, read_report(result) | {"notes": ["first"]})
            assert not stored.done()
        stored.result()
    assert read_report(result)["notes"] == ["first"]
    assert "speed" in read_report(result)


def test_an_earlier_report_that_does_not_name_its_code_is_read_all_the_same(result: Path) -> None:
    report = read_report(result)
    del report["model"]["custom_code"]
    (result / "report.json").write_text(json.dumps(report))
    assert read_report(result)["model"]["custom_code"] is False
    (result / "modeling_snp.py").touch()
    assert read_report(result)["model"]["custom_code"] is True


def test_a_card_without_a_report_is_of_a_run_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("half\n")
    write_documents(tmp_path, made_up(), new=True)
    assert "half" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "has no report.json"),
        ("{", "is damaged or truncated, it is no JSON ("),
        ("[]", "is no report of llm_snp"),
        ('{"versions": {"other": "1"}, "format": 1}', "is no report of llm_snp"),
        ('{"versions": {"llm_snp": "9.0"}, "format": 99}', "has format 99, of llm_snp 9.0"),
        ('{"versions": {"llm_snp": "0.1.0"}, "format": 1, "model": {}}', "is damaged: options: field required"),
    ],
)
def test_what_is_no_report_is_said(tmp_path: Path, content: str | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(CheckpointError) as error:
        read_report(tmp_path)
    assert sentence in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_what_is_no_directory_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        read_report(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is a file"):
        read_report(tmp_path / "file")


def test_the_command_makes_the_documents_of_a_result_anew(
    shell: Shell, dense: Path, prune: Prune, held_out: Path
) -> None:
    report = prune(dense, shell.output, evaluate=(str(held_out),))
    page = shell.output / "report.html"
    before = page.read_text() if page.exists() else None
    page.unlink(missing_ok=True)
    code, out, err = shell.run("report", shell.output)
    assert code == 0, err
    assert before in (None, page.read_text())
    assert f"written  {page}\n" in out
    for name in ALL:
        assert f"written  {shell.output / 'plots' / name}.png\n" in out
    assert f"{report['model']['parameters_pruned']:,}" in out
    assert f"result   {shell.output}\n" in out
    assert held_out.name in page.read_text()

    mine = [shell.output / name for name in ("README.md", "report.html", "plots/kept.png")]
    for path in mine:
        path.write_text("Mine.\n")
    code, out, _ = shell.run("report", shell.output)
    assert code == 0
    assert [path.read_text() for path in mine] == ["Mine.\n"] * 3
    for path in mine:
        assert f"kept     {path}, which is not as it was written\n" in out
        assert f"written  {path}\n" not in out
        path.unlink()
    assert "kept     " not in shell.run("report", shell.output)[1]
    assert changed(shell.output, manifest(shell.output)) == ([], [])


@pytest.mark.parametrize("name", ["report.html", "plots/kept.png"])
def test_what_a_report_merely_names_is_not_written_over(shell: Shell, result: Path, name: str) -> None:
    """A report may be a stranger's, laid over the files of whoever opens it."""
    report = json.loads((result / "report.json").read_text())
    report["files"][name] = "0" * 32
    (result / "report.json").write_text(json.dumps(report))
    (result / name).parent.mkdir(exist_ok=True)
    (result / name).write_text("years of work")
    write_documents(result, read_report(result) | {"notes": ["another"]})
    assert (result / name).read_text() == "years of work"
    assert read_report(result)["notes"] == ["another"]


@pytest.mark.parametrize("name", ["new.html", "NEW.HTM"])
def test_a_page_is_written_to_a_new_file_and_over_a_page(shell: Shell, result: Path, name: str) -> None:
    for _ in range(2):
        code, _, err = shell.run("report", result, "--output", name)
        assert code == 0, err
    page = shell.directory / name
    for other in (page.read_text().replace("<h1>", "<h1>MY NOTES "), f"<p>journal</p>{page.read_text()}", "<!-- "):
        page.write_text(other)
        code, _, err = shell.run("report", result, "--output", name)
        assert (code, page.read_text()) == (2, other)
        assert f"--output {name} is there, and no page of llm_snp, or changed since" in err


def test_the_command_writes_only_the_page_where_it_is_asked_to(shell: Shell, tmp_path: Path, result: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in result.rglob("*")}
    file = tmp_path / "page.html"
    code, out, err = shell.run("report", result, "--output", file)
    assert code == 0, err
    assert out.startswith(f"written  {file}\n\n")
    assert file.read_text() == html_page(read_report(result))
    assert {path: path.stat().st_mtime_ns for path in result.rglob("*")} == before


@pytest.mark.parametrize("found", ["link", "pipe", "folder", "mine"])
def test_the_command_writes_a_page_over_nothing_else(found: str, shell: Shell, result: Path) -> None:
    path = Path("page.html")
    make = {"link": lambda: path.symlink_to("nowhere"), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}
    make.get(found, lambda: path.write_text("mine"))()
    before = (path.lstat().st_ino, path.lstat().st_mtime_ns)
    code, out, err = shell.run("report", result, "--output", path)
    assert (code, out) == (2, "")
    assert err.startswith("llm_snp: --output page.html is there, and no page of llm_snp, or changed since; give an")
    assert (path.lstat().st_ino, path.lstat().st_mtime_ns) == before


def test_what_comes_there_while_the_page_is_drawn_stays(
    shell: Shell, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shell.run("report", result, "--output", "page.html")[0] == 0

    def drawn(report: dict[str, Any]) -> str:
        Path("page.html").write_text("mine")
        return html_page(report)

    monkeypatch.setattr("llm_snp.documents.writing.html_page", drawn)
    assert shell.run("report", result, "--output", "page.html")[0] == 2
    assert Path("page.html").read_text() == "mine"


def test_what_could_not_be_read_again_is_not_written(result: Path) -> None:
    before = (result / "report.json").read_bytes()
    with pytest.raises(OutputError, match=r"could not be read again \(notes: .*\); it stays as it is"):
        write_documents(result, read_report(result) | {"notes": "none"})
    assert (result / "report.json").read_bytes() == before


def test_a_hidden_file_of_that_name_stays(shell: Shell, result: Path) -> None:
    """The page is written under another name until it is whole: one that nobody else has."""
    Path(".page.html").write_text("mine")
    assert shell.run("report", result, "--output", "page.html")[0] == 0
    assert Path(".page.html").read_text() == "mine"


def test_the_command_refuses_what_is_no_result_or_no_place(shell: Shell, tmp_path: Path, result: Path) -> None:
    code, out, err = shell.run("report", tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert err.startswith(f"llm_snp: {tmp_path / 'nowhere'} does not exist; ")
    code, out, err = shell.run("report", result, "--output", tmp_path / "no" / "page.html")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "page.html cannot be written" in err
