"""Runs that are killed, interrupted or refused, and gone on with: nothing finished is lost, and no bit is different."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import BLOCKS, HIDDEN, LENGTH, SAMPLES, Prune, Shell, save, tiny_opt
from filelock import FileLock
from safetensors.torch import load_file, save_file
from tiny_models import KNOWN, save_tiny

import llm_snp.pruning.decide
import llm_snp.pruning.executor
from llm_snp.cli import main
from llm_snp.config import PruneConfig
from llm_snp.dense.storage import Storage
from llm_snp.errors import DiskFullError, Interrupted, NumericalError
from llm_snp.result.assembly import PrunedBlocks
from llm_snp.result.writer import Writer
from llm_snp.running.resume import GONE_ON_WITH
from llm_snp.running.run import run
from llm_snp.system.files import digest_of_json, size
from llm_snp.system.manifest import REPORT
from llm_snp.system.owned import LOCK, OWNER
from llm_snp.system.signals import ended_by_signals
from llm_snp.system.workspace import JOURNAL

pytestmark = pytest.mark.cpu

# Processes that can be killed: forked from one that has imported everything, which takes seconds.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["llm_snp.cli", "llm_snp.running.run", "transformers.models.opt.modeling_opt"])
SHARDS = [f"model-{number + 1:05d}-of-{BLOCKS + 1:05d}.safetensors" for number in range(BLOCKS)]
REST = f"model-{BLOCKS + 1:05d}-of-{BLOCKS + 1:05d}.safetensors"
PATIENCE = 60.0  # seconds until a test gives up on another process


def start(arguments: list[str], when: str = "", name: str = "", number: int = signal.SIGKILL, nth: int = 1) -> Any:
    """Begin `python -m llm_snp *arguments` in a process of its own.

    It gets signal `number` before or after a file called `name` gets its name for the `nth` time, or when half of it is
    written.
    """
    process = FORK.Process(target=_run, args=(arguments, str(Path.cwd()), when, name, number, nth))
    process.start()
    return process


def _run(arguments: list[str], directory: str, when: str, name: str, number: int, nth: int) -> None:
    torch.set_num_threads(1)
    os.chdir(directory)
    hits = count(1)

    def watched(function: Callable[..., Any], which: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            path = Path(args[which])
            hit = fnmatch(path.name, name) and next(hits) == nth
            if hit and when == "half":
                path.write_bytes(b"half")
            if hit and when in ("half", "before"):
                os.kill(os.getpid(), number)
            done = function(*args, **kwargs)
            if hit and when == "after":
                os.kill(os.getpid(), number)
            return done

        return call

    safetensors.torch.save_file = watched(safetensors.torch.save_file, 1)
    llm_snp.system.files._settle = watched(llm_snp.system.files._settle, 1)
    os.rename = watched(os.rename, 0)
    sys.exit(main(arguments))


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def result(directory: Path) -> dict[str, bytes]:
    """What must be the same however often the run was interrupted: all but times, memory, and the options as given.

    Nor the documents, which show them, and which only processes of their own make whole (`documents` in conftest).
    """
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
        and path.name not in (REPORT, "README.md", "report.html")
        and path.parent.name not in ("plots", "huggingface")
    }


def report_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / REPORT).read_text())


State = dict[str, tuple[int, int, bytes]]


def notes_of(directory: Path) -> list[str]:
    """But for that of a run that was gone on with."""
    return [note for note in report_of(directory)["notes"] if note != GONE_ON_WITH]


def state_of(directory: Path) -> State:
    """Files with inodes and times, by which it can be seen whether they were touched; not who had the lock."""
    return {
        path.relative_to(directory).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in (LOCK, OWNER)
    }


def once(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int, action: Callable[[], object]) -> None:
    """Do something right after call number `call` (from 1) of a function."""
    function, count = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        done = function(*args, **kwargs)
        count += 1
        if count == call:
            action()
        return done

    patch.setattr(owner, name, counted)


def raiser(error: BaseException) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        raise error

    return function


def options_of(text: Path, **more: Any) -> dict[str, Any]:
    short = {"samples": SAMPLES, "sequence_length": LENGTH, "calibration": str(text), "evaluate": ()}
    return short | {"device": "cpu", "quiet": True} | more


@pytest.fixture(scope="module")
def whole(dense: Path, text: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of the run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run(PruneConfig(str(dense), 0.3, str(output), **options_of(text, evaluate=(str(held_out),))))
    return output


@pytest.fixture(scope="module")
def two_blocks(dense: Path, text: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the same run leaves if it is interrupted when two of three blocks are finished."""
    output = tmp_path_factory.mktemp("interrupted") / "out"
    with pytest.MonkeyPatch.context() as patch:
        once(patch, PrunedBlocks, "save", 2, raiser(KeyboardInterrupt()))
        with pytest.raises(Interrupted):
            run(PruneConfig(str(dense), 0.3, str(output), **options_of(text, evaluate=(str(held_out),))))
    return output.with_name("out.partial")


