"""Measured speed: what is counted is exact, what is timed is timed in turn, and what is said follows from it."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import BLOCKS, HIDDEN, NEURONS, POSITIONS, VOCABULARY, Prune, copied, load, save, tiny_opt
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from llm_snp.commands import bench
from llm_snp.errors import (
    CheckpointError,
    DeviceMemoryError,
    HubError,
    OptionError,
    OutputError,
    SnpError,
    UnsupportedModelError,
)
from llm_snp.evaluation.speed import Run, _Bench, cache_bytes, doubts, fit, load_model, measure_speed, measurements
from llm_snp.evaluation.speed_table import speed_table
from llm_snp.evaluation.widths import (
    Gain,
    Mlp,
    Timed,
    WidthTiming,
    gains,
    head_dims,
    mlp_of,
    recommended,
    rounded,
    sample,
    verdict,
)
from llm_snp.system.manifest import sealed
from llm_snp.system.remembering import remember

CPU = torch.device("cpu")
BATCH, PROMPT, NEW, RUNS = 2, 9, 4, 3


@pytest.fixture(scope="module")
def pruned(dense: Path, prune: Prune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result with widths of its own in every block."""
    output = tmp_path_factory.mktemp("speed") / "pruned"
    prune(dense, output, attention="dims")
    return output


@pytest.fixture(scope="module")
def steps() -> list[str]:
    """The classes of the models that `speed` ran, and "step" where it told of its progress."""
    return []


@pytest.fixture(scope="module")
def speed(pruned: Path, dense: Path, steps: list[str]) -> dict[str, Any]:
    once = _Bench._once

    def noted(self: _Bench, model: Any) -> Any:
        steps.append(type(model).__name__)
        return once(self, model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Bench, "_once", noted)
        return measure_speed(pruned, dense, CPU, torch.float32, BATCH, PROMPT, NEW, RUNS, lambda: steps.append("step"))


