"""Tasks of lm-evaluation-harness: known values, what is refused, and what is shown; everything is local."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import POSITIONS, Prune, load, logits, save, tiny_opt

pytest.importorskip("lm_eval", reason="lm-evaluation-harness (llm_snp[harness]) is not installed")

import datasets

from llm_snp.dense.hub import EMBEDDED, load_config
from llm_snp.dense.tokenizer import load_tokenizer
from llm_snp.errors import (
    CheckpointError,
    CorpusError,
    DeviceMemoryError,
    HubError,
    NumericalError,
    OptionError,
    SnpError,
)
from llm_snp.evaluation import harness, harness_tasks
from llm_snp.evaluation.harness import evaluate_harness
from llm_snp.evaluation.harness_check import Asked, check_room, check_tasks, rehearse_tasks
from llm_snp.evaluation.harness_table import compare, harness_rows
from llm_snp.evaluation.harness_tasks import tasks_of, texts_of

TASKS = Path(__file__).parent.parent / "harness_tasks"
CHOICE, TEXT, WRITING = (str(TASKS / f"small_{name}.yaml") for name in ("choice", "text", "writing"))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What datasets makes of the files is not for the person's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def evaluate(directory: Path, *tasks: str | Path, **options: Any) -> dict[str, Any]:
    return evaluate_harness(directory, [str(task) for task in tasks], CPU, torch.float32, **options)


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TASKS / f"small_{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def found(dense: Path) -> dict[str, Any]:
    """All local tasks on the dense model."""
    return evaluate(dense, TASKS)


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a local task in a directory of its own, with replacements in the .yaml file."""

    def task(name: str = "choice", directory: str = "own", **replaced: str) -> Path:
        folder = tmp_path / directory
        folder.mkdir(exist_ok=True)
        text = (TASKS / f"small_{name}.yaml").read_text()
        for key, value in replaced.items():
            line = next(line for line in text.splitlines() if line.strip().startswith(f"{key}:"))
            text = text.replace(line, f"{line[: line.index(key)]}{key}: {value}")
        (folder / "task.yaml").write_text(text)
        shutil.copy(TASKS / f"small_{name}.jsonl", folder)
        return folder / "task.yaml"

    return task