class Runs:
    """The command whose result is `whole`, in the directory of a shell."""

    def __init__(self, shell: Shell, dense: Path, held_out: Path, whole: Path, two_blocks: Path):
        self.shell, self.model, self.whole, self.template = shell, dense, whole, two_blocks
        self.output, self.partial = shell.output, shell.directory / "out.partial"
        self.journal = self.partial / JOURNAL
        windows = ("--samples", SAMPLES, "--sequence-length", LENGTH)
        self.flags = [str(x) for x in (*windows, "--output", self.output, "--evaluate", held_out, "--device", "cpu")]

    def arguments(self, *more: str | Path) -> list[str]:
        """Later flags win."""
        text = () if "--calibration" in more else ("--calibration", str(self.shell.text))  # or it would be one more
        return [str(self.model), *self.flags, *text, *map(str, more)]

    def __call__(self, *more: str | Path) -> tuple[int, str, str]:
        return self.shell.run(*self.arguments(*more))

    def killed(self, when: str, name: str, *more: str | Path, nth: int = 1) -> None:
        """See `start`."""
        process = start(self.arguments("--quiet", *more), when, name, nth=nth)
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL

    def interrupted(self) -> None:
        """Be where two of three blocks are finished."""
        shutil.copytree(self.template, self.partial)

    def refused(self, *more: str | Path) -> str:
        """The command fails as bad input must, and everything stays as it was."""
        before = state_of(self.shell.directory)
        code, out, err = self("--quiet", *more)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1, err
        assert err.startswith("llm_snp: "), err
        assert state_of(self.shell.directory) == before
        return err.removeprefix("llm_snp: ").strip()

    def finishes(self, *more: str | Path, blocks: int = 0) -> str:
        """With --resume the result is that of the uninterrupted run, and `blocks` of its blocks are not made again.

        Returns what was said on standard error.
        """
        before = state_of(self.partial if self.partial.exists() else self.output)
        code, out, err = self("--resume", *more)
        assert code == 0, err
        assert "load it" in out
        self.is_whole()
        assert GONE_ON_WITH in report_of(self.output)["notes"] or not (blocks and before)
        after = state_of(self.output)
        assert [name for name in SHARDS if before.get(name) == after[name]] == SHARDS[:blocks]
        assert err.count("(finished before)") == blocks
        return err

    def is_whole(self) -> None:
        """The result is there, the same bit by bit, and nothing else."""
        assert result(self.output) == result(self.whole)
        report, expected = report_of(self.output), report_of(self.whole)
        for name in ("blocks", "plan", "evaluation", "calibration", "sparsity"):
            assert report[name] == expected[name], name
        assert [path.name for path in self.shell.directory.iterdir() if path.name.startswith("out")] == ["out"]


