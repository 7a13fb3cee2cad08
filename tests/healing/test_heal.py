"""Healing a tiny result: the loss falls, the format stays, an interruption changes nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LENGTH, SAMPLES, Prune, Shell, copied, load, logits, paragraphs, save, tiny_opt, weight_files
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from torch import Tensor

from llm_snp import cli
from llm_snp.dense.data import evaluation_windows
from llm_snp.dense.tokenizer import load_tokenizer
from llm_snp.documents.card import model_card
from llm_snp.documents.page import html_page
from llm_snp.documents.plots import PLOTS
from llm_snp.documents.schema import MOST, fault
from llm_snp.documents.writing import read_report
from llm_snp.errors import NumericalError, OptionError, OutputError
from llm_snp.evaluation.perplexity import Perplexity
from llm_snp.healing import run, training
from llm_snp.healing.defaults import completed, evaluated_before
from llm_snp.healing.options import HealConfig, command_line
from llm_snp.healing.pair import find_pair
from llm_snp.healing.record import label, with_healing
from llm_snp.healing.resume import identity_of
from llm_snp.healing.run import _full
from llm_snp.healing.text import material
from llm_snp.healing.training import Watch, adapted
from llm_snp.result import own_code
from llm_snp.result.own_code import MODELING
from llm_snp.result.rewriting import Rewriting
from llm_snp.system.files import digest_of_bytes
from llm_snp.system.manifest import changed, manifest, sealed
from llm_snp.system.remembering import recall, remember

pytestmark = [pytest.mark.cpu]

STEPS, BATCH = 12, 4
TOKENS = STEPS * BATCH * LENGTH


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text to train on, about 150 windows."""
    path = tmp_path_factory.mktemp("text") / "training.txt"
    path.write_text("\n\n".join(paragraphs(100, seed=4)))
    return path


@pytest.fixture(scope="module")
def pruned(dense: Path, held_out: Path, prune: Prune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result with a class of its own, not repaired, and with a perplexity."""
    output = tmp_path_factory.mktemp("pruned") / "tiny-50"
    prune(dense, output, 0.5, attention="dims", target="none", evaluate=(str(held_out),))
    return output


class Healer:
    """The command with few tokens of the module's text."""

    def __init__(self, shell: Shell, corpus: Path):
        self.shell, self.corpus = shell, corpus

    def __call__(self, directory: Path, *arguments: object) -> tuple[int, str, str]:
        words = ["heal", directory, "--text", self.corpus, "--tokens", TOKENS, "--batch", BATCH, "--output", "healed"]
        words += ["--sequence-length", LENGTH, "--device", "cpu", "--learning-rate", "1e-3"]
        given = [str(argument) for argument in arguments]
        if "--text" in given:
            del words[2:4]
        return self.shell.run(*map(str, words), *given)

    def refused(self, directory: Path, *arguments: object) -> str:
        before = sorted(self.shell.directory.rglob("*"))
        code, out, err = self(directory, "--quiet", *arguments)
        assert (code, out) == (2, ""), err
        assert err.count("\n") == 1, err
        assert sorted(self.shell.directory.rglob("*")) == before
        return err.removeprefix("llm_snp: ").strip()


@pytest.fixture
def heal(shell: Shell, corpus: Path) -> Healer:
    return Healer(shell, corpus)


def interrupted(*arguments: Any, **options: Any) -> None:
    raise KeyboardInterrupt


def stopped_at_the_second_state(patch: pytest.MonkeyPatch) -> list[int]:
    """Have a training interrupted once, when its second state is saved; the steps at which states were."""
    saved: list[int] = []
    on_save = Watch.on_save

    def save(self: Watch, args: Any, state: Any, control: Any, **options: Any) -> None:
        on_save(self, args, state, control, **options)
        saved.append(state.global_step)
        if len(saved) == 2:
            raise KeyboardInterrupt

    patch.setattr(Watch, "on_save", save)
    return saved


def report_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "report.json").read_text())  # type: ignore[no-any-return]


def test_only_the_same_text_is_measured_again(pruned: Path, held_out: Path, tmp_path: Path) -> None:
    """The name and the perplexity of a text go into what is published: a stranger might choose it, not what it has."""
    memory = recall(pruned)
    assert evaluated_before(memory) == [str(held_out)]
    assert evaluated_before(memory | {"read": {}}) == []
    diary = tmp_path / "diary.txt"
    diary.write_text("Dear diary")
    others = {"evaluate": ["wikitext2", "self", str(diary), str(tmp_path / "none.txt"), "harness:arc_easy"]}
    assert evaluated_before({"options": others, "read": memory["read"]}) == ["wikitext2"]