def kv_bytes(directory: Path, tokens: int, size: int = 4) -> int:
    """Keys and values of all blocks, from the config alone."""
    config = AutoConfig.from_pretrained(directory)
    dense = {"heads": config.num_attention_heads, "head_dim": config.hidden_size // config.num_attention_heads}
    widths = getattr(config, "block_widths", None) or [dense] * config.num_hidden_layers
    return sum(2 * tokens * width["heads"] * width["head_dim"] * size for width in widths)


def test_what_is_counted_is_exact(speed: dict[str, Any], pruned: Path, dense: Path) -> None:
    for which, directory in (("pruned", pruned), ("dense", dense)):
        assert speed[which]["kv_cache_bytes"] == kv_bytes(directory, BATCH * (PROMPT + NEW))
        assert speed[which]["weight_bytes"] == 4 * load(directory).num_parameters()
        assert speed[which]["peak_bytes"] is None
    assert speed["pruned"]["kv_cache_bytes"] < speed["dense"]["kv_cache_bytes"]
    assert (speed["batch"], speed["prompt"], speed["new"], speed["runs"]) == (BATCH, PROMPT, NEW, RUNS)
    assert speed["device"]["type"] == "cpu"
    assert speed["device"]["dtype"] == "float32"
    assert json.loads(json.dumps(speed, allow_nan=False)) == speed


def test_times_and_ratios_agree_with_each_other(speed: dict[str, Any]) -> None:
    for which in ("pruned", "dense"):
        figures = speed[which]
        for phase, key in (("prefill", "prefill_seconds"), ("decode", "decode_seconds_per_token")):
            low, high = figures[f"{phase}_range"]
            assert 0 < low <= figures[key] <= high
        assert figures["tokens_per_second"] == pytest.approx(BATCH / figures["decode_seconds_per_token"])
    dense, pruned = speed["dense"], speed["pruned"]
    assert speed["ratio"] == pytest.approx(
        {
            "prefill_speedup": dense["prefill_seconds"] / pruned["prefill_seconds"],
            "decode_speedup": dense["decode_seconds_per_token"] / pruned["decode_seconds_per_token"],
            "kv_cache_pruned_over_dense": pruned["kv_cache_bytes"] / dense["kv_cache_bytes"],
            "weights_pruned_over_dense": pruned["weight_bytes"] / dense["weight_bytes"],
        }
    )


def test_models_are_measured_in_turn(speed: dict[str, Any], steps: list[str], dense: Path) -> None:
    in_turn = ["OPTForCausalLM", "step", "SnpOPTForCausalLM", "step"]
    assert steps == in_turn * (1 + RUNS) + ["step"]  # a warm-up, too, and the widths in the end
    assert steps.count("step") == measurements(dense, RUNS)


def test_a_larger_model_takes_longer(tmp_path: Path, dense: Path) -> None:
    wide = save(tiny_opt(hidden_size=256, ffn_dim=2048, word_embed_proj_dim=256), tmp_path / "wide")
    speed = measure_speed(dense, wide, CPU, torch.float32, 4, 32, 4, 5)
    assert speed["ratio"]["prefill_speedup"] > 1.5
    assert speed["ratio"]["decode_speedup"] > 1


def test_another_type_and_no_dense_model(pruned: Path) -> None:
    speed = measure_speed(pruned, None, CPU, torch.bfloat16, 1, PROMPT, NEW, 1)
    assert speed["pruned"]["kv_cache_bytes"] == kv_bytes(pruned, PROMPT + NEW, size=2)
    assert speed["pruned"]["weight_bytes"] == 2 * load(pruned).num_parameters()
    assert "dense" not in speed
    assert "ratio" not in speed


@pytest.mark.parametrize(
    ("asked", "limit", "expected"),
    [
        ((512, 64), None, (512, 64)),
        ((448, 64), 512, (448, 64)),
        ((500, 64), 512, (500, 12)),  # a prompt that fits stays
        ((512, 64), 512, (448, 64)),
        ((512, 64), 64, (32, 32)),
        ((5, 5), 2, (1, 1)),
    ],
)
def test_prompt_and_new_tokens_fit_the_positions(
    asked: tuple[int, int], limit: int | None, expected: tuple[int, int]
) -> None:
    assert fit(*asked, limit) == expected


def test_fewer_tokens_where_there_are_no_positions(pruned: Path) -> None:
    speed = measure_speed(pruned, None, CPU, torch.float32, runs=1)
    assert (speed["prompt"], speed["new"]) == (POSITIONS // 2, POSITIONS // 2)
    assert speed["pruned"]["kv_cache_bytes"] == kv_bytes(pruned, POSITIONS)
    assert any("32 tokens and 32 new ones instead of 512 and 64" in note for note in speed["notes"])


def test_other_architectures(tmp_path: Path, pruned: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=40, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    speed = measure_speed(tmp_path / "gpt2", pruned, CPU, torch.float32, 1, 50, 10, 1)
    assert (speed["prompt"], speed["new"]) == (30, 10)
    assert speed["pruned"]["kv_cache_bytes"] == 2 * 40 * 16 * 2 * 4
    assert "widths" not in speed


@pytest.mark.skipif(
    Version(transformers.__version__) >= Version("5.24"), reason="from then on transformers gives Mamba a cache"
)
def test_a_model_without_kv_cache_is_refused(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=50, hidden_size=8, state_size=4, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    with pytest.raises(UnsupportedModelError, match="'mamba' have no KV cache"):
        measure_speed(tmp_path / "mamba", None, CPU, torch.float32, 1, 4, 2, 1)


def test_bytes_of_the_caches_of_all_versions() -> None:
    key, value = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5, dtype=torch.float16)
    expected = 2 * (24 * 4 + 30 * 2)
    layer = SimpleNamespace(keys=key, values=value, dtype=torch.float32, is_initialized=True)
    assert cache_bytes(SimpleNamespace(layers=[layer, layer])) == expected
    assert cache_bytes(SimpleNamespace(key_cache=[key, key], value_cache=[value, value], _seen_tokens=3)) == expected
    assert cache_bytes(((key, value), (key, value))) == expected


def runs(seconds: Sequence[float]) -> list[Run]:
    return [Run(prefill=s, decode=s / 10, cache=1, working=None) for s in seconds]


def test_a_speed_up_that_is_not_there_every_time_is_doubted() -> None:
    assert doubts(runs([3, 4, 5]), runs([2, 3, 4])) == []  # the machine slowed down, for both
    assert doubts(runs([2, 3, 4]), runs([3, 4, 5])) == []
    prefill, decode = doubts(runs([3, 4, 5]), runs([2, 5, 4]))
    assert prefill.startswith("prefill: the pruned model was the faster one in 2 of 3 pairs of runs")
    assert decode.startswith("decode: ")
    assert doubts(runs([3]), runs([2])) == ["one run tells nothing of the spread; give more --runs"]


def test_widths_are_rounded_within_the_budget() -> None:
    assert rounded((333, 333, 333, 333), 8) == (336, 336, 328, 328)
    assert sum(rounded((333, 333, 333, 333), 8)) in range(4 * 333 - 4, 4 * 333 + 5)
    assert rounded((333, 347, 383, 502), 64) == (320, 320, 384, 512)
    assert rounded((64, 128), 64) == (64, 128)
    assert rounded((3, 40), 16) == (16, 32)  # nothing is left empty


def test_a_sample_of_the_widths() -> None:
    assert sample((5, 3, 4), 8) == (3, 4, 5)
    assert sample(range(1, 101), 4) == (1, 34, 67, 100)
    assert sample((7,) * 20, 3) == (7, 7, 7)


def timed(multiple: int, *seconds: float, widths: tuple[int, ...] = (100, 100)) -> Timed:
    return Timed(multiple, widths, seconds)


def test_gains_are_those_of_the_multiple_alone() -> None:
    actual = timed(1, 1.0, 2.0, 1.0, 1.0)
    same, faster, smaller, mixed = gains(
        actual,
        [
            timed(8, 1.0, 2.0, 1.0, 1.0),
            timed(16, 0.8, 1.6, 0.8, 0.8),
            timed(32, 0.8, 1.6, 0.8, 0.8, widths=(80, 80)),
            timed(64, 0.8, 1.6, 1.2, 1.2),
        ],
    )
    assert same == Gain(8, 0.0, 0.0)
    assert faster.gain == pytest.approx(0.2)
    assert faster.noise == pytest.approx(0)
    assert smaller.gain == pytest.approx(0)  # a fifth less time for a fifth less neurons
    assert mixed.gain == pytest.approx(0)
    assert mixed.noise == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([(8, 0.03, 0.01), (16, 0.04, 0.01)], None),  # not worth a word
        ([(8, 0.20, 0.25), (16, 0.30, 0.40)], None),  # not clear
        ([(8, 0.20, 0.02), (16, 0.22, 0.02), (64, 0.24, 0.02)], 8),  # the smallest that is about as good
        ([(8, 0.06, 0.01), (16, 0.08, 0.01), (64, 0.40, 0.02)], 64),  # but it must be
        ([(8, 0.30, 0.40), (16, 0.20, 0.02)], 16),
    ],
)
def test_what_is_recommended(found: list[tuple[int, float, float]], expected: int | None) -> None:
    best = recommended([Gain(*gain) for gain in found])
    assert (best and best.multiple) == expected


def test_the_recommendation_as_a_sentence() -> None:
    assert verdict((333, 347, 384), [Gain(8, 0.01, 0.0), Gain(64, 0.23, 0.01)]) == (
        "MLP widths such as 333, 347 are slow on this device: in multiples of 64 the MLP's matrix products take 23% "
        "less time; prune with --round-to 64"
    )
    assert "save less than 5% of" in verdict((333,), [Gain(8, 0.02, 0.01)])
    assert "cannot be told" in verdict((333,), [Gain(8, 0.02, 0.12)])


def test_odd_widths_are_timed(speed: dict[str, Any], pruned: Path) -> None:
    neurons = sorted(width["neurons"] for width in load(pruned).config.block_widths)
    widths = speed["widths"]
    assert widths["neurons"] == neurons
    first, *others = widths["timings"]
    assert (first["round_to"], first["widths"], first["saved"]) == (1, neurons, 0.0)
    assert [other["round_to"] for other in others] == sorted(other["round_to"] for other in others)
    for timing in widths["timings"]:
        assert all(width % timing["round_to"] == 0 for width in timing["widths"])
        low, high = timing["range"]
        assert 0 < low <= timing["seconds"] <= high
    assert widths["recommended_round_to"] in (None, *(other["round_to"] for other in others))
    assert sum("MLP widths" in note for note in speed["notes"]) == 1


def test_even_widths_are_not(dense: Path) -> None:
    speed = measure_speed(dense, None, CPU, torch.float32, 1, 4, 2, 1)  # 64 neurons everywhere
    assert "widths" not in speed
    assert speed["notes"] == []


def test_what_was_rounded_is_timed_at_larger_multiples_only() -> None:
    timing = WidthTiming(Mlp((48, 64, 80), HIDDEN, 1), CPU, torch.float32, 1, 4, 2)
    assert timing.candidates == {1: (48, 64, 80), 32: (64, 64, 64), 64: (64, 64, 64)}


def test_timing_takes_longer_for_more(dense: Path) -> None:
    def seconds(mlp: Mlp) -> float:
        figures, _ = WidthTiming(mlp, CPU, torch.float32, batch=1, prompt=32, new=2).measure()
        return figures["timings"][0]["seconds"]

    one = seconds(Mlp((333, 333), HIDDEN, 1))
    assert seconds(Mlp((333, 333), 16 * HIDDEN, 1)) > one
    assert seconds(Mlp((333, 333), HIDDEN, 8)) > one  # as with gates, only more of them


def test_a_costly_timing_takes_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_snp.evaluation.widths.BUDGET", 1e-6)
    figures, _ = WidthTiming(Mlp((333,), HIDDEN, 1), CPU, torch.float32, batch=1, prompt=512, new=8).measure()
    assert (figures["tokens"], figures["steps"]) == (16, 1)
    large = WidthTiming(Mlp(tuple(range(4001, 4013)), 8192, 1), CPU, torch.float32, batch=1, prompt=512, new=8)
    assert large.widths == (4001, 4012)  # not yet measured: two blocks instead of eight


def test_where_the_widths_are(dense: Path, pruned: Path) -> None:
    model = load(pruned)
    widths = model.config.block_widths
    assert mlp_of(model) == Mlp(tuple(width["neurons"] for width in widths), HIDDEN, 1)
    assert head_dims(model) == sorted({width["head_dim"] for width in widths})
    assert mlp_of(load(dense)) == Mlp((NEURONS,) * BLOCKS, HIDDEN, 1)
    assert head_dims(load(dense)) == []


def test_the_table(speed: dict[str, Any]) -> None:
    lines = speed_table(speed)
    by_name = {line[:20].strip(): line for line in lines}
    assert lines[0].split() == ["dense", "pruned", "pruned", "is"]
    ratio = speed["ratio"]
    assert by_name["decode, ms per token"].endswith(f"{ratio['decode_speedup']:.2f}x as fast")
    assert by_name["decode, tokens/s"].endswith(f"{ratio['decode_speedup']:.2f}x as fast")
    assert by_name["weights, MB"].endswith(f"{ratio['weights_pruned_over_dense']:.2f}x the size")
    assert not any(line.startswith("peak") for line in lines)  # a CPU does not count it
    assert f"note     {speed['notes'][-1]}" in lines
    alone = speed_table({key: value for key, value in speed.items() if key not in ("dense", "ratio")})
    assert alone[0].split() == ["pruned"]
    assert not any("as fast" in line for line in alone)
    large = speed_table(speed | {which: speed[which] | {"peak_bytes": 5_000_000} for which in ("dense", "pruned")})
    assert any(line.startswith("peak on device, MB") and line.endswith("1.00x the size") for line in large)


def arguments(*given: str | Path) -> argparse.Namespace:
    p = argparse.ArgumentParser()
    bench.add_arguments(p)
    return p.parse_args([str(argument) for argument in ("--device", "cpu", "--runs", 1, "--new", 2, *given)])


def run_bench(*given: str | Path) -> None:
    args = arguments(*given)
    bench.check(args)
    bench.main(args)


@pytest.fixture
def result(pruned: Path, tmp_path: Path) -> Path:
    """A result of one's own to bench."""
    return copied(pruned, tmp_path / "result")


def report_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "report.json").read_text())


