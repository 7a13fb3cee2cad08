"""A whole run: find the model and the text, decide, prune, write, evaluate, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..config import HELD_OUT, PruneConfig
from ..dense.checkpoint import Checkpoint
from ..dense.claims import made_anew
from ..dense.data import Windows
from ..dense.mixture import fitted_and_unseen
from ..dense.readers import check_sources, digests
from ..dense.skeleton import Skeleton
from ..dense.storage import Storage, check_offload
from ..dense.text import Text
from ..dense.tokenizer import load_tokenizer
from ..documents.card import model_card
from ..documents.report import Report
from ..errors import NumericalError, OptionError
from ..evaluation.harness_check import Asked, check_room, rehearse_tasks
from ..evaluation.harness_tasks import texts_of
from ..evaluation.perplexity import Perplexity, perplexity_streamed, worst
from ..families import check_tables
from ..pruning.decide import decide
from ..pruning.executor import prune_blocks
from ..pruning.job import Job, open_job
from ..pruning.plan import Plan, check_budget
from ..pruning.session import Session
from ..result.assembly import PrunedBlocks, open_result, stock_fields, write_rest
from ..result.carried import Carried
from ..result.finishing import finish
from ..result.own_code import modeling_file
from ..result.repository import check_card
from ..result.writer import Writer
from ..system.device import as_at_start, dtype_name, resolve_dtype
from ..system.journal import Journal
from ..system.libraries import silent
from ..system.manifest import some
from ..system.processes import Processes
from ..system.progress import Progress
from ..system.workspace import Workspace, known
from .afterwards import afterwards, check_afterwards, check_hub
from .inputs import inputs_of, memory_of, remarks, report_of
from .rehearsal import rehearse
from .resume import (
    GONE_ON_WITH,
    again,
    calibration_identity,
    finished_before,
    kept_for_resume,
    model_identity,
    settings,
    texts_read,
)
from .room import Room


def run(options: PruneConfig) -> dict[str, Any]:
    """Prune as `options` say and write the result. Returns the report; every process of a run gets it, what is measured
    afterwards the main one only.

    Raises `SnpError` for everything that has its cause outside llm_snp, and `Interrupted` for Ctrl-C. What can be gone
    on with by `resume` is then kept beside the output; otherwise nothing is left behind.
    """
    with as_at_start(), silent(options.quiet):
        job, report, asked, progress, main = _pruned(options)
        # Outside: it may take hours, which the other processes need not wait for.
        return afterwards(job, report, asked, progress) if main else report


def _pruned(options: PruneConfig) -> tuple[Job, dict[str, Any], Mapping[str, Asked], Progress, bool]:
    """Everything up to the finished result: what it was about, its report, what tasks will ask, and whether this is the
    main process.
    """
    options.validate()
    offload = check_offload(options.offload)
    with Processes(cpu=options.device.startswith("cpu") or not torch.cuda.is_available()) as processes:
        check_processes(options, processes.count)
        progress = Progress(options.quiet or not processes.main)
        with progress.phase("load", title=f"look for {options.model or 'the embedded OPT'}"):
            asked = processes.from_main(lambda: check_afterwards(options))
            job = open_job(options, weights=True, local_index=processes.local_index)
            check_room(asked, job.config)
            carried = Carried(job.directory)
            earlier = processes.from_main(lambda: finished_before(job))
            if earlier is not None:
                progress.say(f"{job.output} is finished already")
                return job, earlier, asked, progress, processes.main
            if options.resume:  # what comes is new, and has a card that nobody has edited
                processes.on_main(lambda: check_hub(options, maybe_finished=False))
            processes.on_main(lambda: check_sources(texts_read(options)))
            if asked:
                processes.on_main(lambda: rehearse_tasks(list(asked), job.directory, job.config))
            workspace = processes.on_main(
                lambda: Workspace(job.output, options.overwrite, options.resume, inputs_of(job))
            )
        with kept_for_resume(workspace, job.config.num_hidden_layers, again(options)):
            storage = Storage(offload, None if job.device.type == "cpu" else job.device)
            report = _Run(job, carried, storage, processes, progress, workspace).prune()
        return job, report, asked, progress, processes.main


def check_processes(options: PruneConfig, count: int) -> None:
    """Raise `OptionError` if `count` processes cannot share the work."""
    if options.samples - options.held_out < count:
        raise OptionError(
            f"--samples is {options.samples}, but each of the {count} processes needs a calibration window; give "
            "more --samples, or start fewer processes"
        )
    if options.in_steps and options.held_out < count:
        raise OptionError(
            f"--method everything holds out {options.held_out} of the {options.samples} windows of --samples, but "
            f"each of the {count} processes needs one of them; give --samples of at least {HELD_OUT * count}, or start "
            "fewer processes"
        )
    if count > 1 and options.device.startswith("cuda:"):
        raise OptionError(
            f"--device {options.device} is one GPU, but there are {count} processes, which take one each; leave it "
            "out, and choose GPUs with CUDA_VISIBLE_DEVICES"
        )


class _Run:
    """The parts of one run. Only the main process has the workspace, and writes."""

    def __init__(
        self,
        job: Job,
        carried: Carried,
        storage: Storage,
        processes: Processes,
        progress: Progress,
        workspace: Workspace | None,
    ):
        self.job, self.carried, self.storage = job, carried, storage
        self.modeling = modeling_file(job.family)  # now: an upgrade during the hours would replace it
        self.processes, self.progress, self.workspace = processes, progress, workspace
        self.directory = processes.from_main(lambda: known(workspace).directory)
        folder, waiting = processes.from_main(lambda: (known(workspace).journal, known(workspace).earlier))
        self.journal = Journal(folder, processes, progress, waiting)
        with progress.phase("load"):
            self.checkpoint = Checkpoint(job.directory, job.family.renames)
            self.stored = stored_dtype(self.checkpoint)
            self.dtype = resolve_dtype(job.options.dtype, job.device, self.stored)
            self.journal.expect("settings", settings(job.options, self.dtype))
            identity = processes.from_main(lambda: model_identity(job, carried, self.checkpoint))
            self.journal.expect("model", identity)
            self.tokenizer = load_tokenizer(job.directory)
            processes.on_main(lambda: carried.check(self.tokenizer, job.family.pruned_model_type))
            if carried.unclear:
                progress.say(f"note: {some(carried.unclear)} of {job.directory} may be terms of use, and stays there")
            whole = None if job.whole is job.config else job.whole
            self.skeleton = Skeleton(job.config, job.family.blocks, self.checkpoint, job.device, self.dtype, whole)
            check_tables(job.family, job.config, self.checkpoint.tables())
            # Nothing is measured yet, but whether the budget can be met at all is known already.
            check_budget(job.family, job.config, self.skeleton.blocks, job.options)
            room = Room(job, self.skeleton, self.dtype, storage.offload)
            processes.on_main(lambda: room.check(self.checkpoint, carried, known(self.workspace).written_bytes))
            processes.on_main(self.checkpoint.check_finite)  # or it would show where its block is pruned
        with progress.phase("text"):
            self.read = identity | processes.from_main(lambda: digests(texts_read(job.options)))
            self.calibration, self.evaluation = processes.from_main(self._read_text)
            processes.on_main(lambda: room.check_texts(self.evaluation))
            self.journal.expect("calibration", calibration_identity(self.calibration))

    def _rehearse(self, report: Report) -> None:
        """Find out before the work what would fail of the documents, and of the card on the Hub."""
        trial = rehearse(self.job, self.skeleton, report, self.tokenizer, self.evaluation)
        if self.job.options.push_to_hub:
            check_card(model_card(trial, self.job.options.push_to_hub))

    def _read_text(self) -> tuple[Windows, dict[str, Windows]]:
        job, options = self.job, self.job.options
        text = Text(job.directory, self.tokenizer, job.config, job.length, self.dtype, job.device)
        assert options.evaluate is not None
        sources = texts_of(options.evaluate)
        found = {source: text.evaluation(source, options.seed) for source in sources if source != "self"}
        calibration = text.calibration(options)
        evaluation = {source: found.get(source) or text.evaluation(source, options.seed) for source in sources}
        text.close()
        return calibration, evaluation

    def prune(self) -> dict[str, Any]:
        job, skeleton, progress = self.job, self.skeleton, self.progress
        before = self.processes.from_main(lambda: report_of(job.directory))
        report = Report(job, self.checkpoint, self.calibration, self.dtype, self.stored, self.processes.count, before)
        for remark in self.processes.from_main(lambda: remarks(job.directory, before)):
            report.note(remark)
        if self.processes.from_main(lambda: known(self.workspace).resumed):
            report.note(GONE_ON_WITH)
        self.processes.on_main(lambda: self._rehearse(report))
        for source, windows in self.evaluation.items():
            report.evaluated(source, "dense", self._dense_perplexity(windows))
        pair = fitted_and_unseen(self.calibration) if self.evaluation else None
        overfit = None if pair is None else [(windows, self._dense_perplexity(windows)) for windows in pair]
        session = Session(
            skeleton,
            job.family,
            job.config,
            job.options,
            self.calibration.tokens,
            self.processes,
            self.storage,
            self.journal,
            progress,
        )
        if self.journal.waits:  # what this run can be refused for must not cost another one
            session.stream()
        self.processes.on_main(lambda: known(self.workspace).begin())
        self.journal.begin()
        plan = decide(session)
        progress.say(f"plan: {plan.why}")
        for note in report.planned(plan, skeleton.parameters, custom_code=stock_fields(job, plan) is None):
            progress.say(f"note: {note}")
        for name in self.carried.left:
            report.note(f"{name} of the dense model, which is more than text, is not in the result; its terms hold")
        if unclear := len(self.carried.unclear):  # by its name it may be somebody's own
            files = "a file" if unclear == 1 else f"{unclear} files"
            report.note(f"{files} of the dense model that may be terms of use stayed there; if so, these hold as well")
        writer = Writer(self.directory, len(plan.left) + 1)
        blocks = PrunedBlocks(writer, self.journal, skeleton, report, progress)
        prune_blocks(session, plan, blocks.save, blocks.finished)
        self._write(writer, plan)
        pruned = open_result(self.directory, job, self.dtype)  # it must load, also where nothing is evaluated
        for source, windows in self.evaluation.items():
            report.evaluated(source, "pruned", self._pruned_perplexity(pruned, windows, report))
        if overfit is not None:
            for windows, dense in overfit:
                report.overfit(dense, self._pruned_perplexity(pruned, windows, report))
        for rescue in self.journal.rescued:
            report.note(rescue)
        report.finished(job.output, writer.weight_bytes, progress.seconds)
        return self.processes.from_main(lambda: self._finish(writer, report))

    def _write(self, writer: Writer, plan: Plan) -> None:
        """Write what is not a block; when this returns, all processes may read the result."""
        with self.progress.phase("save"):
            self.processes.on_main(
                lambda: write_rest(writer, self.job, self.skeleton, plan, self.tokenizer, self.carried, self.modeling)
            )

    def _finish(self, writer: Writer, report: Report) -> dict[str, Any]:
        workspace = known(self.workspace)
        finish(workspace, writer.files, report.data, memory_of(self.job, self.read), self.progress)
        return report.data

    def _dense_perplexity(self, windows: Windows) -> Perplexity:
        """Perplexity of the dense model; an interrupted run may have measured it."""
        name = f"dense-{windows.sha256[:16]}"
        known = self.journal.read(name)
        if known is None:
            known = dataclasses.asdict(self._evaluate(self.skeleton, windows, "dense"))
            self.journal.write(name, known)
        return Perplexity(**known | {"source": windows.source})  # the same text may have another name by now

    def _pruned_perplexity(self, pruned: Skeleton, windows: Windows, report: Report) -> Perplexity:
        """Perplexity of the result, which is written by now: logits that overflow cost a number, not the result."""
        with suppress(NumericalError):
            return self._evaluate(pruned, windows, "pruned")
        found, note = worst(windows), "the pruned model's logits are not finite: its perplexity has no number"
        if self.dtype != torch.float32:
            with suppress(NumericalError):
                wider = open_result(self.directory, self.job, torch.float32)
                found = self._evaluate(wider, windows, "pruned in float32")
                note = (
                    f"the pruned model's logits are not finite in {dtype_name(self.dtype)}: perplexity was measured in "
                    "float32; load it in float32 or bfloat16"
                )
        if note not in report.data["notes"]:
            report.note(note)
        return found

    def _evaluate(self, skeleton: Skeleton, windows: Windows, which: str) -> Perplexity:
        title = f"perplexity, {which}, {Path(windows.source).name}"
        with self.progress.phase("evaluate", len(skeleton), title) as step:
            return perplexity_streamed(skeleton, windows, step, self.processes, self.storage)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The type of the checkpoint's largest weight; a causal mask, which is none, may be larger."""

    def rank(name: str) -> tuple[bool, int]:
        return not made_anew(name), torch.Size(checkpoint.shape(name)).numel()

    return checkpoint.dtype(max(checkpoint.names(), key=rank))