def refused(kind: type[SnpError], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_texts_and_tasks_are_told_apart() -> None:
    asked = ("wikitext2", "harness:piqa, arc_easy", "a,b.txt", "harness:mmlu,piqa", "wikitext2")
    assert tasks_of(asked) == ("piqa", "arc_easy", "mmlu")
    assert texts_of(asked) == ("wikitext2", "a,b.txt")
    assert tasks_of(()) == texts_of(()) == ()


def test_accuracy_is_that_of_the_logits(dense: Path, found: dict[str, Any]) -> None:
    model, tokenizer = load(dense), load_tokenizer(dense)
    right, right_by_length = [], []
    for row in rows("choice"):
        likelihoods = []
        for choice in row["choices"]:
            context = tokenizer(row["context"])["input_ids"]
            whole = tokenizer(f"{row['context']} {choice}")["input_ids"]
            log_p = logits(model, torch.tensor([whole]))[0].log_softmax(-1)
            likelihoods.append(sum(log_p[i - 1, whole[i]].item() for i in range(len(context), len(whole))))
        by_length = [value / len(choice) for value, choice in zip(likelihoods, row["choices"], strict=True)]
        right.append(likelihoods.index(max(likelihoods)) == row["answer"])
        right_by_length.append(by_length.index(max(by_length)) == row["answer"])
    share = sum(right) / len(right)
    result = found["small_choice"]
    assert 0 < share < 1
    assert result["metrics"]["acc"]["value"] == share
    assert result["metrics"]["acc"]["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (len(right) - 1)))
    assert result["metrics"]["acc"]["higher_is_better"] is True
    assert result["metrics"]["acc_norm"]["value"] == sum(right_by_length) / len(right)
    assert {key: value for key, value in result.items() if key != "metrics"} == {
        "version": 1.0,
        "samples": 40,
        "num_fewshot": 0,
    }


def test_word_perplexity_is_that_of_the_logits(dense: Path, found: dict[str, Any]) -> None:
    model, tokenizer = load(dense), load_tokenizer(dense)
    nll, words, most = 0.0, 0, 0
    for row in rows("text"):
        ids = tokenizer(row["text"])["input_ids"]
        before = [tokenizer.bos_token_id, *ids]
        for start in range(0, len(ids), POSITIONS):
            end = min(start + POSITIONS, len(ids))
            first = max(0, end - POSITIONS) if start else 0  # the last window looks back as far as it can
            log_p = logits(model, torch.tensor([before[first:end]]))[0].log_softmax(-1)
            nll -= sum(log_p[i - first, ids[i]].item() for i in range(start, end))
        words += len(row["text"].split())
        most = max(most, len(ids))
    assert most > 2 * POSITIONS
    metrics = found["small_text"]["metrics"]
    assert metrics["word_perplexity"]["value"] == pytest.approx(math.exp(nll / words), rel=1e-4)
    characters = sum(len(row["text"]) for row in rows("text"))
    assert metrics["bits_per_byte"]["value"] == pytest.approx(nll / characters / math.log(2), rel=1e-4)
    assert metrics["word_perplexity"]["higher_is_better"] is False
    assert metrics["word_perplexity"]["stderr"] is None
    assert found["small_text"]["samples"] == 24


@pytest.mark.parametrize(
    ("written", "version"),
    [("2024-01-01", "2024-01-01"), ("[1, 2]", "[1, 2]"), (".nan", "nan"), ("3", 3), ("v3", "v3")],
)
def test_a_version_of_any_kind_can_stand_in_a_report(
    dense: Path, task: Callable[..., Path], written: str, version: Any
) -> None:
    """Of YAML's dates and lists JSON, or whoever reads the report, knows nothing, hours later."""
    result = json.loads(json.dumps(evaluate(dense, task(version=written), limit=2)))
    assert result["small_choice"]["version"] == version


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True, "num_return_sequences": 2},
        {"return_dict_in_generate": True},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 3},
    ],
)
def test_exact_match_is_that_of_what_the_model_writes(
    dense: Path, task: Callable[..., Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Whatever its settings for `generate` say of how it writes."""
    model, tokenizer = load(dense), load_tokenizer(dense)
    file = task("writing")
    asked = rows("writing")[:4]
    for row in asked[:3]:
        prompt = tokenizer(row["prompt"], return_tensors="pt")
        written = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        row["target"] = tokenizer.decode(written, skip_special_tokens=True).split(".")[0]
    (file.parent / "small_writing.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in asked))
    copy = Path(shutil.copytree(dense, tmp_path / "model"))
    known = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps(known | settings))
    result = evaluate(copy, file)["small_writing"]
    assert result["metrics"]["exact_match"]["value"] == 0.75
    assert result["samples"] == 4


def test_a_directory_is_all_its_tasks(found: dict[str, Any]) -> None:
    assert list(found) == ["small_choice", "small_text", "small_writing"]
    assert list(found["small_writing"]["metrics"]) == ["exact_match"]
    json.dumps(found, allow_nan=False)


def test_dense_and_pruned(dense: Path, found: dict[str, Any], prune: Prune, tmp_path: Path) -> None:
    prune(dense, tmp_path / "out", sparsity=0.5)
    pruned = evaluate(tmp_path / "out", CHOICE, TEXT)
    both = compare(found, pruned)
    assert list(both) == ["small_choice", "small_text"]
    perplexity = both["small_text"]["metrics"]["word_perplexity"]
    before, after = (perplexity[which]["value"] for which in ("dense", "pruned"))
    assert before == found["small_text"]["metrics"]["word_perplexity"]["value"]
    assert after == pruned["small_text"]["metrics"]["word_perplexity"]["value"] != before
    assert perplexity["higher_is_better"] is False
    assert {key: both["small_choice"][key] for key in ("version", "samples", "num_fewshot")} == {
        "version": 1.0,
        "samples": 40,
        "num_fewshot": 0,
    }
    assert "dense" not in compare({}, pruned)["small_text"]["metrics"]["word_perplexity"]
    shown = {row[0]: row for row in harness_rows(both)}
    assert shown["small_text word_perplexity"] == (
        "small_text word_perplexity",
        f"{before:,.2f}",
        f"{after:,.2f}",
        f"{after / before - 1:+.1%}",
    )
    accuracy = both["small_choice"]["metrics"]["acc"]
    points = 100 * (accuracy["pruned"]["value"] - accuracy["dense"]["value"])
    assert shown["small_choice acc"][1] == f"{accuracy['dense']['value']:.4f} ± {accuracy['dense']['stderr']:.4f}"
    assert shown["small_choice acc"][3] == f"{points:+.1f} points"
    assert [row[1::2] for row in harness_rows(compare({}, pruned))] == [("", "")] * 5


def test_the_same_twice_and_the_callers_random_numbers_and_streams_are_left_alone(
    dense: Path, task: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    file = task(test_split="test\nfewshot_split: test\nnum_fewshot: 1")
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(3), random.random()
    torch.manual_seed(5)
    random.seed(5)
    environment, level = dict(os.environ), logging.getLogger("lm_eval").level
    results = [evaluate(dense, file, seed=seed, limit=12) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
    assert (dict(os.environ), logging.getLogger("lm_eval").level) == (environment, level)
    assert results[0] == results[1]
    assert results[0] != results[2]
    assert results[0]["small_choice"]["num_fewshot"] == 1
    assert results[0]["small_choice"]["samples"] == 12
    out, err = capfd.readouterr()
    assert out == ""
    bars = ("Loading weights:", "Generating test split:")  # of the libraries; the command line silences them
    assert [line for line in err.splitlines() if line and not line.startswith(bars)] == []


def test_data_beside_the_file_or_in_the_working_directory(
    dense: Path, task: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = task(directory="first"), task(directory="second", task="other")
    data = second.parent / "small_choice.jsonl"
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:7]))
    check_tasks(["first/task.yaml", "./second"])
    results = evaluate(dense, "first/task.yaml", "./second")
    assert [results[name]["samples"] for name in ("small_choice", "other")] == [40, 7]
    data.rename(tmp_path / "small_choice.jsonl")
    assert evaluate(dense, "second/task.yaml")["other"]["samples"] == 7
    assert Path.cwd() == tmp_path
    (tmp_path / "small_choice.jsonl").unlink()
    said = refused(CorpusError, lambda: check_tasks(["second/task.yaml"]))
    assert said.startswith("the data of task second/task.yaml was not found (Unable to find ")
    assert said.endswith("expected it beside the .yaml file or in the working directory")
    assert Path.cwd() == tmp_path
    assert first.is_file()


def test_the_data_of_a_known_task_is_not_looked_for_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a stranger's: what has the dataset's name there would be taken for the Hub's."""
    (tmp_path / "baber" / "piqa").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    seen: list[list[str]] = []

    class Manager:
        def load(self, tasks: list[str]) -> dict[str, Any]:
            seen.append(os.listdir())
            return {"tasks": dict.fromkeys(tasks)}

    known = harness_tasks.Request("piqa", Manager(), {"piqa": None}, [("piqa", "lm-evaluation-harness")])
    assert known.load()["tasks"] == {"piqa": None}
    assert seen == [[]]
    assert Path.cwd() == tmp_path


def test_a_known_task_is_run_where_no_strangers_metric_lies(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several ask `evaluate` for a metric only when they are run, and that looks in the working directory first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rouge").mkdir()
    seen = []

    class Manager:
        def load(self, tasks: list[str]) -> dict[str, Any]:
            return {"tasks": {}}

    def run(model: Any, name: str, *rest: Any) -> dict[str, Any]:
        seen.append((name, sorted(os.listdir())))
        return {"group_subtasks": {}, "n-samples": {}, "results": {}}

    known = harness_tasks.Request("noticia", Manager(), {"noticia": None}, [("noticia", "lm-evaluation-harness")])
    local = harness_tasks.find_tasks([CHOICE])
    monkeypatch.setattr(harness, "find_tasks", lambda tasks: [known, *local])
    monkeypatch.setattr(harness, "_run", run)
    assert evaluate(dense, "noticia", CHOICE) == {}
    assert seen == [("noticia", []), (CHOICE, sorted(os.listdir(TASKS)))]
    assert Path.cwd() == tmp_path


def test_a_metric_of_the_working_directory_is_not_run_though_data_is_there(
    task: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    file = task()
    file.write_text(file.read_text().replace("metric: acc\n", "metric: evil\n"))
    (file.parent / "small_choice.jsonl").rename(tmp_path / "small_choice.jsonl")
    with suppress(SnpError):
        check_tasks([str(file)])
    assert not (tmp_path / "mark").exists()


def test_room_for_what_a_task_lets_a_model_write(dense: Path, task: Callable[..., Path]) -> None:
    """Known before the work: the harness asserts it after that."""
    config = load(dense).config
    assert check_tasks([CHOICE])[CHOICE].most == 0
    file = str(task("writing", max_gen_toks=str(POSITIONS)))
    asked = check_tasks([file])
    assert {name: one.most for name, one in asked.items()} == {file: POSITIONS}
    said = refused(OptionError, lambda: check_room(asked, config))
    assert said.startswith(f"task {file} lets a model write {POSITIONS} tokens, but this one has {POSITIONS} positions")
    check_room({file: Asked(POSITIONS - 1, "")}, config)
    for strange in ("many", "1e400", "[1]", "-5", "0"):
        file = str(task("writing", max_gen_toks=strange))
        said = refused(OptionError, lambda file=file: check_tasks([file]))
        assert said.startswith(f"task {file} cannot be asked (")


@pytest.mark.parametrize(
    "wrong",
    [
        {"aggregation": "nosuch"},
        {"do_sample": "false\n  foo: 3"},
        {"do_sample": "false\n  num_beams: 0"},
        {"output_type": 'generate_until\nfilter_list: [{name: x, filter: [{function: regex, regex_pattern: "("}]}]'},
    ],
)
def test_how_a_task_generates_and_counts_is_tried_at_the_start(
    wrong: dict[str, str], task: Callable[..., Path], dense: Path
) -> None:
    """The harness looks at it only when there are answers, which is after hours of pruning."""
    file = str(task("writing", **wrong))
    with suppress(OptionError):
        check_tasks([file])
        assert refused(OptionError, lambda: rehearse_tasks([file], dense, load_config(dense))).startswith(
            f"task {file} c"
        )


def test_a_metric_that_one_answer_has_no_value_of(dense: Path, task: Callable[..., Path]) -> None:
    file = task("writing", aggregation="!function utils.spread")
    file.with_name("utils.py").write_text(
        "import statistics\n\n\ndef spread(found):\n    return statistics.stdev(found)\n"
    )
    rehearse_tasks([str(file)], dense, load_config(dense))


def test_tasks_that_are_right_are_rehearsed(dense: Path, task: Callable[..., Path]) -> None:
    dated = str(task(version="1.0\n  2024-01-01: new questions"))
    assert check_tasks([dated])
    rehearse_tasks([CHOICE, TEXT, WRITING], dense, load_config(dense))


def test_no_question_may_have_a_token_beyond_the_embedding(dense: Path, tmp_path: Path) -> None:
    """The first has none, and the harness asks the others after the work."""
    first, *others = (set(row["text"].split()) for row in rows("text"))
    word = next(iter(sorted(others[-1] - first)))
    tokenizer = load_tokenizer(shutil.copytree(dense, tmp_path / "model"))
    tokenizer.add_tokens(["never-in-any-text"])
    tokenizer.save_pretrained(tmp_path / "model")
    rehearse_tasks([TEXT, CHOICE, WRITING], tmp_path / "model", load_config(dense))
    tokenizer.add_tokens([word])
    tokenizer.save_pretrained(tmp_path / "model")
    said = refused(CheckpointError, lambda: rehearse_tasks([TEXT], tmp_path / "model", load_config(dense)))
    assert said.endswith("it is the tokenizer of another model")


def test_questions_are_told_apart_by_what_they_ask(task: Callable[..., Path]) -> None:
    """What is known of a task is of these questions, judged in this way."""
    found = [check_tasks([CHOICE])[CHOICE].digest for _ in range(2)]
    assert found[0] == found[1]
    file = task()
    before = check_tasks([str(file)])[str(file)].digest
    data = file.with_name("small_choice.jsonl")
    data.write_text("\n".join(data.read_text().splitlines()[1:]))
    fewer = check_tasks([str(file)])[str(file)].digest
    file.write_text(file.read_text().replace("metric: acc\n", "metric: acc_norm\n"))
    assert len({before, fewer, check_tasks([str(file)])[str(file)].digest}) == 3


def test_no_fewer_examples_than_none(dense: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TASKS, tmp_path / "own"))
    with (folder / "small_choice.yaml").open("a") as file:
        file.write("\nnum_fewshot: -1\n")
    assert evaluate(dense, folder / "small_choice.yaml", limit=2)["small_choice"]["num_fewshot"] == 0


def test_what_a_task_says_in_words_does_not_get_into_a_report(dense: Path, task: Callable[..., Path]) -> None:
    """Its YAML is a person's, and a report with that could not be read again."""
    found = evaluate(dense, task(higher_is_better='"yes"'), limit=4)["small_choice"]
    assert {metric["higher_is_better"] for metric in found["metrics"].values()} <= {None, True}
    assert None in {metric["higher_is_better"] for metric in found["metrics"].values()}


def test_a_group_has_its_own_row_and_those_of_its_tasks(dense: Path, tmp_path: Path) -> None:
    for file in TASKS.glob("small_choice.*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "twin.yaml").write_text("include: small_choice.yaml\ntask: twin\ndoc_to_text: so\n")
    (tmp_path / "pair.yaml").write_text(
        "group: pair\ntask: [small_choice, twin]\naggregate_metric_list: [{metric: acc}]\nmetadata: {version: 3}\n"
    )
    results = evaluate(dense, tmp_path / "pair.yaml", limit=10)
    assert set(results) == {"pair", "small_choice", "twin"}
    assert results["pair"]["subtasks"] == ["small_choice", "twin"]
    assert results["pair"]["samples"] == 20
    assert results["pair"]["version"] == "3"
    mean = sum(results[name]["metrics"]["acc"]["value"] for name in ("small_choice", "twin")) / 2
    assert results["pair"]["metrics"]["acc"]["value"] == pytest.approx(mean)
    assert [row[0] for row in harness_rows(compare(results, results))] == ["pair acc"]
    assert evaluate(dense, tmp_path, limit=10) == results
    (tmp_path / "a").mkdir()
    shutil.copy(tmp_path / "pair.yaml", tmp_path / "a")
    said = refused(OptionError, lambda: check_tasks([str(tmp_path / "pair.yaml")]))
    assert said == f"task pair is defined in {tmp_path / 'pair.yaml'} and in {tmp_path / 'a' / 'pair.yaml'}; rename one"


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """lm_eval with three folders of its own tasks: to read all twelve thousand takes a quarter of a minute."""
    from lm_eval.tasks import manager

    folder = Path(manager.__file__).parent
    for name in ("piqa", "arc", "mmlu/default"):
        shutil.copytree(folder / name, tmp_path / "tasks" / name)
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "tasks" / "manager.py"))
    harness_tasks._manager.cache_clear()
    yield
    harness_tasks._manager.cache_clear()


@pytest.mark.usefixtures("few_tasks")
def test_tasks_of_the_harness_are_known_and_others_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert refused(OptionError, lambda: check_tasks(["piqa", "arc_eazy"])).endswith("did you mean 'arc_easy'?")
    assert "lists them" in refused(OptionError, lambda: check_tasks(["?!"]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "piqa").mkdir()  # where lm_eval itself writes its results
    (tmp_path / "group.yaml").write_text("group: mine\ntask: [piqa, {task: arc_easy, num_fewshot: 2}]\n")
    piqa, *others, group = harness_tasks.find_tasks(["piqa", "mmlu", "ai2_arc", "group.yaml"])
    assert [request.name for request in (piqa, *others)] == ["piqa", "mmlu", "ai2_arc"]
    assert not piqa.local
    assert {"piqa", "arc_easy"} <= set(group.manager.all_tasks)
    said = refused(HubError, lambda: check_tasks(["piqa"]))
    assert said.startswith("task piqa or its data could not be had (Couldn't reach 'baber/piqa' on the Hub")
    assert said.endswith("check the network, or give a local task, as in harness:./my_tasks/choice.yaml")


@pytest.mark.parametrize("entry", ["harness:", "harness:piqa,", "harness:,piqa"])
def test_nothing_where_a_task_should_be(entry: str) -> None:
    said = refused(OptionError, lambda: check_tasks(tasks_of([entry])))
    assert said.startswith("harness: must be followed by tasks, as in harness:piqa,arc_easy")


def test_lm_eval_is_not_installed(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for call in (lambda: check_tasks(["piqa"]), lambda: evaluate(dense, "piqa")):
        said = refused(OptionError, call)
        assert said.startswith("harness:piqa needs lm-evaluation-harness (")
        assert said.endswith("pip install 'lm_eval>=0.4.12'")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("task: [", "cannot be read as a task of lm-evaluation-harness"),
        ("- a\n", "it has no keys"),
        ("include: other.yaml\n", "other.yaml cannot be read"),
        ("dataset_path: json\n", 'expected a .yaml file with "task: NAME"'),
        ("task: x\ndataset_path: json\noutput_type: guess\n", "Got invalid output_type 'guess'"),
        ("task: x\nfoo: 1\n", "unexpected keyword argument 'foo'"),
        (
            "task: x\nprocess_docs: !function nowhere.f\n",
            "needs a module that is not installed (No module named 'nowhere')",
        ),
        ("task: x\nclass: !function own.Broken\n", "RuntimeError: it broke"),
    ],
)
def test_files_that_are_no_task(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "task.yaml").write_text(content)
    (tmp_path / "own.py").write_text("def Broken():\n    raise RuntimeError('it broke')\n")
    assert said in refused(OptionError, lambda: check_tasks([str(tmp_path / "task.yaml")]))
    assert said in refused(OptionError, lambda: check_tasks([str(tmp_path)]))


def test_paths_that_are_no_task(tmp_path: Path, task: Callable[..., Path]) -> None:
    said = refused(OptionError, lambda: check_tasks([str(tmp_path / "none.yaml")]))
    assert "none.yaml cannot be read as a task of lm-evaluation-harness ([Errno 2] No such file" in said
    (tmp_path / "empty").mkdir()
    assert "empty has no task" in refused(OptionError, lambda: check_tasks([str(tmp_path / "empty")]))
    assert "no .yaml file or directory either" in refused(OptionError, lambda: check_tasks([str(tmp_path / "none")]))
    first, second = task(directory="first"), task(directory="second")
    said = f"task small_choice is defined in {first} and in {second}; rename one"
    assert refused(OptionError, lambda: check_tasks([str(first), str(second.parent)])) == said
    check_tasks([str(first), str(first.parent)])
    os.mkfifo(tmp_path / "first" / "pipe.yaml")  # which would never end
    assert "it is a pipe, a device or a directory" in refused(OptionError, lambda: check_tasks([str(first.parent)]))


def test_a_question_that_cannot_be_asked_is_told_before_the_work(task: Callable[..., Path]) -> None:
    """The last of them, too: requests are made once."""
    file = task(doc_to_text='"{{context.upper()}}"')
    with (file.parent / "small_choice.jsonl").open("a") as lines:
        lines.write(json.dumps(rows("choice")[0] | {"context": None}) + "\n")
    assert f"task {file} cannot be asked (" in refused(OptionError, lambda: check_tasks([str(file)]))


def test_a_task_that_the_model_cannot_do(dense: Path, task: Callable[..., Path]) -> None:
    file = task("writing", max_gen_toks=str(POSITIONS))
    said = refused(OptionError, lambda: evaluate(dense, file))
    assert said.startswith(f"task {file} cannot be run on this model (AssertionError: Invalid configuration: ")
    assert f"({POSITIONS}) must be less than model's maximum sequence length ({POSITIONS})" in said
    file = task(doc_to_target='"{{nothing + 1}}"')
    assert "'nothing' is undefined" in refused(OptionError, lambda: evaluate(dense, file))


def test_a_model_that_is_none(dense: Path, tmp_path: Path) -> None:
    assert "has no tokenizer" in refused(CheckpointError, lambda: evaluate(tmp_path, CHOICE))
    shutil.copytree(dense, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert "model has no weights" in refused(CheckpointError, lambda: evaluate(tmp_path / "model", CHOICE))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no weights")
    assert "is no model that transformers" in refused(CheckpointError, lambda: evaluate(tmp_path / "model", CHOICE))


def test_logits_that_are_not_finite(tmp_path: Path) -> None:
    model = tiny_opt()
    with torch.no_grad():
        model.model.decoder.final_layer_norm.bias += math.nan
    save(model, tmp_path)
    assert "logits are not finite" in refused(NumericalError, lambda: evaluate(tmp_path, CHOICE, limit=2))


def test_a_tokenizer_without_special_tokens(dense: Path, tmp_path: Path) -> None:
    shutil.copytree(dense, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    fields = {key: value for key, value in json.loads(path.read_text()).items() if not key.endswith("_token")}
    path.write_text(json.dumps(fields))
    assert load_tokenizer(tmp_path / "model").eos_token_id is None
    results = evaluate(tmp_path / "model", TASKS, limit=8)
    assert list(results) == ["small_choice", "small_text", "small_writing"]


@pytest.mark.parametrize(
    "added", [{"pad_token": "[PAD]"}, {"pad_token": "[PAD]", "eos_token": "<|im_end|>"}, {"unk_token": "<|u|>"}]
)
def test_what_pads_may_be_a_token_that_the_model_has_none_of(
    added: dict[str, str], dense: Path, found: dict[str, Any], tmp_path: Path
) -> None:
    """Added for a training, as often with Llama; only questions in a batch of several are padded."""
    tokenizer = load_tokenizer(shutil.copytree(dense, tmp_path / "model"))
    tokenizer.pad_token = None
    tokenizer.add_special_tokens(added)
    tokenizer.save_pretrained(tmp_path / "model")
    assert len(load_tokenizer(tmp_path / "model")) > load(dense).config.vocab_size
    rehearse_tasks([WRITING], tmp_path / "model", load_config(dense))
    assert evaluate(tmp_path / "model", WRITING) == {"small_writing": found["small_writing"]}


def test_what_an_untrained_model_loses_is_no_reason(task: Callable[..., Path]) -> None:
    """A text without spaces is one word, whose perplexity is no number for a model that has learnt nothing."""
    file = task("text")
    (file.parent / "small_text.jsonl").write_text(json.dumps({"text": "===season" * 24}) + "\n")
    rehearse_tasks([str(file)], EMBEDDED, load_config(EMBEDDED))


def test_batches_get_smaller_where_memory_is_short(
    dense: Path, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import OPTForCausalLM

    real, sizes, room = OPTForCausalLM.forward, [], 3

    def forward(self: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, input_ids, **options)

    monkeypatch.setattr(OPTForCausalLM, "forward", forward)
    result = evaluate(dense, CHOICE)["small_choice"]
    assert result["metrics"] == found["small_choice"]["metrics"]
    assert sizes[:3] == [8, 4, 2]
    assert max(sizes[3:]) == 2
    room = 0
    said = refused(DeviceMemoryError, lambda: evaluate(dense, CHOICE))
    assert said == f"cpu ran out of memory in task {CHOICE}; use --device cpu"