def test_bench_compares_with_the_dense_model_and_keeps_the_figures(
    result: Path, dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = report_of(result)
    run_bench(result, "--prompt", 8)
    out = capsys.readouterr().out
    speed = report_of(result)["speed"]
    assert out.splitlines()[:-1] == speed_table(speed)
    assert out.splitlines()[-1] == f"stored   in the report of {result}"
    assert speed["dense"]["weight_bytes"] == 4 * load(dense).num_parameters()
    written = ("speed", "files", "seal")  # hashes of the documents, too: they tell of the speed
    assert {key: value for key, value in report_of(result).items() if key not in written} == {
        key: value for key, value in before.items() if key not in written
    }
    assert "Speed" in (result / "README.md").read_text()
    run_bench(result, "--prompt", 7, "--against", dense)  # the same model by name
    assert report_of(result)["speed"]["prompt"] == 7


def test_bench_says_at_once_that_a_page_is_in_the_way(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of(result)
    report["files"].pop("report.html", None)
    (result / "report.json").write_bytes(sealed(report))
    (result / "report.html").write_text("mine")
    monkeypatch.setattr("llm_snp.evaluation.speed.measure_speed", pytest.fail)
    with pytest.raises(OutputError, match="is none that a run of llm_snp wrote, and in its way; move it"):
        run_bench(result)


def test_bench_says_at_once_what_else_is_in_the_way(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots that go elsewhere, or nowhere, and a report of which there can be no documents."""
    monkeypatch.setattr("llm_snp.evaluation.speed.measure_speed", pytest.fail)
    (result.parent / "plots").mkdir()
    shutil.rmtree(result / "plots", ignore_errors=True)
    (result / "plots").symlink_to(result.parent / "plots")
    with pytest.raises(OutputError, match="plots is a link to another place"):
        run_bench(result)
    (result / "plots").unlink()
    (result / "plots").touch()
    with pytest.raises(OutputError, match="plots is none that a run of llm_snp wrote, and in its way; move it"):
        run_bench(result)
    (result / "plots").unlink()
    monkeypatch.setattr("llm_snp.documents.writing.plot_images", lambda report: 1 / 0)
    with pytest.raises(OutputError, match=r"the documents of .* cannot be made"):
        run_bench(result)


def test_bench_does_not_time_other_weights_as_the_result(result: Path) -> None:
    """Figures of what was trained on since, say, would stand in the report of what was there."""
    shard = min(result.glob("*.safetensors"))
    tensors = load_file(shard)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, shard, {"format": "pt"})
    before = (result / "report.json").read_bytes()
    with pytest.raises(CheckpointError, match=f"is not as it was written: {shard.name} changed; restore that, or"):
        run_bench(result)
    assert (result / "report.json").read_bytes() == before


def test_bench_against_another_model_keeps_nothing(
    result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save(tiny_opt(seed=1, ffn_dim=96), tmp_path / "other")
    before = (result / "report.json").read_bytes()
    run_bench(result, "--against", other)
    assert "as fast" in capsys.readouterr().out
    run_bench(other, "--against", result)  # any causal LM may come first
    assert "stored" not in capsys.readouterr().out
    assert (result / "report.json").read_bytes() == before


def test_a_whole_model_has_the_weights_of_its_files_however_they_are_spelled(dense: Path, tmp_path: Path) -> None:
    """transformers makes up what it does not find, without a word; the first OPT files are spelled so."""
    older = copied(dense, tmp_path / "older")
    tensors = load_file(older / "model.safetensors")
    respelled = {
        name.replace("final_layer_norm.", "layer_norm.", 1) if name.startswith("model.decoder.final") else name: t
        for name, t in tensors.items()
    }
    assert set(respelled) != set(tensors)
    torch.manual_seed(0)
    respelled = {name: torch.randn_like(t) if "decoder.layer_norm" in name else t for name, t in respelled.items()}
    save_file(respelled, older / "model.safetensors", metadata={"format": "pt"})
    model = load_model(older, torch.device("cpu"), torch.float32)
    for name in ("weight", "bias"):
        found = model.get_parameter(f"model.decoder.final_layer_norm.{name}")
        assert torch.equal(found, respelled[f"model.decoder.layer_norm.{name}"])
    del respelled["model.decoder.layer_norm.bias"]
    save_file(respelled, older / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"its files have no model\.decoder\.final_layer_norm\.bias"):
        load_model(older, torch.device("cpu"), torch.float32)


def test_a_model_that_cannot_generate_is_told_in_a_sentence(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any, **options: Any) -> None:
        raise TypeError("new(): invalid data type 'str'")

    monkeypatch.setattr("llm_snp.evaluation.speed._Bench._decode", refused)
    with pytest.raises(CheckpointError, match=r"the \w+ model cannot generate, so its speed cannot be measured \(new"):
        run_bench(result, "--prompt", 8)


def test_bench_says_beforehand_that_it_cannot_store_the_figures(
    result: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (result / "report.json").read_bytes()
    monkeypatch.setattr("llm_snp.commands.bench.os.access", lambda path, mode: False)
    run_bench(result, "--prompt", 8)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"kept     the report of {result}, which is not writable, as it is"
    assert not out[-1].startswith("stored")
    assert (result / "report.json").read_bytes() == before


def test_bench_without_the_dense_model(result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(result)
    gone = str(result.parent / "gone")
    remember(result, {"model": gone})
    run_bench(result)
    out = capsys.readouterr().out
    assert out.startswith(f"alone    the dense model is not there to compare with: {gone} does not exist")
    assert "stored" in out
    assert "dense" not in report_of(result)["speed"]
    report["speed"] = report_of(result)["speed"] | {"dense": report_of(result)["speed"]["pruned"]}
    (result / "report.json").write_text(json.dumps(report))
    run_bench(result, "--prompt", 6)
    assert "kept     the earlier figures" in capsys.readouterr().out
    assert report_of(result) == report
    shutil.rmtree(result / ".cache")  # as elsewhere: only its name is known
    run_bench(result, "--prompt", 6)
    assert "with: tiny was a directory on the machine that made" in capsys.readouterr().out


def test_bench_of_any_model(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(dense.iterdir())
    run_bench(dense)
    out = capsys.readouterr().out
    assert out.startswith(f"alone    {dense} has no report.json that names its dense model")
    assert "as fast" not in out
    assert "stored" not in out
    assert sorted(dense.iterdir()) == before


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (("--runs", 0), OptionError, "--runs is 0; it must be at least 1"),
        (("--batch", -1), OptionError, "--batch is -1; it must be at least 1"),
        (("--new", 0), OptionError, "--new is 0; it must be at least 1"),
        (("--prompt", 0), OptionError, "--prompt is 0; it must be at least 1"),
        (("--prompt", POSITIONS), OptionError, f"has {POSITIONS} positions, .* give at most {POSITIONS - 1}"),
        (("--device", "tpu"), OptionError, "--device 'tpu' is not known"),
        (("--dtype", "int8"), OptionError, "--dtype 'int8' is not known"),
        (("--against", "/no/such/model"), CheckpointError, "/no/such/model does not exist"),
        (("--against", "nobody/nothing"), HubError, "nobody/nothing is no local directory, and could not be had"),
    ],
)
def test_bad_input(result: Path, given: tuple[Any, ...], error: type[SnpError], message: str) -> None:
    with pytest.raises(error, match=message):
        run_bench(result, *given)
    assert "speed" not in report_of(result)


def test_more_than_fits(result: Path) -> None:
    with pytest.raises(
        DeviceMemoryError, match=r"^cpu has no room for what was to be measured \(DefaultCPU.*; give a smaller"
    ):
        run_bench(result, "--batch", 10**13)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(pruned: Path) -> None:
    with pytest.raises(OptionError, match="--device cuda was asked for, but torch sees 0 CUDA devices"):
        run_bench(pruned, "--device", "cuda")


def test_directories_that_are_no_models(tmp_path: Path, dense: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a model directory: it has no config\.json"):
        run_bench(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(dense / "config.json", empty)
    with pytest.raises(CheckpointError, match=r"empty has no weights"):
        run_bench(empty)
    shutil.copy(dense / "model.safetensors", empty)
    weights = (empty / "model.safetensors").read_bytes()
    (empty / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match=r"empty is no causal language model that this transformers can load"):
        run_bench(empty)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(pruned: Path, dense: Path) -> None:
    device = torch.device("cuda")
    speed = measure_speed(pruned, dense, device, torch.float16, 2, PROMPT, NEW, 3)
    for which in ("dense", "pruned"):
        figures = speed[which]
        logits = 2 * 2 * VOCABULARY  # of one position
        assert figures["peak_bytes"] >= figures["weight_bytes"] + figures["kv_cache_bytes"] + logits
        assert figures["prefill_range"][0] > 0
    assert any("flash attention" in note for note in speed["notes"])


def test_a_model_without_settings_of_generate(dense: Path, tmp_path: Path) -> None:
    """Many older ones have none: transformers takes what the config has of them."""
    directory = copied(dense, tmp_path / "model")
    (directory / "generation_config.json").unlink(missing_ok=True)
    model = load_model(directory, torch.device("cpu"), torch.float32)
    assert model.generation_config.eos_token_id == load(dense).config.eos_token_id
