"""The model card: what a reader of the Hub, and the Hub itself, find in it."""

from __future__ import annotations

import ast
import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Prune
from huggingface_hub import ModelCard

from llm_snp.documents.card import BLOCKWISE_IN_GGUF, model_card, plots_of
from llm_snp.documents.shareable import shareable
from llm_snp.families import GGUF
from llm_snp.families.gguf import DECI

HUB_ID = "facebook/opt-125m"
SIDE = {
    "prefill_seconds": 0.2,
    "decode_seconds_per_token": 0.02,
    "tokens_per_second": 50.0,
    "kv_cache_bytes": 4_000_000,
    "weight_bytes": 200_000_000,
    "peak_bytes": None,
}


@pytest.fixture(scope="module")
def finished(prune: Prune, dense: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of a run, from the file."""
    output = tmp_path_factory.mktemp("card") / "tiny-snp-30"
    prune(dense, output, evaluate=(str(held_out),))
    return dict(json.loads((output / "report.json").read_text()))


@pytest.fixture
def report(finished: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(finished)


def metadata(card: str) -> dict[str, Any]:
    """What the Hub's own reader finds in front of the card."""
    return dict(ModelCard(card).data.to_dict())


def section(card: str, title: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    text = card.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("|")]
    return rows[2:]


def test_what_the_hub_reads(report: dict[str, Any]) -> None:
    found = metadata(model_card(report))
    assert found["library_name"] == "transformers"
    assert found["pipeline_tag"] == "text-generation"
    assert found["tags"] == ["llm_snp", "pruned", "structured-pruning"]
    assert not {"base_model", "license", "datasets", "language"} & set(found)
    (index,) = found["model-index"]
    assert index["name"] == "tiny-snp-30"
    (result,) = index["results"]
    assert result["task"] == {"type": "text-generation"}
    assert result["dataset"] == {"name": "evaluation.txt", "type": "evaluation.txt"}
    (metric,) = result["metrics"]
    assert metric["type"] == "perplexity"
    (measured,) = report["evaluation"].values()
    assert metric["value"] == measured["pruned"]["perplexity"]


def test_nothing_measured_nothing_claimed(report: dict[str, Any]) -> None:
    card = model_card(report | {"evaluation": {}})
    assert not {"model-index", "model_name"} & set(metadata(card))
    assert "Not measured in this run." in card
    assert "## Tasks" not in card
    assert "## Speed" not in card


def calibrated_on(report: dict[str, Any], *sources: str) -> None:
    """Let a report say that its windows were of these texts, as many of each."""
    one = {key: value for key, value in report["calibration"].items() if key != "texts"}
    report["calibration"] = one | {
        "source": " and ".join(sources),
        "texts": [one | {"source": source, "windows": one["windows"] // len(sources)} for source in sources],
    }


def test_several_calibration_texts_are_all_named(report: dict[str, Any]) -> None:
    calibrated_on(report, "c4", "/data/notes.txt")
    windows = report["calibration"]["windows"] // 2
    card = model_card(report)
    assert f"tokens of c4 ({windows} windows) and notes.txt ({windows} windows), seed" in card
    assert "Calibrated on c4 and notes.txt" in card
    assert metadata(card)["datasets"] == ["allenai/c4"]
    calibrated_on(report, "c4", "/data/c4")  # a file of that name is not the text of that name
    assert "Calibrated on c4 and c4 (2)" in model_card(report)


def test_a_report_of_an_earlier_version_names_one_text(report: dict[str, Any]) -> None:
    calibrated_on(report, "c4")
    card = model_card(report)
    del report["calibration"]["texts"]
    assert model_card(report) == card


def test_what_the_dense_model_says_of_itself_is_carried_over(report: dict[str, Any]) -> None:
    licence = {"license": "other", "license_name": "opt", "license_link": "https://example.org/LICENSE"}
    card = {"language": "en", "tags": ["opt", "pruned"], "datasets": ["bookcorpus"], "inference": False, **licence}
    report["model"] |= {"name": HUB_ID, "hub": True, "card": card}
    calibrated_on(report, "c4")
    report["evaluation"] = {"wikitext2": next(iter(report["evaluation"].values()))}
    text = model_card(report)
    found = metadata(text)
    assert found["base_model"] == HUB_ID
    assert {key: found[key] for key in licence} == licence
    assert found["language"] == "en"
    assert found["tags"] == ["opt", "pruned", "llm_snp", "structured-pruning"]
    assert found["datasets"] == ["bookcorpus", "allenai/c4"]
    assert "inference" not in found
    dataset = found["model-index"][0]["results"][0]["dataset"]
    assert dataset == {
        "name": "wikitext2",
        "type": "Salesforce/wikitext",
        "config": "wikitext-2-raw-v1",
        "split": "test",
    }
    assert f"`{HUB_ID}` with" in text
    assert "its licence (opt) applies" in text
    report["model"]["card"]["datasets"] = "allenai/c4"  # one string is allowed, and none is said twice
    assert metadata(model_card(report))["datasets"] == ["allenai/c4"]


def test_the_nearest_model_on_the_hub_is_the_base_model(report: dict[str, Any]) -> None:
    """Of one that was pruned twice, of which what lies between is here only."""
    report["model"] |= {"name": "once", "hub": False}
    report["sparsity"]["of_dense"] = 0.5
    models = ("meta/first", True), (HUB_ID, True), ("twice", False)
    report["parents"] = [{"name": name, "hub": hub, "removed": 0.1, "healed": 0} for name, hub in models]
    assert metadata(model_card(report))["base_model"] == HUB_ID


def test_a_local_directory_is_no_base_model(report: dict[str, Any]) -> None:
    """Even if it has the name of one on the Hub; a report that does not say claims nothing."""
    for name in ("models/tiny", "./models/tiny", "~/tiny", "/a/b", "a/b/c", "tiny", HUB_ID):
        for hub in ({}, {"hub": False}):
            report["model"] = {key: value for key, value in report["model"].items() if key != "hub"} | {
                "name": name,
                **hub,
            }
            card = model_card(report)
            assert "base_model" not in metadata(card), name
            assert HUB_ID not in card


def test_what_was_removed(report: dict[str, Any]) -> None:
    card = model_card(report)
    rows = section(card, "What is left of each block")
    assert len(rows) == len(report["blocks"])
    for row, block in zip(rows, report["blocks"], strict=True):
        assert row[0] == str(block["block"])
        for cell, site in zip(row[1:], ("attention", "mlp"), strict=True):
            found = block[site]
            assert cell == f"{found['kept']} of {found['units']} {found['unit']}"
    model = report["model"]
    assert f"| parameters | {model['parameters']:,} | {model['parameters_pruned']:,} | -" in card
    assert f"{report['sparsity']['achieved']:.2%}" in card


def test_blocks_with_other_layers(report: dict[str, Any]) -> None:
    del report["blocks"][1]["mlp"]
    report["blocks"][1]["experts"] = report["blocks"][0]["mlp"]
    rows = section(model_card(report), "What is left of each block")
    assert [len([cell for cell in row if cell]) for row in rows] == [3, 3, 3]


def test_perplexity_of_both(report: dict[str, Any]) -> None:
    ((row),) = section(model_card(report), "Perplexity")
    (result,) = report["evaluation"].values()
    dense, pruned = (result[which]["perplexity"] for which in ("dense", "pruned"))
    assert row[:4] == ["evaluation.txt", f"{dense:.2f}", f"{pruned:.2f}", f"{pruned / dense - 1:+.1%}"]


def test_texts_that_a_card_would_call_alike(report: dict[str, Any]) -> None:
    (result,) = report["evaluation"].values()
    names = ("a b.txt", "a  b.txt", "a`b.txt", "a'b.txt")
    report["evaluation"] = {
        name: {which: one | {"perplexity": 100.0 + number} for which, one in result.items()}
        for number, name in enumerate(names)
    }
    (rows,) = [section(model_card(report), "Perplexity")]
    assert [row[:2] for row in rows] == [
        ["a b.txt", "100.00"],
        ["a b.txt (2)", "101.00"],
        ["a'b.txt", "102.00"],
        ["a'b.txt (2)", "103.00"],
    ]


def test_tasks_with_their_errors(report: dict[str, Any]) -> None:
    figures = {"dense": {"value": 0.4312, "stderr": 0.0123}, "pruned": {"value": 0.4, "stderr": None}}
    report["harness"] = {
        "arc_easy": {"metrics": {"acc": figures, "acc_norm": figures}, "version": 1, "samples": 2376, "num_fewshot": 5},
        "/home/ann/own.yaml": {"metrics": {"acc": figures}, "version": "2", "samples": 10, "num_fewshot": None},
    }
    card = model_card(report)
    rows = section(card, "Tasks")
    assert rows[0] == ["arc_easy", "acc", "0.4312 ± 0.0123", "0.4000", "5", "2376", "1"]
    assert [row[:2] for row in rows[1:]] == [["arc_easy", "acc_norm"], ["own.yaml", "acc"]]
    assert "/home/ann" not in card
    results = metadata(card)["model-index"][0]["results"]
    of_task = next(result for result in results if result["dataset"]["type"] == "arc_easy")
    assert of_task["dataset"]["args"] == {"num_few_shot": 5}
    assert [(metric["type"], metric["value"]) for metric in of_task["metrics"]] == [("acc", 0.4), ("acc_norm", 0.4)]


def test_speed(report: dict[str, Any]) -> None:
    device = {"name": "Some CPU", "type": "cpu", "dtype": "float32", "threads": 4}
    facts = {"device": device, "batch": 2, "prompt": 128, "new": 32, "runs": 3, "notes": ["the machine was busy"]}
    faster = SIDE | {"prefill_seconds": 0.15, "tokens_per_second": 60.0, "kv_cache_bytes": 3_000_000}
    report["speed"] = facts | {"dense": SIDE, "pruned": faster}
    card = model_card(report)
    assert section(card, "Speed") == [
        ["prefill, ms", "200.0", "150.0", "0.75"],
        ["decode, tokens/s", "50.0", "60.0", "1.20"],
        ["KV cache, MB", "4.00", "3.00", "0.75"],
        ["weights, MB", "200.0", "200.0", "1.00"],
    ]
    assert "Measured on Some CPU, float32, threads: 4, batch 2, 128 prompt tokens, 32 new ones, 3 runs." in card
    assert "- the machine was busy" in card
    report["speed"] = facts | {"pruned": SIDE | {"peak_bytes": 300_000_000}}
    assert section(model_card(report), "Speed")[-1] == ["peak memory, MB", "300.0"]
    report["speed"]["dense"] = SIDE  # measured where the peak was not known
    assert section(model_card(report), "Speed")[-1] == ["peak memory, MB", "", "300.0", ""]


def test_how_to_load(report: dict[str, Any]) -> None:
    card = model_card(report)
    assert 'AutoModelForCausalLM.from_pretrained("tiny-snp-30", trust_remote_code=True)' in card
    assert "# tiny-snp-30\n" in card
    card = model_card(report, "ann/pruned")
    assert 'AutoModelForCausalLM.from_pretrained("ann/pruned", trust_remote_code=True)' in card
    assert "# pruned\n" in card
    report["model"]["custom_code"] = False
    card = model_card(report)
    assert 'AutoModelForCausalLM.from_pretrained("tiny-snp-30")' in card
    assert "trust_remote_code" not in card
    assert "modeling_snp.py" not in card


VLLM, OWN = "`vllm serve tiny-snp-30", " --trust-remote-code --model-impl transformers`"
LLAMA_CPP = "`python -m llm_snp export tiny-snp-30 --gguf tiny-snp-30.gguf`, then `llama-server -m tiny-snp-30.gguf`"


@pytest.mark.parametrize(
    ("kind", "own", "unit", "expected"),
    [
        ("opt", True, "dims", {"vLLM": VLLM + OWN}),
        ("opt", False, "neurons", {"vLLM": VLLM + "`"}),
        ("llama", True, "heads", {"vLLM": VLLM + OWN, "llama.cpp": LLAMA_CPP}),
        ("llama", True, "queries", {"vLLM": VLLM + OWN}),
        ("llama", False, "heads", {"vLLM": VLLM + "`", "llama.cpp": LLAMA_CPP}),
        ("qwen2", False, "heads", {"vLLM": VLLM + " --model-impl transformers`", "llama.cpp": LLAMA_CPP}),
        ("falcon", False, "neurons", {"vLLM": VLLM + "`"}),
        ("falcon", True, "heads", {}),
        ("gpt2", True, "heads", {}),
    ],
)
def test_how_to_serve(report: dict[str, Any], kind: str, own: bool, unit: str, expected: dict[str, str]) -> None:
    report["model"] |= {"type": kind, "custom_code": own}
    for block in report["blocks"]:
        block["attention"] = {"kept": 1, "units": 4, "unit": unit}
    card = model_card(report)
    assert ("\n## Serve it\n" in card) == bool(expected)
    if expected:
        assert dict(section(card, "Serve it")) == expected


def test_plots(report: dict[str, Any]) -> None:
    plots = [("What is kept", "plots/kept.png"), ("Error (log)", "plots/error.png")]
    card = model_card(report, plots=plots)
    assert "![What is kept](plots/kept.png)" in card
    assert plots_of(card) == plots
    assert plots_of(model_card(report)) == []


def test_no_local_path_gets_out(report: dict[str, Any]) -> None:
    report["command"] = "/home/ann/program --password hf_secret"
    report["model"]["name"], report["output"] = "/home/ann/models/tiny", "../out/tiny-snp-30"
    report["options"] |= {
        "model": "/home/ann/models/tiny",
        "calibration": "/data/my text.txt",
        "evaluate": ["/home/ann/test.txt", "harness:arc_easy,/home/ann/own.yaml"],
        "push_to_hub": "ann/secret-plans",
        "private": True,
        "offload": "/scratch/ann",
        "output": "../out/tiny-snp-30",
        "seed": 1,
    }
    report["calibration"]["source"] = "/data/my text.txt"
    (measured,) = report["evaluation"].values()
    report["evaluation"] = {"/home/ann/test.txt": measured, "/data/test.txt": measured}
    before = copy.deepcopy(report)
    card, shared = model_card(report), shareable(report)
    assert report == before
    for text in (card, json.dumps(shared)):
        assert not any(
            part in text
            for part in ("/home", "/data", "../out", "models/", "hf_secret", "secret-plans", "scratch", "--private")
        )
    (command,) = (line for line in card.splitlines() if line.startswith("python -m"))
    assert command.startswith("python -m llm_snp tiny --sparsity 0.3 --output tiny-snp-30 --calibration 'my text.txt' ")
    assert " --seed 1 " in command
    assert " --evaluate test.txt --evaluate harness:arc_easy,own.yaml" in command
    assert list(shared["evaluation"]) == ["test.txt", "test.txt (2)"]
    assert shared["options"]["evaluate"] == ["test.txt", "harness:arc_easy,own.yaml"]
    assert shareable(shared) == shared
    assert model_card(shared) == card
    report["evaluation"] = {"c4": measured, "/data/c4": measured}
    calibrated_on(report, "/data/c4")
    shared = shareable(report)
    assert list(shared["evaluation"]) == ["c4", "c4 (2)"]
    report["options"] |= {"calibration": ["/data/c4"], "evaluate": ["c4", "/data/c4", "/data/c4:2"]}
    shared = shareable(report)
    assert shared["options"]["calibration"] == ["./c4"]
    assert shared["options"]["evaluate"] == ["c4", "./c4", "./c4:2"]
    assert "--calibration ./c4 " in shared["command"]
    assert "--evaluate c4 --evaluate ./c4 --evaluate ./c4:2" in shared["command"]
    assert shareable(shared) == shared
    assert "datasets" not in metadata(model_card(report))  # a file of that name is not the text of that name
    assert model_card(shared) == model_card(report)
    report["model"] |= {"name": HUB_ID, "hub": True}
    report["options"]["model"] = HUB_ID
    assert f"python -m llm_snp {HUB_ID} " in model_card(report)
    assert shareable(report)["options"]["model"] == HUB_ID


def test_limits_and_notes(report: dict[str, Any]) -> None:
    report["notes"] = ["windows have 32 tokens: the model has no more positions"]
    card = model_card(report)
    limits = card.split("## Limits")[1]
    for words in ("nothing was trained afterwards", "modeling_snp.py", "Calibrated on calibration.txt", "biases"):
        assert words in limits
    assert "- windows have 32 tokens" in card
    assert "refitted by least squares" in limits
    report["options"]["target"] = "none"
    assert "as they were, not refitted, and nothing was trained" in model_card(report).split("## Limits")[1]


def test_on_the_hub_it_is_fetched_before_it_is_exported(report: dict[str, Any]) -> None:
    """`export` takes a directory, and who reads the card there has none."""
    report["model"] |= {"type": "llama", "custom_code": False}
    for block in report["blocks"]:
        block["attention"] = {"kept": 1, "units": 4, "unit": "heads"}
    row = dict(section(model_card(report, name="ann/small-snp-30"), "Serve it"))["llama.cpp"]
    fetched = "`hf download ann/small-snp-30 --local-dir small-snp-30`, `python -m llm_snp export small-snp-30 --gguf "
    assert row.startswith(fetched)


def test_llama_cpp_is_named_where_it_has_blocks_of_their_own_widths() -> None:
    """The card imports no family, so it keeps a list; Qwen3, which has to be tied for it, is not on that."""
    assert set(BLOCKWISE_IN_GGUF) == {kind for kind, rows in GGUF.items() if DECI in rows}


@pytest.mark.parametrize(
    ("hub", "revision", "told"),
    [
        (True, "refs/pr/3", "refs/pr/3"),
        (True, "release/v1", "release/v1"),
        (True, "main", "main"),
        (False, "me/private/v1", "v1"),
        (True, "/home/me/v1", "v1"),
    ],
)
def test_a_revision_is_told_whole(report: dict[str, Any], hub: bool, revision: str, told: str) -> None:
    """Part of it would be another one of the same repository."""
    model = report["model"] | {"name": "someone/model" if hub else "model", "hub": hub}
    options = report["options"] | {"model": model["name"], "revision": revision}
    assert shareable(report | {"model": model, "options": options})["options"]["revision"] == told


def test_the_name_of_a_result_is_no_code_and_no_markup(report: dict[str, Any]) -> None:
    """A stranger's report has one of his choice, and `report` makes a card of it."""
    name = 'x"); import os; os.system("id") #<b>[y](z)`'
    card = model_card(report | {"output": name})
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert [call.func.attr for call in calls] == ["from_pretrained", "from_pretrained"]  # type: ignore[attr-defined]
    assert {call.args[0].value for call in calls} == {name}  # type: ignore[attr-defined]
    rest = card[card.index("\n# ") :].replace(code, "")
    assert "<b>" not in rest.replace("\\<b>", "")
    assert "[y](z)" not in rest.replace("\\[y](z)", "")
    assert "`vllm serve DIR --trust-remote-code" in rest


@pytest.mark.parametrize("name", ["datasets/..", "..", "-a/.b", "a--b/c", "datasets/x", "a/b.git", "a/ü", "a/b/c"])
def test_what_can_be_no_model_on_the_hub_is_no_origin(name: str, report: dict[str, Any]) -> None:
    report["model"] |= {"name": name, "hub": True}
    assert "base_model" not in metadata(model_card(report))


def test_texts_and_tasks_have_names_that_the_hub_takes(report: dict[str, Any]) -> None:
    """It refuses a card whose `dataset.type` is none for it, which a push at the end of a run would meet."""
    measured = next(iter(report["evaluation"].values()))
    report["evaluation"] = {"mein Text (2).txt": measured, "größe": measured, "§": measured, "wikitext2": measured}
    task = {"metrics": {"acc": {"pruned": {"value": 0.5, "stderr": None}, "higher_is_better": True}}}
    report["harness"] = {"my own task": task | {"version": 1, "samples": 3, "num_fewshot": 0}}
    (index,) = metadata(model_card(report))["model-index"]
    types = [one["dataset"]["type"] for one in index["results"]]
    assert types == ["mein-Text-2-.txt", "gr-e", "text", "Salesforce/wikitext", "my-own-task"]
    assert index["results"][0]["dataset"]["name"] == "mein Text (2).txt"


@pytest.mark.parametrize(
    "strange",
    [
        r"\[full terms](https://evil.example/steal) \<img src=x onerror=alert(1)>",
        "https://evil.example and www.evil.example and ann@evil.example, mailto:ann@evil.example",
        "https&#58;//evil.example and www&#x2e;evil.example and ann&commat;evil.example",
        "one\n\n# two\r\n<script>",
    ],
)
def test_no_text_of_a_stranger_is_markup(report: dict[str, Any], strange: str) -> None:
    """A backslash of his own does not undo ours, and an address is no link, which the Hub makes of it unasked."""
    report["notes"], report["versions"]["llm_snp"] = [strange], strange
    report["model"]["card"] = {"license": "other", "license_name": strange}
    body = model_card(report).split("\n---\n", 1)[1]
    assert body.count("full terms") == strange.count("full terms") * 3
    plain = re.sub(r"\\\\", "", body)  # pairs: backslashes that are shown
    for end in ("[full", "<img", "<script", "&#58;", "&#x2e;", "&commat;"):
        assert all(part.endswith("\\") for part in plain.split(end)[:-1]), end
    for address in ("https://evil", "www.evil", "ann@evil"):
        assert address not in body
    assert "\n# two" not in body