@pytest.fixture
def runs(shell: Shell, dense: Path, held_out: Path, whole: Path, two_blocks: Path) -> Runs:
    return Runs(shell, dense, held_out, whole, two_blocks)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_overwrite_throws_nothing_away_before_the_new_run_can_begin(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is refused for, or interrupted in, the unfinished run stays, and goes on to the same bytes."""
    runs.interrupted()
    (tmp_path / "short.txt").write_text("Too little.")
    before = state_of(runs.partial)

    def stays(*more: str, code: int = 2) -> str:
        found, out, err = runs("--overwrite", "--quiet", *more)
        assert (found, out) == (code, "")
        assert err.strip().endswith(f"; the unfinished run in {runs.partial} stays")
        assert state_of(runs.partial) == before
        return err

    assert "short.txt has " in stays("--calibration", str(tmp_path / "short.txt"))
    assert "can be removed from this model" in stays("--sparsity", "0.99")
    for where, error, code in (
        ("room.check_space", DiskFullError("the disk is full"), 2),
        ("run.load_tokenizer", KeyboardInterrupt(), 130),
        ("run.rehearse", KeyboardInterrupt(), 130),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"llm_snp.running.{where}", raiser(error))
            stays(code=code)
    runs.finishes(blocks=2)


@pytest.mark.parametrize("where", ["running.run.perplexity_streamed", "pruning.session.Stream"])
def test_overwrite_throws_nothing_away_for_a_model_that_cannot_be_run(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    runs.interrupted()
    before = state_of(runs.partial)
    with monkeypatch.context() as patch:
        patch.setattr(f"llm_snp.{where}", raiser(NumericalError("not finite")))
        code, _, err = runs("--overwrite", "--quiet")
    assert (code, state_of(runs.partial)) == (2, before)
    assert err.strip() == f"llm_snp: not finite; the unfinished run in {runs.partial} stays"
    runs.finishes(blocks=2)


def test_overwrite_takes_no_figures_of_the_run_that_it_replaces(runs: Runs) -> None:
    runs.interrupted()
    for path in runs.partial.rglob("dense-*.json"):  # of another model
        record = json.loads(path.read_text())["record"] | {"perplexity": 1.0}
        path.write_text(json.dumps({"digest": digest_of_json(record), "record": record}))
    assert runs("--overwrite", "--quiet")[0] == 0
    runs.is_whole()


@pytest.mark.parametrize("flags", [["--overwrite"], ["--no-evaluate", "--method", "snp", "--allocation", "uniform"]])
def test_weights_that_are_damaged_show_before_the_work(
    runs: Runs, dense: Path, tmp_path: Path, flags: list[str]
) -> None:
    """In the last block, which is read as the last; nothing could go on from what was done before."""
    if "--overwrite" in flags:
        runs.interrupted()
    before = state_of(runs.partial) if runs.partial.exists() else None
    model = Path(shutil.copytree(dense, tmp_path / "damaged"))
    state = load_file(model / "model.safetensors")
    state[next(name for name in state if f"layers.{BLOCKS - 1}.fc2.weight" in name)][0, 0] = float("nan")
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    runs.model = model
    code, _, err = runs(*flags)
    assert code == 2
    assert "has 1 entries that are NaN or infinite; the file is damaged" in err
    assert "perplexity" not in err
    assert "prune " not in err
    assert (state_of(runs.partial) if runs.partial.exists() else None) == before


# Killed


@pytest.mark.parametrize(
    ("when", "name", "blocks", "said"),
    [
        ("before", "model.json", 0, []),
        ("after", "dense-*.json", 0, []),
        ("after", "sensitivity-00001.safetensors", 0, []),
        ("after", "sensitivity-00000.json", 0, ["sensitivity: measured by the interrupted run"]),
        ("after", "curves-00001.json", 0, ["sensitivity: measured by the interrupted run"]),
        ("half", f".{SHARDS[0]}.llm_snp", 0, ["curves: measured by the interrupted run"]),
        ("after", "block-00000.json", 1, []),
        ("after", SHARDS[1], 1, []),  # written, but its hash is not
        ("half", f".{SHARDS[2]}.llm_snp", 2, []),
        ("before", "model.safetensors.index.json", 3, []),
        ("before", "out.partial", 3, []),
    ],
)
def test_killed(runs: Runs, when: str, name: str, blocks: int, said: list[str]) -> None:
    runs.killed(when, name)
    assert not runs.output.exists()
    err = runs.finishes(blocks=blocks)
    assert [path.name for path in runs.output.glob(".*")] == [".cache"]
    for line in said:
        assert line in err
    assert notes_of(runs.output) == report_of(runs.whole)["notes"]


def test_killed_again_and_again(runs: Runs) -> None:
    for delay in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35):
        process = start(runs.arguments("--quiet", "--resume"))
        process.join(delay)
        process.kill()
        process.join()
    assert runs("--resume")[0] == 0
    runs.is_whole()


@pytest.mark.parametrize(("nth", "blocks"), [(1, 0), (2, 3)], ids=["trying", "at the end"])
def test_killed_between_the_renames(runs: Runs, nth: int, blocks: int) -> None:
    """The earlier result has been put aside, and has its name not yet again, or the new one has not its."""
    assert runs("--seed", "1")[0] == 0
    earlier = result(runs.output)
    runs.killed("after", "out", "--overwrite", nth=nth)
    assert sorted(path.name for path in runs.shell.directory.iterdir()) == ["out.partial", "out.replaced"]
    # Whatever comes next, the earlier result is back first.
    code, _, err = runs("--quiet")
    assert code == 2
    assert "holds an earlier result; give another directory, or --overwrite" in err
    assert result(runs.output) == earlier
    runs.finishes("--overwrite", blocks=blocks)


def test_killed_before_the_earlier_result_is_removed(runs: Runs) -> None:
    assert runs("--seed", "1")[0] == 0
    runs.killed("after", "out.partial", "--overwrite")
    assert sorted(path.name for path in runs.shell.directory.iterdir()) == ["out", "out.replaced"]
    assert (runs.output / JOURNAL).is_dir()
    assert runs("--dry-run", "--overwrite")[0] == 0
    before = state_of(runs.output)
    code, out, err = runs("--overwrite", "--resume")
    assert code == 0, err
    assert "is finished already" in err
    assert "load it" in out
    runs.is_whole()
    assert all(before[name] == value for name, value in state_of(runs.output).items())


def test_killed_while_tidying_and_then_started_anew(runs: Runs) -> None:
    runs.killed("after", "out.partial")
    assert (runs.output / JOURNAL).is_dir()
    assert "holds an earlier result" in runs("--quiet")[2]
    runs.is_whole()
    runs.killed("before", "out.partial", "--overwrite")
    assert runs("--overwrite")[0] == 0
    runs.is_whole()


@pytest.mark.parametrize(
    "options",
    [
        {"method": "snp"},
        {"attention": "dims", "target": "dense"},
        {"damping": "auto", "samples": 9},
        {"sensitive_order": True, "sensitivity": "scalar"},
        {"dtype": "bfloat16", "round_to": 8},
        {"sparsity": 0.02},  # blocks that stay as they are
    ],
    ids=str,
)
def test_every_kind_of_run_goes_on_as_it_began(
    prune: Prune, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    goes_on_as_it_began(prune, dense, tmp_path, monkeypatch, options)


def goes_on_as_it_began(
    prune: Prune, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Interrupted twice, a run comes to the same bytes."""
    prune(dense, tmp_path / "whole", **options)
    for resume in (False, True):
        with monkeypatch.context() as patch:
            once(patch, PrunedBlocks, "save", 1, raiser(KeyboardInterrupt()))
            with pytest.raises(Interrupted):
                prune(dense, tmp_path / "out", resume=resume, **options)
    report = prune(dense, tmp_path / "out", resume=True, **options)
    assert result(tmp_path / "out") == result(tmp_path / "whole")
    assert report["blocks"] == report_of(tmp_path / "whole")["blocks"]
    assert [note for note in report["notes"] if note != GONE_ON_WITH] == report_of(tmp_path / "whole")["notes"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"attention": "dims"}),
        ("llama", {"attention": "queries"}),
        ("mixtral", {"attention": "dims"}),
        ("mixtral", {"attention": "none", "experts": "whole"}),
    ],
)
def test_a_run_whose_blocks_have_more_than_weights_goes_on_as_it_began(
    prune: Prune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    """Tables; and experts, whose files name tensors in another way."""
    if name not in KNOWN:
        pytest.skip(f"this transformers does not have {name} as it is needed")
    goes_on_as_it_began(prune, save_tiny(name, tmp_path / "dense"), tmp_path, monkeypatch, options)


# Ctrl-C


def test_interrupted_and_the_command_it_prints(runs: Runs) -> None:
    """A real `python -m llm_snp`, a real signal, and what is printed then typed into a real shell."""
    save(tiny_opt(num_hidden_layers=12), runs.shell.directory / "a model")
    runs.model = Path("a model")
    python = Path(sys.executable).parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{python}:{os.environ['PATH']}"}
    arguments = [sys.executable, "-m", "llm_snp", *runs.arguments("--no-evaluate", "--method", "snp")]
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        # A shell that starts the tests in the background has them ignore Ctrl-C, and every process after them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until(lambda: (runs.journal / "block-00000.json").exists() or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    *_, line = err.splitlines()
    found = re.fullmatch(
        r"llm_snp: interrupted; (\d+) of 12 blocks are finished and kept in (.*); go on with: (.*)", line
    )
    assert found, err
    assert 0 < int(found[1]) < 12
    assert Path(found[2]) == runs.partial
    assert found[3].startswith("python -m llm_snp 'a model' --sparsity 0.3 --output ")
    assert found[3].endswith(" --no-evaluate --resume")
    assert not runs.output.exists()
    again = subprocess.run(found[3], shell=True, capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("(finished before)") == int(found[1])
    assert runs("--no-evaluate", "--method", "snp", "--output", "whole", "--quiet")[0] == 0
    assert result(runs.output) == result(runs.shell.directory / "whole")


@pytest.mark.parametrize(
    ("function", "left"),
    [
        ("llm_snp.running.run.decide", "the dense model is evaluated"),
        ("llm_snp.pruning.decide.measured_curves", "the sensitivity of all blocks is measured"),
        ("llm_snp.running.run.prune_blocks", "3 of 3 blocks are measured"),
        ("llm_snp.running.run.write_rest", "3 of 3 blocks are finished"),
    ],
)
def test_interrupted_says_what_is_kept(runs: Runs, monkeypatch: pytest.MonkeyPatch, function: str, left: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(function, raiser(KeyboardInterrupt()))
        code, out, err = runs("--quiet")
    assert (code, out) == (130, "")
    assert err.startswith(f"llm_snp: interrupted; {left} and kept in {runs.partial}; go on with: ")
    assert runs("--resume", "--quiet")[0] == 0
    runs.is_whole()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_that_asks_to_end_is_as_an_interruption(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)
    with monkeypatch.context() as patch:
        once(patch, PrunedBlocks, "save", 2, lambda: os.kill(os.getpid(), number))
        found, out, err = runs("--quiet")
    assert (found, out) == (code, "")
    assert err.startswith(f"llm_snp: interrupted; 2 of 3 blocks are finished and kept in {runs.partial}; go on with: ")
    assert runs("--resume", "--quiet")[0] == 0
    runs.is_whole()


def test_a_signal_at_once_leaves_nothing(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_snp.running.run.open_job", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    before = sorted(runs.shell.directory.iterdir())
    assert runs("--quiet") == (143, "", "llm_snp: interrupted\n")
    assert sorted(runs.shell.directory.iterdir()) == before


def test_signals_that_somebody_handles_stay_theirs(runs: Runs) -> None:
    """As with `nohup`, or in a program with a handler of its own."""
    for handler in (signal.SIG_IGN, lambda *_: None):
        earlier = signal.signal(signal.SIGTERM, handler)
        try:
            with ended_by_signals():
                assert signal.getsignal(signal.SIGTERM) is handler
            assert signal.getsignal(signal.SIGTERM) is handler
        finally:
            signal.signal(signal.SIGTERM, earlier)


def test_interrupted_while_tidying(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        once(
            patch, os, "rename", 1, lambda: patch.setattr("llm_snp.system.workspace.tidy", raiser(KeyboardInterrupt()))
        )
        code, _, err = runs("--quiet")
    assert (code, err) == (130, f"llm_snp: interrupted; {runs.output} is finished all the same\n")
    assert "is finished already" in runs("--resume")[2]
    runs.is_whole()


# Refused


CHANGES: list[tuple[list[str], str]] = [
    (["--sparsity", "0.4"], "--sparsity is 0.4 now and was 0.3 in the interrupted run"),
    (["--samples", "8"], "--samples is 8 now and was 12 in"),
    (["--sequence-length", "16"], "--sequence-length is 16 now and was 32 in"),
    (["--seed", "1"], "--seed is 1 now and was 0 in"),
    (["--method", "snp"], "--method is 'snp' now and was 'best' in"),
    (["--order", "energy"], "--order is 'energy' now and was 'greedy' in"),
    (["--damping", "auto"], "--damping is 'auto' now and was 0.02 in"),
    (["--round-to", "8"], "--round-to is 8 now and was 1 in"),
    (["--sensitive-order"], "--sensitive-order is True now and was False in"),
    (["--dtype", "bfloat16"], "--dtype is 'bfloat16' now and was 'float32' in"),
]


def test_another_option(runs: Runs) -> None:
    runs.interrupted()
    for flags, message in CHANGES:
        found = runs.refused("--resume", *flags)
        assert found.startswith(f"--resume: {message}")
        assert found.endswith("; give the same again, or start anew with --overwrite instead of --resume")
    runs.finishes(blocks=2)


def test_another_version(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.interrupted()
    monkeypatch.setattr("llm_snp.running.resume.__version__", "99")
    assert runs.refused("--resume").startswith("--resume: llm_snp is '99' now and was '")


def test_what_may_be_another(runs: Runs, dense: Path, text: Path, held_out: Path) -> None:
    """Names do not matter, contents do."""
    runs.interrupted()
    runs.model = Path(shutil.copytree(dense, runs.shell.directory / "model"))
    copies = [Path(shutil.copy(path, runs.shell.directory / f"copy-of-{path.name}")) for path in (text, held_out)]
    offload = runs.shell.directory / "offload"
    offload.mkdir()
    more = ("--calibration", copies[0], "--evaluate", copies[1], "--dtype", "float32", "--offload", offload, "--quiet")
    assert runs("--resume", *more)[0] == 0
    assert result(runs.output) == result(runs.whole)
    found = report_of(runs.output)["evaluation"]
    assert set(found) == {held_out.name, copies[1].name}
    for source, values in found.items():
        assert {result["source"] for result in values.values()} == {source}


def one_weight(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.decoder.layers.2.fc1.weight"][0, 0] += 1e-3
    save_file(tensors, model / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (one_weight, "weights"),
        (lambda model: edit_json(model / "config.json", lambda c: c.update(note=1)), "config.json"),
        (
            lambda model: edit_json(model / "tokenizer_config.json", lambda c: c.update(note=1)),
            "tokenizer, templates and terms",
        ),
    ],
)
def test_another_model(runs: Runs, dense: Path, change: Callable[[Path], None], field: str) -> None:
    runs.interrupted()
    runs.model = Path(shutil.copytree(dense, runs.shell.directory / "model"))
    change(runs.model)
    assert runs.refused("--resume").startswith(f"--resume: the hash of the model's {field} is '")
    runs.model = dense
    runs.finishes(blocks=2)


def test_another_text(runs: Runs, text: Path) -> None:
    runs.interrupted()
    other = runs.shell.directory / "other.txt"
    other.write_text(text.read_text().replace("a", "e"))
    found = runs.refused("--resume", "--calibration", other)
    assert found.startswith("--resume: the hash of the calibration text's windows is '")


def test_bad_input_costs_nothing_that_was_finished(runs: Runs, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.interrupted()
    broken = Path(shutil.copytree(dense, runs.shell.directory / "model"))
    (broken / "model.safetensors").write_bytes((dense / "model.safetensors").read_bytes()[:1000])
    assert "--offload absent is no directory" in runs.refused("--resume", "--offload", "absent")
    assert "absent.txt is neither a file nor" in runs.refused("--resume", "--calibration", "absent.txt")
    assert "absent.txt is neither a file nor" in runs.refused("--resume", "--evaluate", "absent.txt")
    runs.model = broken
    assert "cannot be read, it may be truncated" in runs.refused("--resume")
    (broken / "model.safetensors").unlink()
    assert "has no weights" in runs.refused("--resume")
    runs.model = dense
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(runs.shell.directory)
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        assert "the result needs up to " in runs.refused("--resume")
    for error in (NumericalError("overflow"), torch.OutOfMemoryError("CUDA out of memory"), ZeroDivisionError()):
        with monkeypatch.context() as patch:
            patch.setattr("llm_snp.pruning.executor.repair_site", raiser(error))
            before = state_of(runs.partial)
            if isinstance(error, ZeroDivisionError):
                with pytest.raises(ZeroDivisionError):
                    runs("--resume")
            else:
                assert runs("--resume", "--quiet")[0] == 2
            assert state_of(runs.partial) == before
    runs.finishes(blocks=2)


def test_space_for_what_is_missing_is_enough(runs: Runs, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.interrupted()
    usage = shutil.disk_usage(runs.shell.directory)
    free = sum(path.stat().st_size for path in dense.iterdir()) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    runs.finishes(blocks=2)


# With and without --resume and --overwrite


def test_finished_blocks_are_not_thrown_away(runs: Runs) -> None:
    runs.interrupted()
    message = runs.refused()
    assert message == (
        f"{runs.partial} holds 2 finished blocks of an interrupted run; add --resume to go on with it, if it is "
        "yours, or --overwrite to start anew"
    )
    assert runs("--overwrite", "--seed", "1")[0] == 0
    assert result(runs.output) != result(runs.whole)
    assert not runs.partial.exists()
    assert runs("--overwrite")[0] == 0
    runs.is_whole()


def test_resume_with_nothing_there(runs: Runs) -> None:
    assert "(finished before)" not in runs.finishes()


def test_resume_of_what_is_finished(runs: Runs, dense: Path, held_out: Path) -> None:
    assert runs()[0] == 0
    before = state_of(runs.output)
    table = runs("--resume")[1]
    assert "load it" in table
    code, out, err = runs("--resume", "--quiet", "--device", "auto")
    assert (code, out, err) == (0, table, "")
    for flags, message in (
        *CHANGES,
        (["--dtype", "float32"], "--dtype is 'float32' now"),
        (["--no-evaluate"], "--evaluate is [] now"),
        (["--calibration", str(held_out)], f"--calibration is ['{held_out}'] now"),
    ):
        found = runs.refused("--resume", *flags)
        assert found.startswith(f"--resume: {runs.output} is finished, and {message.split(' now')[0]} now and was ")
        assert found.endswith(" there; give another --output, or --overwrite")
    runs.model = Path(shutil.copytree(dense, runs.shell.directory / "model"))
    assert f"and the model is '{runs.model}' now and was '{dense}' there" in runs.refused("--resume")
    assert state_of(runs.output) == before


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda model, text: one_weight(model), "the hash of the model's weights"),
        (lambda model, text: edit_json(model / "config.json", lambda c: c.update(note=1)), "the model's config.json"),
        (lambda model, text: text.write_text(text.read_text().replace("a", "e")), "the hash of {text}"),
        (
            lambda model, text: (model / "README.md").write_text("---\nlicense: mit\n---\n"),
            "the terms in the model's card",
        ),
    ],
)
def test_resume_of_what_is_finished_and_was_made_of_others(
    runs: Runs, dense: Path, text: Path, change: Callable[[Path, Path], None], what: str
) -> None:
    """The same command, but what it names is not what it was: an earlier result is none of it."""
    runs.model = Path(shutil.copytree(dense, runs.shell.directory / "model"))
    own = runs.shell.directory / "own.txt"
    own.write_text(text.read_text())
    flags = ("--calibration", own)
    assert runs(*flags)[0] == 0
    before = state_of(runs.output)
    assert "is finished already" in runs("--resume", *flags)[2]
    change(runs.model, own)
    found = runs.refused("--resume", *flags)
    assert found.startswith(f"--resume: {runs.output} is finished, and ")
    assert what.format(text=own) in found
    assert state_of(runs.output) == before
    assert runs("--overwrite", "--resume", *flags)[0] == 0
    assert "is finished already" in runs("--resume", *flags)[2]


def test_resume_over_a_finished_result_of_another_command(runs: Runs) -> None:
    assert runs("--seed", "1")[0] == 0
    runs.interrupted()
    assert "--seed is 0 now and was 1 there" in runs.refused("--resume")
    runs.finishes("--overwrite", blocks=2)


def test_what_somebody_else_put_aside_stays(runs: Runs) -> None:
    aside = runs.shell.directory / "out.replaced"
    aside.mkdir()
    (aside / "thesis.tex").write_text("years of work")
    assert runs.refused() == f"{aside} is in the way; it may be a still earlier result: move or remove it"
    (aside / "thesis.tex").unlink()
    aside.rmdir()
    with pytest.MonkeyPatch.context() as patch:
        once(patch, Writer, "index", 1, aside.mkdir)
        code, _, err = runs("--quiet")
    assert code == 2
    assert f"{aside} is in the way" in err
    aside.rmdir()
    runs.finishes(blocks=3)


# Damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_digit(path: Path) -> None:
    """Another number in a record that is still JSON."""
    content = path.read_text()
    at = content.index('"record"')
    found = re.compile(r"(?<=\.\d{3})\d").search(content, at)
    assert found
    digit = "1" if found[0] != "1" else "2"
    path.write_text(content[: found.start()] + digit + content[found.end() :])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def wipe(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(("block", "damage"), [(0, Path.unlink), (1, truncate), (0, flip), (1, wipe)])
def test_damaged_shard(runs: Runs, block: int, damage: Callable[[Path], None]) -> None:
    runs.interrupted()
    damage(runs.partial / SHARDS[block])
    code, _, err = runs("--resume")
    assert code == 0, err
    line = f"{SHARDS[block]} was gone or damaged: made again"
    assert line in err
    assert err.count("(finished before)") == 1
    assert notes_of(runs.output) == [line]
    runs.is_whole()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("block-00000", flip_digit),
        ("block-00001", truncate),
        ("block-00001", lambda path: path.write_text("[]")),
        ("curves-00000", flip_digit),
        ("curves-00001", wipe),
        ("curves-00002", truncate),
        ("dense-*", flip_digit),
        ("dense-*", lambda path: path.write_text('{"record": 1}')),
    ],
)
def test_damaged_record(runs: Runs, name: str, damage: Callable[[Path], None]) -> None:
    runs.interrupted()
    path = min(runs.journal.glob(f"{name}.json"))  # the dense model is measured on several texts
    damage(path)
    code, _, err = runs("--resume")
    assert code == 0, err
    line = f"{path.name} of the interrupted run was damaged: made again"
    assert err.count(line) == 1
    assert notes_of(runs.output) == [line]
    runs.is_whole()


@pytest.mark.parametrize("damage", [Path.unlink, truncate, flip])
def test_damaged_sensitivity(runs: Runs, damage: Callable[[Path], None]) -> None:
    runs.interrupted()
    damage(runs.journal / "sensitivity-00001.safetensors")
    code, _, err = runs("--resume", "--quiet")
    assert code == 0, err
    runs.is_whole()
    expected = "sensitivity-00001.safetensors of the interrupted run was gone or damaged: made again"
    assert notes_of(runs.output) == [expected]


def test_sensitivity_that_vanishes_in_the_middle(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = runs.journal / "sensitivity-00002.safetensors"
    with monkeypatch.context() as patch:
        once(patch, PrunedBlocks, "save", 2, gone.unlink)
        code, _, err = runs("--quiet", "--sensitive-order")
    assert code == 2
    assert err == f"llm_snp: {gone} is gone or damaged, while the run needs it; start it again with --resume\n"
    assert runs("--sensitive-order", "--resume", "--quiet")[0] == 0
    assert runs("--sensitive-order", "--quiet", "--output", "whole")[0] == 0
    assert result(runs.output) == result(Path("whole"))


@pytest.mark.parametrize(
    ("name", "damage"), [("settings", Path.unlink), ("settings", flip), ("model", truncate), ("calibration", wipe)]
)
def test_nothing_tells_whether_it_was_the_same_command(runs: Runs, name: str, damage: Callable[[Path], None]) -> None:
    """Then finished blocks may be of another one: they are neither used nor thrown away."""
    runs.interrupted()
    damage(runs.journal / f"{name}.json")
    found = runs.refused("--resume")
    assert found.startswith(f"{runs.journal / name}.json is gone or damaged, so nothing tells whether ")
    assert found.endswith("; start anew with --overwrite instead of --resume")


def test_a_block_that_comes_out_differently(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on another device: what was fitted to it as it was is made again, too, also after another interruption."""
    runs.interrupted()
    (runs.partial / SHARDS[0]).unlink()
    repair_site = llm_snp.pruning.executor.repair_site

    def differently(*args: Any) -> Any:
        found = repair_site(*args)
        found.state["fc2.bias"] += 1e-3
        return found

    with monkeypatch.context() as patch:
        patch.setattr("llm_snp.pruning.executor.repair_site", differently)
        once(patch, PrunedBlocks, "save", 1, raiser(KeyboardInterrupt()))
        assert "1 of 3 blocks are finished" in runs("--resume")[2]
    code, _, err = runs("--resume")
    assert code == 0, err
    assert err.count("(finished before)") == 1
    assert not any(
        result(runs.output)[name] == content for name, content in result(runs.whole).items() if name in SHARDS
    )


def test_a_plan_that_comes_out_differently(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.interrupted()
    kept = [dict(entry) for entry in report_of(runs.whole)["plan"]["kept"]]
    kept[1]["neurons"] -= 1
    make_plan = llm_snp.pruning.decide.make_plan

    def otherwise(*args: Any) -> Any:
        plan = make_plan(*args)
        plan.kept[1]["neurons"] -= 1
        return plan

    monkeypatch.setattr("llm_snp.pruning.decide.make_plan", otherwise)
    code, _, err = runs("--resume")
    assert code == 0, err
    assert f"{SHARDS[1]} was pruned by another plan: made again" in err
    assert report_of(runs.output)["plan"]["kept"] == kept
    assert load_file(runs.output / SHARDS[1])["model.decoder.layers.1.fc1.weight"].shape[0] == kept[1]["neurons"]


# Two runs at once


def test_two_runs_into_one_directory(runs: Runs) -> None:
    process = start(runs.arguments("--quiet"), "after", "block-00000.json", signal.SIGSTOP)
    status = Path(f"/proc/{process.pid}/stat")
    until(lambda: status.read_text().rpartition(")")[2].split()[0] == "T")
    busy = (
        f"another run (process {process.pid} on {socket.gethostname()}) is writing to {runs.partial}; wait for it, or "
        "give another --output"
    )
    for flags in ([], ["--resume"], ["--overwrite"], ["--overwrite", "--resume"]):
        assert runs.refused(*flags) == busy
    process.kill()
    process.join()
    runs.finishes(blocks=1)


def test_a_lock_without_an_owner(runs: Runs) -> None:
    runs.journal.mkdir(parents=True)
    with FileLock(runs.journal / LOCK):
        assert runs.refused().startswith(f"another run is writing to {runs.partial}; wait for it")
    runs.finishes()


# Disks and devices


@pytest.fixture
def disk(shell: Shell, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A real file system of so many kilobytes."""
    mounted = shell.directory / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(mounted)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not permitted")
    yield mounted
    subprocess.run(["umount", "-l", str(mounted)], check=False)


def fill(disk: Path, left: int) -> Path:
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - left))
    return ballast


@pytest.mark.parametrize("disk", [2000], indirect=True)
def test_disk_full_while_writing_a_shard(runs: Runs, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.flags[runs.flags.index(str(runs.output))] = str(disk / "out")
    runs.output, runs.partial = disk / "out", disk / "out.partial"
    with monkeypatch.context() as patch:
        once(patch, PrunedBlocks, "save", 1, lambda: fill(disk, 8192))
        code, out, err = runs("--quiet")
    assert (code, out) == (2, "")
    assert err.startswith(
        f"llm_snp: {runs.partial / SHARDS[1]} cannot be written: the disk is full; free some space or give another "
        f"directory; 1 of 3 blocks are finished and kept in {runs.partial}; go on with: "
    )
    assert not list(runs.partial.glob(".model-*"))  # it would take the little room there is
    before = state_of(disk)
    code, _, err = runs("--quiet", "--resume")
    assert code == 2
    assert "the result needs up to " in err
    assert state_of(disk) == before
    (disk / "ballast").unlink()
    code, _, err = runs("--resume")
    assert code == 0, err
    assert err.count("(finished before)") == 1
    assert result(runs.output) == result(runs.whole)


@pytest.mark.parametrize("disk", [100], indirect=True)
def test_disk_full_from_the_beginning(runs: Runs, disk: Path) -> None:
    fill(disk, 0)
    assert "cannot be written: the disk is full" in runs.refused("--output", disk / "new" / "out")
    assert [path.name for path in disk.iterdir()] == ["ballast"]


def test_offloaded(runs: Runs) -> None:
    offload = runs.shell.directory / "offload"
    offload.mkdir()
    runs.killed("after", "curves-00001.json", "--offload", offload)
    assert not list(offload.iterdir())
    runs.killed("after", "block-00000.json", "--offload", offload, "--resume")
    assert not list(offload.iterdir())
    runs.finishes("--offload", offload, blocks=1)
    assert not list(offload.iterdir())


def test_offloaded_files_are_mapped_and_have_no_name(tmp_path: Path) -> None:
    tensor = Storage(tmp_path).empty((3, 5), torch.bfloat16)
    tensor.copy_(torch.arange(15.0).view(3, 5))
    assert not list(tmp_path.iterdir())
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    assert tensor[2, 4] == 14
    del tensor
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert Storage(tmp_path).empty((0, 5), torch.float32).shape == (0, 5)


@pytest.mark.parametrize("disk", [100], indirect=True)
def test_disk_full_while_offloading(runs: Runs, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something else has filled it since it was looked at."""
    message = f"{disk} cannot be written: the disk is full; free some space or give another directory"
    with pytest.raises(DiskFullError, match=re.escape(message)):
        Storage(disk).empty((100, 1000), torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr("llm_snp.running.room.check_space", lambda *arguments: None)
        code, _, err = runs("--quiet", "--offload", disk)
    assert code == 2
    assert err.startswith(f"llm_snp: {message}")
    assert "Traceback" not in err
    assert not list(disk.iterdir())
    assert runs("--quiet", "--resume")[0] == 0
    runs.is_whole()


@pytest.mark.parametrize("disk", [60], indirect=True)
def test_a_disk_too_small_for_the_hidden_states_is_noticed_before_anything_is_computed(runs: Runs, disk: Path) -> None:
    """There is room for those of one model, and a run has those of the dense and of the pruned one."""
    states = SAMPLES * LENGTH * HIDDEN * torch.float32.itemsize
    assert states < shutil.disk_usage(disk).free < 2 * states
    message = f"the hidden states need up to {size(2 * states)}, but the disk of {disk} has "
    assert runs.refused("--offload", disk, "--no-evaluate").startswith(message)
    assert not runs.partial.exists()
    runs.interrupted()
    assert message in runs.refused("--offload", disk, "--overwrite")
    runs.finishes(blocks=2)


def test_hidden_states_beside_the_result_need_room_for_both(
    runs: Runs, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(runs.shell.directory)
    free = sum(path.stat().st_size for path in dense.iterdir() if path.is_file()) + 50_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    message = runs.refused("--offload", runs.shell.directory)
    assert message.startswith("the result and the hidden states need up to ")
    assert message.endswith("; give --offload on another disk")
    # A longer text is evaluated on when the result is there.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free + 200_000))
    message = runs.refused("--offload", runs.shell.directory, "--evaluate", runs.shell.text)
    assert message.startswith("the result and the hidden states of a text to evaluate on need up to ")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    assert runs("--quiet")[0] == 0


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_offload_that_cannot_be(runs: Runs, flags: list[str]) -> None:
    file = runs.shell.directory / "file"
    file.touch()
    for name in ("absent", "file", "~nobody/absent"):
        message = runs.refused("--offload", name, *flags)
        assert message == f"--offload {name} is no directory that can be written to; make it first"
    if os.geteuid():
        locked = runs.shell.directory / "locked"
        locked.mkdir(0o500)
        assert "is no directory that can be written to" in runs.refused("--offload", locked, *flags)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"),
            "CUDA out of memory. Tried to allocate 2.00 GiB.",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "DefaultCPUAllocator: can't allocate memory"),
        (MemoryError(), "MemoryError"),  # of Python, where its address space is limited
    ],
)
def test_device_out_of_memory(runs: Runs, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    with monkeypatch.context() as patch:
        once(
            patch,
            PrunedBlocks,
            "save",
            1,
            lambda: patch.setattr("llm_snp.pruning.executor.calibrate_site", raiser(error)),
        )
        code, out, err = runs("--quiet")
    assert (code, out) == (2, "")
    assert err.startswith(
        f"llm_snp: the device ran out of memory ({said}); use --device cpu or a shorter "
        "--sequence-length; --dry-run tells what a run needs; 1 of 3 blocks are finished and kept in "
        f"{runs.partial}; go on with: "
    )
    assert err.endswith(" --resume\n")
    assert err.count("\n") == 1
    runs.finishes(blocks=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, "is gone; download it again"),
        (truncate, "has changed since it was first read; put back the file as it was"),
        (lambda path: one_weight(path.parent), "has changed since it was first read; put back the file as it was"),
    ],
)
def test_dense_model_that_changes_in_the_middle(
    runs: Runs, dense: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], message: str
) -> None:
    runs.model = Path(shutil.copytree(dense, runs.shell.directory / "model"))
    weights = runs.model / "model.safetensors"
    with monkeypatch.context() as patch:
        once(patch, PrunedBlocks, "save", 1, lambda: change(weights))
        code, out, err = runs("--quiet")
    assert (code, out) == (2, "")
    assert err.startswith(f"llm_snp: {weights} {message}; ")
    kept = re.search(r"; (\d) of 3 blocks are finished and kept in (.*); go on with: ", err)
    assert kept, err  # one or two: blocks are read ahead
    assert Path(kept[2]) == runs.partial
    if weights.exists() and weights.stat().st_size == (dense / weights.name).stat().st_size:
        assert "the hash of the model's weights is '" in runs.refused("--resume")
    shutil.copy(dense / weights.name, weights)
    runs.finishes(blocks=int(kept[1]))