def test_what_a_result_was_calibrated_on_is_what_it_is_healed_on(heal: Healer, dense: Path, text: Path) -> None:
    """Without --text and --tokens: the same texts with their shares, and as many tokens."""
    shell = heal.shell
    Path("other.txt").write_text("\n\n".join(paragraphs(100, seed=4)))
    texts = (str(text), "other.txt:2")
    pruning = [word for given in texts for word in ("--calibration", given)]
    assert shell.prune(dense, "--sparsity", "0.5", "--attention", "dims", "--target", "none", *pruning)[0] == 0
    asked = ["--batch", str(BATCH), "--sequence-length", str(LENGTH), "--learning-rate", "1e-3", "--device", "cpu"]
    asked.append("--quiet")
    code, _, err = shell.run("heal", "out", *asked)
    assert code == 0, err
    [section] = report_of(Path("out-healed"))["healing"]
    assert section["options"]["text"] == [text.name, "other.txt:2"]
    assert section["options"]["tokens"] == SAMPLES * LENGTH
    explicit = [word for given in texts for word in ("--text", given)]
    code, _, err = shell.run("heal", "out", *asked, *explicit, "--tokens", str(SAMPLES * LENGTH), "--output", "same")
    assert code == 0, err
    for name in weight_files(Path("same")):
        assert Path("same", name).read_bytes() == Path("out-healed", name).read_bytes()

    long = HealConfig("out", batch=2 * SAMPLES, sequence_length=LENGTH)
    assert completed(long, find_pair(long)).tokens == 2 * SAMPLES * LENGTH, "one step at least"

    Path("other.txt").write_text("Of something else.")
    said = shell.run("heal", "out", *asked, "--output", "third")[2]
    assert said.startswith(
        "llm_snp: other.txt, which out was calibrated on, is not here, or is not as it was then; give"
    )
    shutil.copytree("out", "copy")
    said = shell.run("heal", "copy", *asked, "--teacher", str(dense))[2]
    assert said.startswith(
        "llm_snp: copy does not know here what text it was calibrated on, as it is a copy; give --text"
    )
    assert not Path("third").exists()
    assert not Path("copy-healed").exists()


def test_weights_that_have_changed_since_they_were_hashed_are_not_trained(
    heal: Healer, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another terminal prunes into the same place while the text is read."""
    result = Path(shutil.copytree(pruned, tmp_path / "there"))
    shard = min(name for name in weight_files(result) if name.endswith(".safetensors"))

    def read(*arguments: Any) -> Any:
        tensors = load_file(result / shard)
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, result / shard, {"format": "pt"})
        return material(*arguments)

    monkeypatch.setattr("llm_snp.healing.run.material", read)
    said = heal.refused(result, "--teacher", find_pair(HealConfig(str(pruned))).teacher.directory, "--no-evaluate")
    assert said == f"{result / shard} has changed since it was first read; put back the file as it was"


@pytest.mark.parametrize("command", ["heal", "export", "bench", "push"])
def test_weights_beside_a_result_are_not_taken_for_its_own(
    heal: Healer, pruned: Path, tmp_path: Path, command: str
) -> None:
    """transformers, and all that reads as it does, would take `model.safetensors` before the listed shards."""
    result = Path(shutil.copytree(pruned, tmp_path / "there"))
    shutil.copy(min(path for path in result.glob("*.safetensors")), result / "model.safetensors")
    more = {"export": ["--gguf", "there.gguf"], "push": ["ann/there"], "heal": ["--text", str(heal.corpus)]}
    code, _, err = heal.shell.run(command, result, *more.get(command, []))
    assert code == 2
    assert "is no file of the result, and would be read in place of its weights; move it" in err
    assert not Path("there.gguf").exists()


def test_a_result_that_no_healing_made_is_not_gone_on_with(heal: Healer, pruned: Path, tmp_path: Path) -> None:
    copied(pruned, Path("healed"))
    said = heal.refused(pruned, "--no-evaluate", "--resume")
    assert said == "--resume: healed is a result, but no healing of this machine; give another --output, or --overwrite"


def test_a_model_that_was_trained_in_place_is_told_so(heal: Healer, pruned: Path, tmp_path: Path) -> None:
    """save_pretrained removes the shards, so "move it" would leave none."""
    result = copied(pruned, tmp_path / "there")
    load(result).save_pretrained(result)
    assert "is in place of the result's weights, as training leaves it" in heal.refused(result, "--no-evaluate")


def test_other_ways_to_train_that_the_environment_asks_for_are_refused(
    heal: Healer, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch` with a DeepSpeed config sets it; the Trainer would follow, after everything was measured."""
    for name, value in (("USE_DEEPSPEED", "true"), ("MIXED_PRECISION", "bf16"), ("DYNAMO_BACKEND", "inductor")):
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_{name}", value)
            assert heal.refused(pruned).startswith(f"ACCELERATE_{name} is set in the environment, but heal trains with")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # `accelerate launch` sets these
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "default")
    monkeypatch.setenv("ACCELERATE_LOG_LEVEL", "INFO")
    HealConfig(str(pruned), ("x",), 1).validate()


