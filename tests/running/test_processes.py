"""Several processes: the result of one, whatever goes wrong in which of them."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BLOCKS, LENGTH, Prune, words
from safetensors import safe_open
from tiny_models import KNOWN, save_tiny

from llm_snp import cli
from llm_snp.config import PruneConfig
from llm_snp.dense import stream
from llm_snp.errors import NumericalError, OptionError, ProcessError
from llm_snp.pruning import executor, measure
from llm_snp.pruning.sensitivity import gradient_windows
from llm_snp.running.run import check_processes
from llm_snp.system.processes import Processes

pytestmark = pytest.mark.cpu

PATIENCE = 60.0  # seconds in which every process must have ended


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it printed."""

    code: int | None
    out: str
    err: str


def work(
    rank: int, count: int, port: int, directory: Path, before: Callable[[int], None], arguments: list[str]
) -> None:
    """One process: `before` with its number, then the command line, unless there are no arguments."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(directory / f"{name}-{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in here.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.chdir(directory)
    torch.set_num_threads(1)
    # A shell that starts the tests in the background has them ignore Ctrl-C, and every process after them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["llm_snp", *arguments]
    before(rank)
    sys.exit(cli.main(arguments) if arguments else 0)


class Group:
    """Starts processes that belong together; they come from a server that has imported everything already."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            ["llm_snp.running.run", "llm_snp.running.preview", "llm_snp.healing.run", "conftest"]
        )

    def start(self, count: int, before: Callable[[int], None], *arguments: object) -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        texts = [str(argument) for argument in arguments]
        group = [
            self.context.Process(target=work, args=(rank, count, port, self.directory, before, texts))
            for rank in range(count)
        ]
        for process in group:
            process.start()
        return group

    def wait(self, group: list[Any], patience: float = PATIENCE) -> list[Ended]:
        """Wait for all; fails if one hangs."""
        until = time.monotonic() + patience
        for process in group:
            process.join(max(0.0, until - time.monotonic()))
        hanging = [rank for rank, process in enumerate(group) if process.is_alive()]
        for process in group:
            process.kill()
            process.join()
        ended = []
        for rank, process in enumerate(group):
            out, err = ((self.directory / f"{name}-{rank}").read_text() for name in ("out", "err"))
            ended.append(Ended(process.exitcode, out, err))
        assert not hanging, f"processes {hanging} hang: {ended}"
        return ended

    def run(self, count: int, before: Callable[[int], None], *arguments: object) -> list[Ended]:
        return self.wait(self.start(count, before, *arguments))


@pytest.fixture
def group(tmp_path: Path) -> Group:
    return Group(tmp_path)


def nothing(rank: int) -> None:
    pass


def small_batches(rank: int) -> None:
    """Five windows at once, more than some process has; and files for the main process only."""
    stream.BATCH_TOKENS["cpu"] = 5 * LENGTH

    def forbidden(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"process {rank} writes {arguments}")

    mkdir, unlink = os.mkdir, os.unlink

    def scratch(path: Any, *arguments: Any, **options: Any) -> None:
        """A config is read from a folder of its own in the system's, by every process."""
        (mkdir if Path(path).name.startswith("llm-snp-") else forbidden)(path, *arguments, **options)

    def emptied(path: Any, *, dir_fd: int | None = None) -> None:
        """What removes that folder names its files relative to it."""
        forbidden(path) if dir_fd is None else unlink(path, dir_fd=dir_fd)

    if rank:
        os.replace = os.rename = forbidden
        os.mkdir, os.unlink = scratch, emptied


def command(model: Path, output: Path, text: Path, samples: int, **options: Any) -> list[str]:
    """The command line of `prune` with these options."""
    found = [model, "--sparsity", 0.3, "--output", output, "--calibration", options.pop("calibration", text)]
    found += ["--samples", samples, "--sequence-length", LENGTH, "--device", "cpu"]
    evaluate = options.pop("evaluate", ())
    found += [word for source in evaluate for word in ("--evaluate", source)] or ["--no-evaluate"]
    for name, value in options.items():
        found += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    return [str(word) for word in found]


