"""A whole healing: find the models and the text, train, write, evaluate, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import PruneConfig
from ..dense.data import Windows, check_known, evaluation_windows
from ..dense.readers import check_sources, digests
from ..dense.whole import generate_plainly
from ..documents.report import nodes
from ..documents.summary import summary
from ..documents.writing import rehearse
from ..errors import CheckpointError, CorpusError, HubError, NumericalError, OutputError, first_line
from ..evaluation.perplexity import Perplexity, perplexity_loaded, perplexity_of, worst
from ..pruning.job import output_of
from ..result.finishing import finish
from ..result.rewriting import Rewriting
from ..system.device import as_at_start, resolve_device
from ..system.files import digest_of_json, disk
from ..system.journal import Journal
from ..system.keeping import kept_for_later
from ..system.output import check_space
from ..system.processes import Processes
from ..system.progress import Progress
from ..system.workspace import Workspace, known
from ..version import __version__
from .defaults import completed, evaluated_before
from .options import HealConfig, command_line
from .pair import Pair, find_pair, open_model, stored
from .record import healed, label, labels, with_healing
from .resume import States, finished_before, identity_of, inputs_of, left, memory_of, texts_read
from .text import material
from .training import NAMES, Heal, Watch, adapted, computing, schedule_of

SMALLER = "give a smaller --batch (and a larger --accumulate), --checkpointing, --lora, or a shorter --sequence-length"


def heal(options: HealConfig) -> list[str]:
    """Heal as `options` say, write the result, and return what there is to print.

    Where the held-out loss never gets lower than it was, nothing is written, which is what the lines say then. Raises
    `SnpError`, and `Interrupted` for Ctrl-C; what `resume` can go on with is then kept beside the output.
    """
    options.validate()
    cpu = options.device == "cpu" or not torch.cuda.is_available()
    with as_at_start(), Processes(cpu=cpu) as processes:
        progress = Progress(options.quiet or not processes.main)
        with progress.phase("load", title=f"look for {options.directory} and its teacher"):
            device = resolve_device(options.device, processes.local_index)
            pair = find_pair(options)
            options = processes.from_main(partial(completed, options, pair))
            output = output_of(PruneConfig(output=str(options.destination)))
            if processes.from_main(lambda: finished_before(options, pair)):
                return [f"{output} is finished already"]
            processes.on_main(lambda: check_sources(texts_read(options)))
            workspace = processes.on_main(
                lambda: Workspace(
                    output, options.overwrite, options.resume, inputs_of(options, pair), like=pair.student.directory
                )
            )
        again = command_line(dataclasses.asdict(options) | {"resume": False}, processes.count, nodes()) + " --resume"
        with kept_for_later(workspace, lambda there: left(there, again), SMALLER):
            return _Healing(options, pair, device, processes, progress, workspace).run()


class _Healing:
    """The parts of one healing. Only the main process has the workspace, and writes."""

    def __init__(
        self,
        options: HealConfig,
        pair: Pair,
        device: torch.device,
        processes: Processes,
        progress: Progress,
        workspace: Workspace | None,
    ):
        self.options, self.pair, self.device = options, pair, device
        self.processes, self.progress, self.workspace = processes, progress, workspace
        student, teacher = pair.student, pair.teacher
        folder, waiting = processes.from_main(lambda: (known(workspace).journal, known(workspace).earlier))
        self.journal = Journal(folder, processes, progress, waiting)
        self.states = States(self.journal)
        self.notes: list[str] = []  # for the report
        length = pair.length(options.sequence_length)
        self.schedule = schedule_of(options, length, processes.count)
        with progress.phase("load"):
            self.rewriting = Rewriting(student.directory)
            processes.on_main(lambda: self.rewriting.carried.check(student.tokenizer))
            self.journal.expect(
                "settings", {"llm_snp": __version__, **options.settings(), "number of processes": processes.count}
            )
            identity = processes.from_main(lambda: identity_of(pair, self.rewriting))
            # States have the names of the model, which are not those of every transformers (GPT-NeoX's head).
            names = [] if options.lora else sorted(student.checkpoint.names())
            named = {"the hash of the trained tensors' names, which this transformers gives,": digest_of_json(names)}
            self.journal.expect("models", identity | named)
            processes.on_main(self._check_space)
        with progress.phase("text"):
            self.read = identity | processes.from_main(lambda: digests(texts_read(options)))
            windows = self.schedule.steps * self.schedule.windows
            self.material = processes.from_main(
                lambda: material(options, windows, length, student.tokenizer, pair.vocabulary, student.directory)
            )
            self.texts, self.missing = processes.from_main(self._evaluation)
            self.journal.expect("text", {"the hash of the text's windows": self.material.train.sha256})
        with progress.phase("load"):
            # On a GPU what is not trained stays in the type of its file.
            frozen = None if device.type == "cuda" else torch.float32
            self.teacher = teacher.load(frozen).to(device).requires_grad_(False)
            self.student = student.load(frozen if options.lora else torch.float32)
            generate_plainly(self.student)  # the Trainer saves these settings, and checks them with each state

    def _check_space(self) -> None:
        """The result, and of the training the last state, the best one and the one that is being written."""
        names = self.pair.student.checkpoint.names()
        count = sum(torch.Size(self.pair.student.checkpoint.shape(name)).numel() for name in names)
        trained = 0 if self.options.lora else count  # LoRA's matrices are small
        size = sum(file.stat().st_size for file in self.pair.student.checkpoint.files)
        there = sum(path.stat().st_size for path in known(self.workspace).journal.rglob("*") if path.is_file())
        check_space(self.options.destination, size + max(0, 3 * 3 * torch.float32.itemsize * trained - there))

    def _evaluation(self) -> tuple[dict[str, Windows], list[str]]:
        """Windows of the texts to measure perplexity on, and the earlier ones that are not measured again."""
        report, asked, student = self.pair.report, self.options.evaluate, self.pair.student
        sources = list(dict.fromkeys(evaluated_before(self.pair.memory) if asked is None else asked))
        found: dict[str, Windows] = {}
        left = dict.fromkeys(report["evaluation"])
        for source, name in zip(sources, labels(sources), strict=True):
            earlier = report["evaluation"].get(name)
            length = earlier["pruned"]["sequence_length"] if earlier else report["calibration"]["sequence_length"]
            try:
                windows = evaluation_windows(source, student.tokenizer, self.pair.length(length))
                check_known(windows.tokens, self.pair.vocabulary, student.directory)
            except (CheckpointError, CorpusError, HubError):
                if asked is not None:  # nobody asked for those of the pruning
                    raise
            else:
                found[source] = windows
                left.pop(name, None)
        return found, list(left)

    def run(self) -> list[str]:
        options, pair = self.options, self.pair
        teacher = {source: self._perplexity("teacher", self.teacher, text) for source, text in self.texts.items()}
        self.student.to(self.device)
        before = {source: self._perplexity("before", self.student, text) for source, text in self.texts.items()}
        self.processes.on_main(lambda: self._rehearse(teacher, before))
        torch.manual_seed(options.seed)
        model = adapted(self.student, options.lora) if options.lora else self.student
        watch = Watch(self.states.note)
        windows = (self.material.train.tokens, self.material.held_out.tokens)
        folder = self.states.folder
        trainer = Heal(model, self.teacher, *windows, options, self.schedule, folder, self.processes, watch)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self._train(trainer, watch)
        seconds = watch.seconds
        if options.lora:
            trainer.model = model = model.merge_and_unload()
        tensors = stored(pair.student, model.state_dict())
        model.load_state_dict(tensors, strict=False)  # as they are written: rounded
        after = trainer.measure() | {"step": watch.best["step"]}
        if not after["loss"] < watch.curve[0]["loss"]:
            self.processes.on_main(lambda: known(self.workspace).discard())
            return [
                f"kept     {options.directory} as it is, and nothing is written: on held-out windows the loss was "
                f"{watch.curve[0]['loss']:.4f} nats before, and {after['loss']:.4f} at best in "
                f"{int(watch.curve[-1]['step'])} steps; a smaller --learning-rate or more --tokens may help"
            ]
        measured = {
            source: {"teacher": teacher[source], "before": before[source], "after": self._after(model, text)}
            for source, text in self.texts.items()
        }
        facts = {
            "lora": options.lora,
            "trained": trained,
            "steps": int(watch.curve[-1]["step"]),
            "steps_planned": self.schedule.steps,
            "seconds": round(seconds, 3),
        }
        section = healed(
            options, pair, self.material, watch.curve, after, facts, measured, self.device, self.processes.count
        )
        report = with_healing(pair.report, section, measured, self.missing, options.destination)
        if watch.broken:
            self.notes.append(watch.broken)
        return self.processes.from_main(lambda: self._write(tensors, report))

    def _rehearse(self, teacher: Mapping[str, Perplexity], before: Mapping[str, Perplexity]) -> None:
        """Make the documents as they will be, but for what is measured, and forget them: what they cannot hold shows
        now. Raises `OutputError` for that.
        """
        nothing = dict.fromkeys((*NAMES, "teacher_nll", "step"), 0.0)
        steps = dict.fromkeys(("steps", "steps_planned"), self.schedule.steps)
        facts = {"lora": self.options.lora, "trained": 1, **steps, "seconds": 0.0}
        measured = {name: {"teacher": teacher[name], "before": found, "after": found} for name, found in before.items()}
        section = healed(
            *(self.options, self.pair, self.material, [nothing], nothing, facts, measured, self.device),
            self.processes.count,
        )
        later = with_healing(self.pair.report, section, measured, self.missing, self.options.destination)
        rehearse(self.pair.student.directory, later)

    def _train(self, trainer: Heal, watch: Watch) -> None:
        """From the start, or from the last state of the run that is gone on with, to the end or the best step."""
        watch.curve.append(trainer.measure() | {"step": 0})
        self.progress.say(self._line(watch.curve[0]))
        # Not before: what this one can be refused for must not cost another unfinished training.
        self.processes.on_main(lambda: known(self.workspace).begin())
        self.journal.begin()
        done, state = self.states.latest()
        if done:
            self.progress.say(f"step {done} was finished before")
        left = max(1, self.schedule.steps - done)
        with self.progress.phase("heal", left, "train", unit="step") as watch.step:
            watch.tell = lambda entry: self.progress.finished(self._line(entry))
            with self.processes.watched(), disk(self.states.folder), _full(self.states.folder):
                trainer.train(resume_from_checkpoint=str(state) if state else None)

    def _line(self, entry: dict[str, float]) -> str:
        perplexity = perplexity_of(entry["nll"])
        where = f"step {int(entry['step'])}/{self.schedule.steps}"
        return f"{where}  held-out: KL {entry['kl']:.4f} nats, perplexity {perplexity:,.2f}"

    def _perplexity(self, which: str, model: Any, windows: Windows) -> Perplexity:
        """Of a model that does not change; an interrupted run may have measured it. A collective."""
        name = f"{which}-{windows.sha256[:16]}"
        known = self.journal.read(name)
        if known is None:
            known = dataclasses.asdict(self._measure(which, model, windows))
            self.journal.write(name, known)
        return Perplexity(**known | {"source": windows.source})

    def _measure(self, which: str, model: Any, windows: Windows) -> Perplexity:
        def measure() -> Perplexity:
            title = f"perplexity, {which}, {Path(windows.source).name}"
            count = len(windows.tokens)
            with self.progress.phase("evaluate", count, title, unit="window") as step, computing(self.device):
                return perplexity_loaded(model.eval(), windows, step)

        return self.processes.from_main(measure)

    def _after(self, model: Any, windows: Windows) -> Perplexity:
        """Of the healed model: logits that overflow cost a number, not the training."""
        try:
            return self._measure("after", model, windows)
        except NumericalError:
            self.notes.append(f"the healed model's logits are not finite: no perplexity on {label(windows.source)}")
            return worst(windows)

    def _write(self, tensors: dict[str, Tensor], report: dict[str, Any]) -> list[str]:
        workspace = known(self.workspace)
        with self.progress.phase("save"):
            spelled = self.pair.student.checkpoint.spelled  # as the files had them, or older readers miss them
            writer = self.rewriting.write(
                workspace.directory, {spelled(name): tensor for name, tensor in tensors.items()}
            )
            open_model(workspace.directory)  # what was written must load
        report["notes"] += self.notes + self.journal.rescued
        finish(workspace, writer.files, report, memory_of(self.options, self.pair, self.read), self.progress)
        return summary(report).splitlines()


@contextmanager
def _full(folder: Path) -> Iterator[None]:
    """torch's own writer says in words of its own that the disk does not take a state."""
    try:
        yield
    except RuntimeError as error:
        if not any(name in str(error) for name in ("PytorchStreamWriter", "inline_container")):
            raise
        raise OutputError(f"{folder} cannot be written ({first_line(error)}); free some space there") from error