@pytest.mark.parametrize("name", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_one_of_several_tasks_of_a_job_is_told_at_the_start(
    name: str, heal: Healer, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "2")
    assert f"{name} is 2: this is one of several tasks of a job" in heal.refused(pruned)
    monkeypatch.setenv(name, "1")
    HealConfig(str(pruned), ("x",), 1).validate()


def test_a_rank_of_no_processes_is_told_at_the_start(
    heal: Healer, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a shell below torchrun has it."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert heal.refused(pruned).startswith("LOCAL_RANK is 0 in the environment")


def test_what_the_files_spell_otherwise_is_written_too(pruned: Path, tmp_path: Path) -> None:
    """Older versions of transformers called some tensors otherwise, which are read all the same."""
    source = copied(pruned, tmp_path / "older")
    index = source / "model.safetensors.index.json"
    tensors: dict[str, Tensor] = {}
    for path in source.glob("*.safetensors"):
        found = load_file(path)
        tensors |= found
        save_file({name.removeprefix("model."): tensor for name, tensor in found.items()}, path)
    content = json.loads(index.read_text())
    content["weight_map"] = {name.removeprefix("model."): file for name, file in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    (tmp_path / "written").mkdir()
    Rewriting(source).write(tmp_path / "written", tensors)
    written: dict[str, Tensor] = {}
    for path in (tmp_path / "written").glob("*.safetensors"):
        written |= load_file(path)
    assert set(written) == set(tensors)
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)


def test_fewer_windows_than_texts(heal: Healer, pruned: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("some words")
    few = ("--tokens", LENGTH, "--batch", 1, "--text", heal.corpus, "--text", other)
    assert "--tokens comes to 1 windows of" in heal.refused(pruned, *few)


def test_more_tokens_than_there_can_be_are_refused_at_once(heal: Healer, pruned: Path) -> None:
    assert "windows were asked for; 16,777,216 are the most" in heal.refused(pruned, "--tokens", 10**15)


def test_text_that_the_model_wrote_is_not_trained_on_unasked(heal: Healer, dense: Path) -> None:
    assert heal.shell.prune(dense, "--sparsity", "0.5", "--calibration", "self")[0] == 0
    said = heal.shell.run("heal", "out", "--quiet")[2]
    assert said.startswith(
        "llm_snp: out was calibrated on text that the model wrote itself, which is too little to train"
    )


def without_weights(directory: Path) -> dict[str, bytes]:
    """What a result consists of beside weights, hashes and documents."""
    names = [name for name in manifest(directory) if not name.startswith(("README", "report", "plots"))]
    return {name: (directory / name).read_bytes() for name in names if not name.endswith(".safetensors")}


def kl(student: Path, teacher: Path, text: Path) -> float:
    """Mean over the positions of a text, from whole models."""
    ids = evaluation_windows(str(text), load_tokenizer(teacher), LENGTH).tokens
    found, wanted = (logits(load(directory), ids).double().log_softmax(-1) for directory in (student, teacher))
    return ((wanted.exp() * (wanted - found)).sum(-1)).mean().item()


def test_pruning_and_healing_alternate(
    heal: Healer, pruned: Path, prune: Prune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is learned from is the dense model at the beginning of the chain, or what is still there of it."""
    assert heal(pruned)[0] == 0
    report = prune(tmp_path / "healed", tmp_path / "again", 0.2)
    assert [(parent["name"], parent["healed"]) for parent in report["parents"]] == [("tiny", TOKENS)]
    assert f"then trained for {TOKENS:,} tokens): " in model_card(report)
    pair = find_pair(HealConfig(str(tmp_path / "again"), (), 1))
    assert (pair.teacher.name, pair.its_own) == ("tiny", False)
    for there, teacher in (("nowhere", "healed"), ("healed", "healed"), ("again", "healed")):
        found = {"again": str(tmp_path / "healed"), "healed": str(tmp_path / there)}
        monkeypatch.setattr("llm_snp.result.origin.dense_of", lambda place, _, found=found: found[place.name])
        assert find_pair(HealConfig(str(tmp_path / "again"), (), 1)).teacher.directory.name == teacher


def test_the_held_out_loss_falls_and_the_format_stays(heal: Healer, pruned: Path, dense: Path, held_out: Path) -> None:
    code, out, err = heal(pruned)
    assert code == 0, err
    report = read_report(Path("healed"))
    (step,) = report["healing"]
    losses = [entry["loss"] for entry in step["curve"]]
    assert losses[0] > losses[1] > losses[-1]
    assert step["held_out"]["after"]["loss"] == pytest.approx(min(losses), rel=1e-3)
    assert kl(Path("healed"), dense, held_out) < 0.8 * kl(pruned, dense, held_out)
    assert (step["tokens"], step["steps"], step["lora"]) == (TOKENS, STEPS, None)
    # Every step or batch has its line, with the time that is left.
    assert f"step {STEPS}/{STEPS}  held-out: KL" in err
    assert " left)" in err
    assert "healed   1,536 tokens in 12 steps" in out
    # The files are those of the pruned one, and documents tell what was done.
    assert without_weights(Path("healed")) == without_weights(pruned)
    assert changed(Path("healed"), manifest(Path("healed"))) == ([], [])
    assert PLOTS["healing"].draw(report) is not None
    assert PLOTS["healing"].draw(report_of(pruned)) is None
    for text in ((Path("healed") / "README.md").read_text(), html_page(report)):
        assert "trained for 1,536 tokens to predict what tiny predicts" in text
        assert "No training followed" not in text
        assert f"--tokens {TOKENS}" in text
    assert str(pruned.parent) not in (Path("healed") / "report.json").read_text()
    # What was measured of the pruned model is not said of the healed one.
    ((source, both),) = report["evaluation"].items()
    earlier = report_of(pruned)["evaluation"][source]
    assert both["dense"]["perplexity"] == pytest.approx(earlier["dense"]["perplexity"], rel=1e-4)
    assert step["evaluation"][source]["before"] == pytest.approx(earlier["pruned"]["perplexity"], rel=1e-4)
    assert both["pruned"]["perplexity"] == step["evaluation"][source]["after"]
    assert both["pruned"]["perplexity"] != earlier["pruned"]["perplexity"]
    said = heal.shell.run(str(dense), "--output", "healed", "--resume", "--calibration", str(heal.corpus))[2]
    assert "healed is finished and was healed since; give another --output" in said
    # And it can be healed again: sections add up.
    code, out, err = heal(Path("healed"), "--output", "twice", "--lora", 2, "--no-evaluate")
    assert code == 0, err
    again = read_report(Path("twice"))
    assert [one["lora"] for one in again["healing"]] == [None, 2]
    assert again["evaluation"] == {}
    assert any("measured before the healing only, and left out: perplexity on" in note for note in again["notes"])
    assert fault(again) == ""


def test_another_text_of_that_name_is_not_compared_with(pruned: Path) -> None:
    """The dense model's figure is of the text that had the name then."""
    report = report_of(pruned)
    ((name, results),) = report["evaluation"].items()
    section = {"teacher": {"its_own": False}}
    after = Perplexity(**results["pruned"])
    same = with_healing(report, section, {name: {"after": after}}, [], Path("healed"))
    assert same["evaluation"] == {name: {"dense": results["dense"], "pruned": results["pruned"]}}
    other = {f"elsewhere/{name}": {"after": dataclasses.replace(after, sha256="0" * 64)}}
    assert with_healing(report, section, other, [], Path("healed"))["evaluation"] == {}


def test_a_stock_result_stays_one(heal: Healer, dense: Path, prune: Prune, tmp_path: Path, held_out: Path) -> None:
    prune(dense, tmp_path / "stock", 0.3, format="stock", target="none")
    assert heal(tmp_path / "stock", "--checkpointing", "--accumulate", "2", "--text-loss", "0.2")[0] == 0
    assert json.loads(Path("healed/config.json").read_text())["model_type"] == "opt"
    assert without_weights(Path("healed")) == without_weights(tmp_path / "stock")
    assert kl(Path("healed"), dense, held_out) < kl(tmp_path / "stock", dense, held_out)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_other_families_heal(name: str, heal: Healer, prune: Prune, tmp_path: Path, held_out: Path) -> None:
    """Tied and transposed weights, query heads that read one key, a head with another name in files."""
    model = save_tiny(name, tmp_path / name)
    prune(model, tmp_path / "pruned", 0.3, target="none")
    code, _, err = heal(tmp_path / "pruned", "--lora", 4, "--learning-rate", "1e-2")
    assert code == 0, err
    assert kl(Path("healed"), model, held_out) < kl(tmp_path / "pruned", model, held_out)
    assert without_weights(Path("healed")) == without_weights(tmp_path / "pruned")
    keys = [
        {path.name: set(load_file(path)) for path in of.glob("*.safetensors")}
        for of in (tmp_path / "pruned", Path("healed"))
    ]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("flags", [(), ("--lora", "4")], ids=["all", "lora"])
def test_an_interruption_changes_nothing(
    flags: tuple[str, ...], heal: Healer, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the second state: the same command with --resume comes to the same bytes."""
    assert heal(pruned, *flags, "--no-evaluate", "--output", "whole")[0] == 0
    with monkeypatch.context() as patch:
        saved = stopped_at_the_second_state(patch)
        code, out, err = heal(pruned, *flags, "--no-evaluate")
    assert (code, out) == (130, "")
    assert f"after step {saved[-1]} is kept in {Path('healed.partial').absolute()}; go on with: python -m" in err
    assert not Path("healed").exists()
    assert "holds the state of an interrupted run; add --resume" in heal.refused(pruned, *flags, "--no-evaluate")
    assert "--resume: --seed is 1 now and was 0" in heal.refused(pruned, *flags, "--resume", "--seed", 1)
    code, _, err = heal(pruned, *flags, "--no-evaluate", "--resume")
    assert code == 0, err
    assert f"step {saved[-1]} was finished before" in err
    assert weight_files(Path("healed")) == weight_files(Path("whole"))
    found, expected = (report_of(Path(name))["healing"][0]["curve"] for name in ("healed", "whole"))
    assert found == expected
    assert not Path("healed.partial").exists()
    assert heal(pruned, *flags, "--no-evaluate", "--resume")[1] == "healed is finished already\n"
    assert heal(pruned, *flags, "--no-evaluate", "--resume", "--overwrite")[1] == "healed is finished already\n"
    assert "and --seed is 1 now and was 0 there" in heal.refused(pruned, *flags, "--resume", "--seed", "1")
    # What would be measured otherwise is not there.
    assert "and --evaluate is None now and was [] there" in heal.refused(pruned, *flags, "--resume")


@pytest.mark.parametrize("format", ["auto", "stock"])
def test_an_interruption_changes_nothing_where_files_have_other_names(
    format: str, heal: Healer, prune: Prune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of GPT-NeoX's head: a state is read by the names that the model has, and what is missing is not told."""
    prune(save_tiny("gpt_neox", tmp_path / "dense"), tmp_path / "pruned", 0.3, target="none", format=format)
    flags = ("--no-evaluate", "--learning-rate", "3e-3")
    assert heal(tmp_path / "pruned", *flags, "--output", "whole")[0] == 0
    stopped_at_the_second_state(monkeypatch)
    assert heal(tmp_path / "pruned", *flags)[0] == 130
    code, _, err = heal(tmp_path / "pruned", *flags, "--resume")
    assert code == 0, err
    assert weight_files(Path("healed")) == weight_files(Path("whole"))


def test_the_code_of_a_result_is_not_needed(heal: Healer, pruned: Path, tmp_path: Path) -> None:
    """Nothing that llm_snp fetches from the Hub has it, and what is written has this version's."""
    result = copied(pruned, tmp_path / "result")
    (result / MODELING).unlink()
    assert heal(result, "--no-evaluate")[0] == 0
    assert Path("healed", MODELING).read_bytes() == (pruned / MODELING).read_bytes()


def test_a_state_with_other_names_is_not_gone_on_with(
    heal: Healer, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another transformers gives them to a GPT-NeoX: its head would be that of the beginning, without a word."""
    with monkeypatch.context() as patch:
        stopped_at_the_second_state(patch)
        assert heal(pruned, "--no-evaluate")[0] == 130
    monkeypatch.setattr(run, "digest_of_json", lambda names: str(len(names)))
    said = heal.refused(pruned, "--no-evaluate", "--resume")
    assert said.startswith("--resume: the hash of the trained tensors' names, which this transformers gives, is ")


def test_no_state_goes_before_the_next_one_is_noted(
    heal: Healer, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted between the Trainer's writing of a state and its hash: the training goes on from the one before."""
    steps: list[int] = []
    on_save = Watch.on_save

    def before_the_third(self: Watch, args: Any, state: Any, control: Any, **options: Any) -> None:
        steps.append(state.global_step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        on_save(self, args, state, control, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "on_save", before_the_third)
        code, _, err = heal(pruned, "--no-evaluate")
    assert code == 130
    assert f"after step {steps[1]} is kept in" in err
    code, _, err = heal(pruned, "--no-evaluate", "--resume")
    assert code == 0, err
    assert f"step {steps[1]} was finished before" in err
    assert "made again" not in err


def test_of_the_states_the_last_and_the_best_stay(heal: Healer, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, count = training.Heal.measure, iter(range(100))

    def best_at_the_second(self: training.Heal) -> dict[str, float]:
        return measure(self) | {"loss": float(abs(next(count) - 2))}

    with monkeypatch.context() as patch:
        patch.setattr(training.Heal, "measure", best_at_the_second)
        patch.setattr(training, "PATIENCE", 99)
        patch.setattr(training.Heal, "_load_best_model", interrupted)
        assert heal(pruned, "--no-evaluate")[0] == 130
    every = training.Schedule(STEPS, BATCH).every
    folder = Path("healed.partial/.llm_snp")
    assert {path.name for path in (folder / "training").iterdir()} == {f"checkpoint-{2 * every}", f"checkpoint-{STEPS}"}
    assert sorted(path.name for path in folder.glob("state-*")) == [
        f"state-{step:08d}.json" for step in (2 * every, STEPS)
    ]
    # The best one is what would be written: damaged, it is not gone on with, though the last one is whole.
    weights = folder / "training" / f"checkpoint-{2 * every}" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100:] = bytes(100)
    weights.write_bytes(content)
    code, _, err = heal(pruned, "--no-evaluate", "--resume")
    assert code == 0, err
    assert f"after step {2 * every} was gone or damaged: made again" in err
    assert "was finished before" not in err
    assert any(f"after step {2 * every} was gone" in note for note in report_of(Path("healed"))["notes"])


def test_a_damaged_state_is_not_gone_on_with(heal: Healer, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Watch, args: Any, state: Any, control: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "on_step_end", full)
        code, _, err = heal(pruned, "--no-evaluate")
    assert code == 2
    assert "the disk is full" in err
    assert not list(Path().iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(training, "EVALUATIONS", 3)
        patch.setattr(training.Heal, "_load_best_model", interrupted)
        assert heal(pruned, "--no-evaluate")[0] == 130
        states = sorted(Path("healed.partial/.llm_snp/training").iterdir())
        (states[-1] / "optimizer.pt").write_bytes(b"damaged")
        states[-1].with_name("checkpoint-old").mkdir()  # no state
        patch.undo()
    code, _, err = heal(pruned, "--no-evaluate", "--resume")
    assert code == 0, err
    assert "was gone or damaged: made again" in err
    assert any("was gone or damaged" in note for note in report_of(Path("healed"))["notes"])


def test_merged_matrices_are_what_was_trained(pruned: Path, ids: Tensor) -> None:
    model = load(pruned)
    before = logits(model, ids)
    adapter = adapted(model, 4)
    assert {p.dtype for p in adapter.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(logits(adapter, ids), before)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    unmerged = logits(adapter, ids)
    assert (unmerged - before).abs().max() > 0.1
    merged = adapter.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), unmerged, rtol=1e-4, atol=1e-4)
    assert merged.state_dict().keys() == load(pruned).state_dict().keys()


def test_never_worse_than_before(heal: Healer, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A learning rate that harms: the run ends early, says so, and writes nothing. What was interrupted goes, too."""
    with monkeypatch.context() as patch:
        patch.setattr(training.Heal, "_load_best_model", interrupted)
        assert heal(pruned, "--no-evaluate")[0] == 130
    assert list(Path("healed.partial/.llm_snp/training").iterdir())
    code, out, err = heal(pruned, "--learning-rate", "10", "--no-evaluate", "--overwrite")
    assert code == 0, err
    assert out.startswith(f"kept     {pruned} as it is, and nothing is written: on held-out windows the loss was ")
    assert not list(Path().iterdir())


def test_what_happens_while_it_trains_costs_nothing(
    heal: Healer, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory that it began with is another one by the end, llm_snp itself is upgraded, and the loss overflows:
    the best state is written.
    """
    result = copied(pruned, tmp_path / "result")
    remember(result, {"model": recall(pruned)["model"], "read": recall(pruned)["read"]})
    measure, measured = training.Heal.measure, []

    def breaks(self: training.Heal) -> dict[str, float]:
        measured.append(self.state.global_step)
        monkeypatch.setattr(own_code, "bundle", interrupted)
        (result / "config.json").unlink(missing_ok=True)
        remember(result, {"model": "/other/model"})
        if len(measured) == 3:
            raise NumericalError("the loss is not finite after 4 steps; give a smaller --learning-rate")
        return measure(self)

    monkeypatch.setattr(training.Heal, "measure", breaks)
    code, _, err = heal(result, "--no-evaluate")
    assert code == 0, err
    report = report_of(Path("healed"))
    assert report["notes"][-1].startswith("the training ended early, with what was best until then: the loss is not")
    assert recall(Path("healed"))["model"] == recall(pruned)["model"]
    assert (report["healing"][0]["steps"], report["healing"][0]["held_out"]["after"]["step"]) == (2, 2)
    assert without_weights(Path("healed")) == without_weights(pruned)


def test_logits_that_are_not_finite_cost_a_number_only(
    heal: Healer, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = run._Healing._measure

    def overflows(self: run._Healing, which: str, *arguments: Any) -> Any:
        if which == "after":
            raise NumericalError("the model's logits are not finite; use --dtype float32 or bfloat16")
        return measure(self, which, *arguments)

    monkeypatch.setattr(run._Healing, "_measure", overflows)
    assert heal(pruned)[0] == 0
    report = report_of(Path("healed"))
    (name,) = report["evaluation"]
    assert report["notes"][-1] == f"the healed model's logits are not finite: no perplexity on {name}"
    assert report["evaluation"][name]["pruned"]["perplexity"] > 1e29


def test_a_token_that_the_model_has_not(
    heal: Healer, dense: Path, held_out: Path, prune: Prune, tmp_path: Path
) -> None:
    """Somebody has added one and left the embedding as it is: in the text trained on, or the one measured on."""
    teacher, result = copied(dense, tmp_path / "dense"), tmp_path / "result"
    count = json.loads((dense / "config.json").read_text())["vocab_size"]
    settings = json.loads((teacher / "tokenizer.json").read_text())
    settings["added_tokens"].append({**settings["added_tokens"][-1], "id": count, "content": "<extra>"})
    (teacher / "tokenizer.json").write_text(json.dumps(settings))
    prune(teacher, result, evaluate=())
    (tmp_path / "extra.txt").write_text("the <extra> river " * 3000)
    for flag in ("--evaluate", "--text"):
        said = heal.refused(result, flag, tmp_path / "extra.txt")
        assert f"the tokenizer in {result} gives token {count}, but the model has {count} tokens" in said


def test_what_is_wrong_with_tokens_and_text_costs_no_unfinished_training(
    heal: Healer, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(training.Heal, "_load_best_model", interrupted)
        assert heal(pruned, "--no-evaluate")[0] == 130
    states = sorted(Path("healed.partial/.llm_snp/training").iterdir())
    assert not [state for state in states if (state / "config.json").exists()]  # another transformers may not read it

    def nothing() -> None:
        raise NumericalError("the loss is not finite")

    (tmp_path / "short.txt").write_text("Too little.")
    for wrong in (("--tokens", "10"), ("--text", str(tmp_path / "short.txt")), ("--batch", "10000")):
        assert heal(pruned, "--no-evaluate", "--overwrite", *wrong)[0] == 2
    with monkeypatch.context() as patch:  # a teacher whose logits overflow, say
        patch.setattr(training.Heal, "measure", lambda self: nothing())
        assert heal(pruned, "--no-evaluate", "--overwrite")[0] == 2
    assert sorted(Path("healed.partial/.llm_snp/training").iterdir()) == states


def test_what_its_documents_cannot_hold_is_told_before_the_training(
    heal: Healer, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report may be a stranger's: with as many healings as one may have, and with numbers that no plot can show."""
    assert heal(pruned, "--no-evaluate", "--output", "once")[0] == 0
    report = report_of(Path("once"))
    report["healing"] *= MOST
    (Path("once") / "report.json").write_bytes(sealed(report))
    monkeypatch.setattr(training.Heal, "train", None)
    teacher = report["healing"][0]["options"]["teacher"] or recall(pruned)["model"]
    message = heal.refused(Path("once"), "--teacher", teacher, "--no-evaluate")
    assert f"would get a report that cannot be read again (healing: list should have at most {MOST} items" in message
    assert not Path("healed.partial").exists()
    with monkeypatch.context() as patch:
        patch.setattr("llm_snp.documents.writing.plot_images", lambda report: 1 / 0)
        assert "the documents of" in heal.refused(pruned, "--no-evaluate")


@pytest.mark.parametrize("flag", [("--lora", "100000"), ("--lora", str(2**63)), ("--learning-rate", "1e38")])
def test_numbers_that_torch_cannot_take(heal: Healer, pruned: Path, flag: tuple[str, str]) -> None:
    assert heal.refused(pruned, *flag).startswith(f"{flag[0]} is ")


def test_settings_of_generate_are_not_looked_at(heal: Healer, pruned: Path, tmp_path: Path) -> None:
    """Older transformers refuse to save those of many models, with each state of a training."""
    result = copied(pruned, tmp_path / "result")
    path, report = result / "generation_config.json", report_of(result)
    path.write_text(json.dumps({"temperature": 0.9, "top_p": 0.6, "do_sample": False}))
    report["files"][path.name] = digest_of_bytes(path.read_bytes())
    (result / "report.json").write_bytes(sealed(report))
    code, _, err = heal(result, "--no-evaluate", "--teacher", recall(pruned)["model"])
    assert code == 0, err
    assert Path("healed/generation_config.json").read_bytes() == path.read_bytes()


def test_what_is_private_stays_private(heal: Healer, pruned: Path, tmp_path: Path) -> None:
    result = copied(pruned, tmp_path / "result")
    result.chmod(0o700)
    assert heal(result, "--no-evaluate", "--teacher", recall(pruned)["model"])[0] == 0
    assert Path("healed").stat().st_mode & 0o777 == 0o700
    result.chmod(0o777)  # as a stranger's archive may have it
    usual = os.umask(0o022)
    try:
        assert heal(result, "--no-evaluate", "--teacher", recall(pruned)["model"], "--output", "other")[0] == 0
    finally:
        os.umask(usual)
    assert Path("other").stat().st_mode & 0o777 == 0o755


def test_a_teacher_in_the_working_directory_has_its_name(
    heal: Healer, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = copied(Path(recall(pruned)["model"]), tmp_path / "master")
    monkeypatch.chdir(teacher)
    options = HealConfig(str(pruned), ("x",), 1, teacher=".")
    assert find_pair(options).teacher.name == "master"
    monkeypatch.chdir(pruned)
    assert find_pair(dataclasses.replace(options, directory=".", teacher=str(teacher))).student.name == pruned.name


def test_a_home_of_nobody(heal: Healer, pruned: Path) -> None:
    assert "does not exist" in heal.refused("~nobody-here/x")
    assert "~nobody-here/x" in heal.refused(pruned, "--teacher", "~nobody-here/x")


def test_a_text_is_not_called_as_one_of_the_hub(heal: Healer, pruned: Path) -> None:
    """Nor as another text."""
    for folder, seed in (("a", 4), ("b", 5)):
        Dataset.from_dict({"text": paragraphs(100, seed=seed)}).save_to_disk(f"{folder}/c4")
    code, _, err = heal(pruned, "--text", "a/c4", "--text", "b/c4", "--evaluate", "a/c4", "--tokens", TOKENS)
    assert code == 0, err
    (section,) = report_of(Path("healed"))["healing"]
    assert section["text"]["source"] == "c4 (2) and c4 (3)"
    assert "--text ./c4 --text ./c4" in section["command"]
    assert "--evaluate ./c4" in section["command"]
    assert list(section["evaluation"]) == ["c4 (2)"]
    assert list(report_of(Path("healed"))["evaluation"]) == ["c4 (2)"]


def test_models_that_are_others_by_now(heal: Healer, pruned: Path, tmp_path: Path) -> None:
    options = HealConfig(str(pruned), ("x",), 1)
    pair, rewriting = find_pair(options), Rewriting(pruned)
    before = identity_of(pair, rewriting)
    rewriting.settings += b" "
    changed = {name for name, value in identity_of(pair, rewriting).items() if value != before[name]}
    assert changed == {"the hash of the result's config.json"}
    assert "the hash of the teacher's config.json" in before


def test_what_was_read_is_another_by_now(heal: Healer, pruned: Path, corpus: Path, tmp_path: Path) -> None:
    """DIR was pruned anew, say: what was healed of the former one is not what the same command would give now."""
    result, text = copied(pruned, tmp_path / "result"), tmp_path / "text.txt"
    text.write_text(corpus.read_text())
    options = ("--text", text, "--no-evaluate", "--resume")
    assert heal(result, *options)[0] == 0
    assert heal(result, *options)[1] == "healed is finished already\n"
    text.write_text(text.read_text() + "a")
    assert f"healed is finished, and the hash of {text} is '" in heal.refused(result, *options)
    text.write_text(corpus.read_text())
    report = report_of(result)
    settings = (result / "config.json").read_bytes() + b" "
    (result / "config.json").write_bytes(settings)
    report["files"]["config.json"] = digest_of_bytes(settings)
    (result / "report.json").write_text(json.dumps(report))
    assert "healed is finished, and the hash of the result's config.json is '" in heal.refused(result, *options)


def test_a_report_is_read_without_its_places(pruned: Path, tmp_path: Path, dense: Path) -> None:
    result = copied(pruned, tmp_path / "result")
    report = report_of(result)
    del report["model"]["hub"]
    report["model"]["name"] = report["options"]["model"] = str(dense)
    report["evaluation"] = {str(tmp_path / "x.txt"): next(iter(report["evaluation"].values()))}
    (result / "report.json").write_text(json.dumps(report))
    shutil.rmtree(result / ".cache")
    with pytest.raises(OptionError, match=r"is not there to learn from \(.* was a directory on the machine that made"):
        find_pair(HealConfig(str(result), ("x",), 1))  # a stranger's report would choose what is read
    pair = find_pair(HealConfig(str(result), ("x",), 1, teacher=str(dense)))
    assert pair.teacher.directory == dense
    assert str(tmp_path) not in json.dumps(pair.report)
    assert str(dense.parent) not in json.dumps(pair.report)


@pytest.mark.parametrize("said", ["[enforce fail at inline_container.cc:659]", "PytorchStreamWriter failed writing"])
def test_a_disk_that_is_full_for_torch(said: str) -> None:
    with pytest.raises(OutputError, match="free some space there"), _full(Path("states")):
        raise RuntimeError(said)


def test_it_ends_when_the_loss_rises_and_keeps_the_best_step() -> None:
    watch = Watch(lambda step, state: None)
    for step, value in enumerate((1.0, 1.5, 0.8, 0.9)):
        watch.curve.append({"step": step, "loss": value})
        assert not watch.rising
    watch.curve.append({"step": 4, "loss": 0.85})
    assert watch.rising
    assert watch.best["step"] == 2


def test_no_code_and_no_adapter_of_the_directory(heal: Healer, pruned: Path, tmp_path: Path) -> None:
    """A result of a stranger, with hashes that fit: its code is neither run nor handed on."""
    result = tmp_path / "strange"
    copied(pruned, result)
    (result / "modeling_snp.py").write_text("raise RuntimeError('this was run')")
    fields = json.loads((result / "config.json").read_text())
    fields["auto_map"] = {"AutoConfig": "stranger/repo--evil.Config"}
    (result / "config.json").write_text(json.dumps(fields))
    (result / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    report = report_of(result)
    for name in ("modeling_snp.py", "config.json"):
        del report["files"][name]
    (result / "report.json").write_text(json.dumps(report))
    code, _, err = heal(result, "--no-evaluate")
    assert code == 0, err
    assert without_weights(Path("healed")) == without_weights(pruned)
    assert not Path("healed/adapter_config.json").exists()


def test_bad_input(heal: Healer, pruned: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = save(tiny_opt(vocab_size=2050), tmp_path / "other")
    short = tmp_path / "short.txt"
    short.write_text("A short text.")
    damaged = tmp_path / "damaged"
    shutil.copytree(pruned, damaged)
    (damaged / "config.json").write_text("{}")
    moved = tmp_path / "moved"
    shutil.copytree(pruned, moved)
    shutil.rmtree(moved / ".cache")
    for directory, arguments, said in (
        (
            pruned,
            ("--teacher", other),
            "has 2,050 tokens, and the result 2,048; give a --teacher of the same",
        ),
        (pruned, ("--teacher", tmp_path / "absent"), "absent does not exist; give a model directory"),
        (pruned, ("--text", short), "short.txt has 6 tokens, and at least"),
        (pruned, ("--text", tmp_path / "absent.txt"), "is neither a file nor a known corpus"),
        (pruned, ("--text", "self"), "--text self is for pruning only"),
        (pruned, ("--tokens", "100"), "--tokens is 100, but one step takes 128 (4 windows of 32)"),
        (pruned, ("--tokens", "0"), "--tokens is 0; it must be at least 1"),
        (pruned, ("--lora", "0"), "--lora is 0; it must be at least 1"),
        (pruned, ("--text-loss", "1"), "--text-loss is 1; it is a share"),
        (pruned, ("--learning-rate", "0"), "--learning-rate is 0; it must be above 0"),
        (pruned, ("--text", "a:0"), "--text a:0: the share after the colon"),
        (pruned, ("--device", "tpu"), "--device 'tpu' is not known"),
        (pruned, ("--output", pruned / "in"), "lies inside"),
        (pruned, ("--learning-rate", "1e30"), "the loss is not finite after"),
        (pruned, ("--output", "/"), "--output / is the root of the file system"),
        (damaged, (), "is not as it was written: config.json changed; restore that, or prune again"),
        (dense, (), "has no report.json; give the directory that a run of llm_snp has written"),
        (moved, (), "is not there to learn from (tiny was a directory on the machine that made "),
    ):
        assert said in heal.refused(directory, "--no-evaluate", *arguments), said

    def full(self: Any, *arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training.Heal, "compute_loss", full)
    said = heal.refused(pruned, "--no-evaluate")
    assert said.startswith("the device ran out of memory (CUDA out of memory); give a smaller --batch")


def test_a_home_has_the_name_of_a_person_that_is_not_published() -> None:
    assert label(str(Path.home())) == label("~") == "home"
    assert label("/somewhere/text.txt") == "text.txt"
    assert label("wikitext2") == "wikitext2"
    assert label("~:2") == label(f"{Path.home()}:2") == "home:2"
    assert label("text:part") == "text:part"


def test_the_command_can_be_typed_again() -> None:
    options = HealConfig("dir", ("a.txt:2", "c4"), 1000, lora=4, evaluate=(), checkpointing=True, text_loss=0.1)
    words = command_line(vars(options), 2)
    assert words == (
        "torchrun --nproc-per-node 2 -m llm_snp heal dir --text a.txt:2 --text c4 --tokens 1000 --lora 4 --text-loss "
        "0.1 --checkpointing --no-evaluate"
    )
    command, args = cli.parse(words.split()[5:])
    assert command.options_of(args) == options