def report_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "report.json").read_text())
    return found


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def assert_same(output: Path, expected: Path) -> None:
    """The same plan, the same files, and the same weights but for rounding."""
    found, wanted = report_of(output), report_of(expected)
    assert found["plan"]["kept"] == wanted["plan"]["kept"]
    for curve, other in zip(found["plan"]["curves"], wanted["plan"]["curves"], strict=True):
        assert curve["unit"] == other["unit"]
        for name in ("loss", "variance"):
            if name in other:
                assert curve[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6 * max(other[name]))
    for block, other in zip(found["blocks"], wanted["blocks"], strict=True):
        for site in ("attention", "mlp"):
            lost = other[site]["lost"]
            assert block[site]["lost"] == (lost if lost is None else pytest.approx(lost, rel=1e-3))
            assert block[site]["damping"] == other[site]["damping"]
    for source, evaluation in wanted["evaluation"].items():
        for which, result in evaluation.items():
            perplexity = found["evaluation"][source][which]
            assert perplexity["perplexity"] == pytest.approx(result["perplexity"], rel=1e-5)
            assert perplexity["windows"] == result["windows"]
    assert found["calibration"] == wanted["calibration"]
    # Plots are made in processes of their own only, see `documents` in conftest.
    names = [{path.name for path in directory.iterdir()} - {"plots"} for directory in (output, expected)]
    assert names[0] == names[1]
    weights, others = tensors(output), tensors(expected)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: name + text)


def assert_one_speaks(ended: list[Ended]) -> None:
    """All went well, and the main process alone has said so."""
    assert [process.code for process in ended] == [0] * len(ended), ended
    assert ended[0].out.count("load it  AutoModelForCausalLM") == 1
    for process in ended[1:]:
        assert process.out == ""
        assert process.err == ""


@pytest.mark.parametrize(
    ("count", "samples", "options"),
    [
        (2, 7, {}),
        (3, 8, {"damping": "auto", "sensitive_order": True}),
        (3, 8, {"method": "snp", "calibration": "self"}),
        (2, 7, {"attention": "dims", "target": "dense", "damping": "auto", "sensitivity": "scalar"}),
    ],
)
def test_the_same_result(
    group: Group,
    prune: Prune,
    dense: Path,
    text: Path,
    held_out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    samples: int,
    options: dict[str, Any],
) -> None:
    assert samples % count
    assert count == 2 or gradient_windows(samples, BLOCKS) < count  # one has no part in the gradient
    monkeypatch.setitem(stream.BATCH_TOKENS, "cpu", 5 * LENGTH)
    short = tmp_path / "short.txt"
    short.write_text(" ".join(words(15, seed=3)))
    prune(dense, tmp_path / "one", samples=samples, evaluate=(str(held_out), str(short)), **options)
    assert report_of(tmp_path / "one")["evaluation"][short.name]["dense"]["windows"] < count
    arguments = command(dense, tmp_path / "out", text, samples, evaluate=(held_out, short), **options)
    ended = group.run(count, small_batches, *arguments, "--offload", tmp_path)
    assert_one_speaks(ended)
    assert len(re.findall(r"^block 1/3", ended[0].err, re.MULTILINE)) == 1
    assert "warn" not in ended[0].err.lower()
    assert_same(tmp_path / "out", tmp_path / "one")
    assert report_of(tmp_path / "out")["device"]["processes"] == count
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(("mode", "table"), [("dims", "pair_table"), ("queries", "readers")])
def test_tables_travel(group: Group, prune: Prune, text: Path, tmp_path: Path, mode: str, table: str) -> None:
    """Which the blocks of some families get only when they are pruned."""
    dense = save_tiny("llama", tmp_path / "dense")
    prune(dense, tmp_path / "one", samples=8, attention=mode)
    assert_one_speaks(group.run(2, small_batches, *command(dense, tmp_path / "out", text, 8, attention=mode)))
    assert_same(tmp_path / "out", tmp_path / "one")
    assert any(name.endswith(table) for name in tensors(tmp_path / "out"))


@pytest.mark.skipif("qwen2_moe" not in KNOWN, reason="this transformers does not have experts as they are needed")
@pytest.mark.parametrize("mode", ["whole", "both"])
def test_experts_of_several_processes(group: Group, prune: Prune, text: Path, tmp_path: Path, mode: str) -> None:
    dense = save_tiny("qwen2_moe", tmp_path / "dense")
    prune(dense, tmp_path / "one", samples=8, experts=mode)
    assert_one_speaks(group.run(2, small_batches, *command(dense, tmp_path / "out", text, 8, experts=mode)))
    assert_same(tmp_path / "out", tmp_path / "one")


def test_what_is_gone_is_gone_everywhere(group: Group, prune: Prune, dense: Path, text: Path, tmp_path: Path) -> None:
    """Tensors of layers that went as a whole; on every process those that follow are fitted without them."""
    options: dict[str, Any] = {"structures": "layers", "sparsity": 0.45}
    report = prune(dense, tmp_path / "one", samples=8, **options)
    assert any(0 in kept.values() for kept in report["plan"]["kept"])
    assert_one_speaks(group.run(2, small_batches, *command(dense, tmp_path / "out", text, 8, **options)))
    assert_same(tmp_path / "out", tmp_path / "one")


def test_the_same_steps_are_taken(group: Group, prune: Prune, dense: Path, text: Path, tmp_path: Path) -> None:
    """Of `--method everything`; sums of the similarities cross, and one process decides."""
    options: dict[str, Any] = {"method": "everything", "attention": "heads", "sensitivity": "relative"}
    report = prune(dense, tmp_path / "one", 0.1662, samples=16, **options)
    arguments = command(dense, tmp_path / "out", text, 16, sparsity=0.1662, **options)
    assert_one_speaks(group.run(2, small_batches, *arguments))
    assert_same(tmp_path / "out", tmp_path / "one")
    steps = report_of(tmp_path / "out")["steps"]
    assert [step["taken"] for step in steps] == [step["taken"] for step in report["steps"]]
    assert steps[-1][steps[-1]["taken"]]["to_dense"] == pytest.approx(
        report["steps"][-1][steps[-1]["taken"]]["to_dense"], rel=1e-4
    )


def test_every_process_needs_a_window_that_is_held_out() -> None:
    options = PruneConfig(method="everything", samples=16)
    check_processes(options, 2)
    with pytest.raises(OptionError, match=r"holds out 2 of the 16 windows .* each of the 3 .* at least 24, or"):
        check_processes(options, 3)
    with pytest.raises(OptionError, match="but each of the 3 processes needs a calibration window"):
        check_processes(PruneConfig(method="everything", samples=3), 3)


def test_curves_do_not_depend_on_where_the_hidden_states_are(
    prune: Prune, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU a batch is a view of the hidden states, which move on; on a GPU it is a copy."""
    prune(dense, tmp_path / "view", attention="dims")
    batches = stream.Stream.batches

    def copied(self: stream.Stream, index: int) -> Iterator[tuple[slice, torch.Tensor, Any]]:
        for rows, hidden, call in batches(self, index):
            yield rows, hidden.clone(), call

    monkeypatch.setattr(stream.Stream, "batches", copied)
    prune(dense, tmp_path / "copy", attention="dims")
    assert report_of(tmp_path / "view")["plan"] == report_of(tmp_path / "copy")["plan"]


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_as_a_person_starts_it(
    prune: Prune, dense: Path, text: Path, held_out: Path, tmp_path: Path, launcher: str
) -> None:
    prune(dense, tmp_path / "one", samples=7, evaluate=(str(held_out),))
    start = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
    }[launcher]
    if launcher == "accelerate":  # it warns of defaults, and takes a fixed port
        start += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    arguments = command(dense, tmp_path / "out", text, 7, evaluate=(held_out,))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *start, "-m", "llm_snp", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=5 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("load it  AutoModelForCausalLM") == 1
    assert len(re.findall(r"^block 1/3", done.stderr, re.MULTILINE)) == 1
    assert "warn" not in done.stderr.lower()  # such as of a group that was not destroyed
    assert_same(tmp_path / "out", tmp_path / "one")
    assert report_of(tmp_path / "out")["device"]["processes"] == 2


def test_shares() -> None:
    alone = Processes()
    assert (alone.count, alone.index, alone.main) == (1, 0, True)
    for count in range(1, 6):
        for items in range(12):
            shares = []
            for alone.index in range(count):
                alone.count = count
                shares.append(alone.share(items))
            assert [item for share in shares for item in share] == list(range(items))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def collectives(rank: int) -> None:
    processes = Processes(cpu=True)
    assert (processes.count, processes.index, processes.local_index) == (2, rank, rank)
    assert processes.main == (rank == 0)
    assert list(processes.share(7)) == ([0, 1, 2, 3] if rank == 0 else [4, 5, 6])
    ones = torch.ones(3, 2, dtype=torch.float64)
    processes.sum(ones)
    assert torch.equal(ones, torch.full((3, 2), 2.0, dtype=torch.float64))
    number = torch.tensor([float(rank)])
    processes.same(number)
    assert number.item() == 0.0

    def mine() -> dict[str, int]:
        assert rank == 0
        return {"from": rank}

    assert processes.from_main(mine) == {"from": 0}
    assert processes.on_main(mine) == ({"from": 0} if rank == 0 else None)
    assert processes.from_main(lambda: None) is None
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)
    sent = {str(dtype): torch.arange(6).view(2, 3).to(dtype) for dtype in dtypes}
    sent |= {"turned": torch.arange(6.0).view(2, 3).T, "one": torch.tensor(3.0), "none": torch.empty(0, 4)}
    found = processes.tensors_from_main(sent if rank == 0 else None, torch.device("cpu"))
    assert list(found) == list(sent)
    assert all(torch.equal(found[name], sent[name]) and found[name].dtype == sent[name].dtype for name in sent)
    assert processes.tensors_from_main({} if rank == 0 else None, torch.device("cpu")) == {}
    assert processes.gather([f"{rank}a", f"{rank}b"][: rank + 1]) == ["0a", "1a", "1b"]
    assert processes.gather([]) == []

    def wrong() -> None:
        raise NumericalError("is what main met")

    for method in (processes.from_main, processes.on_main):
        with pytest.raises(NumericalError, match=r"^is what main met$") as raised:
            method(wrong)
        assert raised.value.from_main == (rank == 1)
    again = Processes(cpu=True)  # a second run in the same script
    again.sum(number)
    assert (again.count, number.item()) == (2, 0.0)
    with pytest.raises(ZeroDivisionError), processes:
        raise ZeroDivisionError
    with pytest.raises(ProcessError, match="parted after an error"):
        Processes(cpu=True)


def test_what_travels_between_processes(group: Group) -> None:
    for process in group.run(2, collectives):
        assert process == Ended(0, "", "")


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_an_environment_that_names_others_but_not_how_to_find_them(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    monkeypatch.delenv(missing)
    with pytest.raises(OptionError, match=f"WORLD_SIZE=2, but not {missing}; start several processes with torchrun"):
        Processes(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "two")
    monkeypatch.setenv(missing, "0")
    with pytest.raises(OptionError, match="WORLD_SIZE=two, but not as a number"):
        Processes(cpu=True)


def test_bad_input_is_said_once(group: Group, dense: Path, text: Path, tmp_path: Path) -> None:
    def refused(count: int, *arguments: object) -> list[str]:
        before = sorted(tmp_path.rglob("*"))
        said = []
        for rank, process in enumerate(group.run(count, nothing, *arguments, "--quiet")):
            assert process.code == 2, process
            assert process.out == ""
            assert process.err.count("\n") <= 1, process.err
            assert process.err == "" or process.err.startswith(f"llm_snp (process {rank}): " if rank else "llm_snp: ")
            said.append(process.err.partition(": ")[2].strip())
        assert {path for path in tmp_path.rglob("*") if path.name[:3] not in ("out", "err")} <= set(before)
        return said

    output = tmp_path / "result"
    absent = tmp_path / "absent"
    # Every process looks for the model, which may be on another machine; the main one alone reads text.
    main, other = refused(2, *command(absent, output, text, 4))
    assert main == other == f"{absent} does not exist; give a model directory or a Hub id such as facebook/opt-125m"
    main, other = refused(2, *command(dense, output, absent, 4))
    assert main.startswith(f"{absent} is neither a file nor a known corpus")
    assert other == ""
    # Too many processes, and this is found before the model is looked for.
    *_, other = refused(3, *command(absent, output, text, 2))
    assert other == (
        "--samples is 2, but each of the 3 processes needs a calibration window; give more --samples, or start fewer "
        "processes"
    )
    main, _ = refused(2, *command(absent, output, text, 4), "--device", "cuda:0")
    assert main.startswith("--device cuda:0 is one GPU, but there are 2 processes, which take one each; leave it out")


def test_a_dry_run_is_printed_once(group: Group, dense: Path, text: Path, tmp_path: Path) -> None:
    main, other = group.run(2, nothing, *command(dense, tmp_path / "result", text, 4), "--dry-run")
    assert main.code == 0, main
    assert main.err == ""
    assert main.out.startswith("plan for ")
    assert other == Ended(0, "", "")


def killed_in_block(rank: int, block: int = 1) -> None:
    """Process 1 is killed while it prunes that block; the main process is solving, or waits for it."""
    run = executor._BlockPruner.run

    def killed(self: executor._BlockPruner, *arguments: Any) -> Any:
        if rank == 1 and self.index == block:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(self, *arguments)

    executor._BlockPruner.run = killed  # type: ignore[method-assign]


def killed_in_the_last_block(rank: int) -> None:
    killed_in_block(rank, BLOCKS - 1)


def test_a_process_is_killed(group: Group, prune: Prune, dense: Path, text: Path, tmp_path: Path) -> None:
    prune(dense, tmp_path / "one", samples=7)
    arguments = command(dense, tmp_path / "out", text, 7, quiet=True)
    start = time.monotonic()
    main, other = group.run(2, killed_in_block, *arguments)
    assert time.monotonic() - start < 20
    assert other.code == -signal.SIGKILL
    assert main.code == 2, main
    assert main.out == ""
    assert main.err.count("\n") == 1, main.err
    assert re.match(
        r"llm_snp: another process of this run has ended or cannot be reached \([^()]*\); its own message", main.err
    ), main.err
    assert "pair.cc" not in main.err  # where in gloo's source it was noticed
    kept = f"1 of {BLOCKS} blocks are finished and kept in {tmp_path / 'out.partial'}"
    assert f"{kept}; go on with: torchrun " in main.err
    assert main.err.endswith(" --resume\n")
    assert not (tmp_path / "out").exists()

    # One process goes on with what two have left, and two do.
    shutil.copytree(tmp_path / "out.partial", tmp_path / "two.partial")
    assert cli.main([*arguments, "--resume"]) == 0
    assert_same(tmp_path / "out", tmp_path / "one")
    arguments[arguments.index(str(tmp_path / "out"))] = str(tmp_path / "two")
    shard = next((tmp_path / "two.partial").glob("*.safetensors"))
    before = shard.stat().st_mtime_ns
    assert_one_speaks(group.run(2, nothing, *arguments, "--resume"))
    assert_same(tmp_path / "two", tmp_path / "one")
    assert (tmp_path / "two" / shard.name).stat().st_mtime_ns == before
    # Asked once more, there is nothing to do.
    assert_one_speaks(group.run(2, nothing, *arguments, "--resume"))


def test_resume_with_a_damaged_shard(group: Group, prune: Prune, dense: Path, text: Path, tmp_path: Path) -> None:
    prune(dense, tmp_path / "one", samples=8)
    arguments = command(dense, tmp_path / "out", text, 8, quiet=True)
    main = group.run(3, killed_in_the_last_block, *arguments)[0]
    assert f"{BLOCKS - 1} of {BLOCKS} blocks are finished" in main.err
    shard = min((tmp_path / "out.partial").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert_one_speaks(group.run(3, nothing, *arguments, "--resume"))
    assert_same(tmp_path / "out", tmp_path / "one")
    assert any("damaged" in note and "made again" in note for note in report_of(tmp_path / "out")["notes"])


def numerical_error(rank: int) -> None:
    """The main process, which alone solves, cannot solve the second block."""
    solve, calls = executor.refit_site, []

    def fails(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise NumericalError("no damping helps")
        return solve(*arguments)

    executor.refit_site = fails


def bug_on_main(rank: int) -> None:
    def fails(*arguments: Any) -> Any:
        raise ZeroDivisionError("a bug")

    executor.refit_site = fails


def error_on_another(rank: int) -> None:
    """Process 1 cannot solve its part of the measuring pass."""
    solve = measure._unit_curve

    def fails(curve: Any, *arguments: Any) -> Any:
        if rank == 1:
            raise NumericalError("no damping helps")
        return solve(curve, *arguments)

    measure._unit_curve = fails


def test_an_error_on_one_process_ends_all(group: Group, dense: Path, text: Path, tmp_path: Path) -> None:
    arguments = command(dense, tmp_path / "result", text, 4, quiet=True)
    main, other = group.run(2, numerical_error, *arguments)
    removed = "what was measured or finished by then is removed: no other run could go on with it"
    assert main == Ended(2, "", f"llm_snp: no damping helps; {removed}\n")
    assert other == Ended(2, "", "")  # the main one has said it
    lost = "another process of this run has ended or cannot be reached ("
    main, other = group.run(2, error_on_another, *arguments)
    assert other == Ended(2, "", "llm_snp (process 1): no damping helps\n")
    assert main.code == 2
    assert main.err.startswith(f"llm_snp: {lost}")
    main, other = group.run(2, bug_on_main, *arguments, "--overwrite")  # what was measured before is there
    assert main.code == 1
    assert main.err.rstrip().endswith("ZeroDivisionError: a bug")
    assert other.code == 2
    assert other.err.startswith(f"llm_snp (process 1): {lost}")
    assert other.err.count("\n") == 1


def slow_main(rank: int) -> None:
    """The main process takes long over the second block, while the others wait in a collective."""
    run = executor._BlockPruner.run

    def slow(self: executor._BlockPruner, *arguments: Any) -> Any:
        if rank == 0 and self.index == 1:
            os.write(1, b"busy")  # what a command prints comes at its end
            time.sleep(PATIENCE)
        return run(self, *arguments)

    executor._BlockPruner.run = slow  # type: ignore[method-assign]


@pytest.mark.parametrize("everyone", [True, False])
def test_interrupted_in_a_collective(group: Group, dense: Path, text: Path, tmp_path: Path, everyone: bool) -> None:
    started = group.start(2, slow_main, *command(dense, tmp_path / "result", text, 4, quiet=True))
    until = time.monotonic() + PATIENCE
    while not (tmp_path / "out-0").exists() or "busy" not in (tmp_path / "out-0").read_text():
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.2)  # the other one is in the collective by now
    for process in started if everyone else started[:1]:
        os.kill(process.pid, signal.SIGINT)
    main, other = group.wait(started, 20)
    assert main.code == 130, main
    assert main.err.startswith(f"llm_snp: interrupted; 1 of {BLOCKS} blocks are finished and kept in ")
    if everyone:
        assert other == Ended(130, "", "llm_snp (process 1): interrupted\n")
    else:
        assert other.code == 2
        assert other.err.startswith("llm_snp (process 1): another process of this run has ended")


def test_healing_in_two_processes_is_that_of_one(
    dense: Path, prune: Prune, text: Path, tmp_path: Path, group: Group
) -> None:
    """Each has half of the windows of a step, and of those that are held out."""
    prune(dense, tmp_path / "pruned", 0.5, target="none")
    flags = ["heal", tmp_path / "pruned", "--text", text, "--tokens", 4 * 4 * LENGTH, "--sequence-length", LENGTH]
    flags += ["--no-evaluate", "--device", "cpu", "--learning-rate", "1e-3"]
    patience = 3 * PATIENCE  # the Trainer is a large import
    one = group.start(1, nothing, *flags, "--batch", 2, "--accumulate", 2, "--output", "one")
    (alone,) = group.wait(one, patience)
    assert alone.code == 0, alone
    ended = group.wait(group.start(2, nothing, *flags, "--batch", 2, "--output", "two"), patience)
    assert [process.code for process in ended] == [0, 0], ended
    assert ended[1].out == ended[1].err == ""
    found, wanted = (report_of(tmp_path / name)["healing"][0] for name in ("two", "one"))
    assert [entry["step"] for entry in found["curve"]] == [entry["step"] for entry in wanted["curve"]]
    for entry, other in zip(found["curve"], wanted["curve"], strict=True):
        assert entry["kl"] == pytest.approx(other["kl"], rel=1e-3)
    assert found["device"]["processes"] == 2
    others = tensors(tmp_path / "one")
    for name, weight in tensors(tmp_path / "two").items():
        torch.testing.assert_close(weight, others[name], rtol=1e-3, atol=1e-4)
