"""What a run says while it goes on: bars in a terminal, plain lines elsewhere, nothing if quiet or unheard."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from llm_snp.system import progress
from llm_snp.system.progress import LINES, Progress

LEFT = r"  \(\d+:\d\d:\d\d left\)"


def phases(told: Progress) -> None:
    with told.phase("load"):
        pass
    with told.phase("prune", 3) as step:
        for block in range(3):
            told.say(f"by the way {block}")
            if block != 1:
                told.finished(f"block {block + 1}/3  neurons 5/8")
            step()
    told.finished("afterwards")


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    told = Progress()
    phases(told)
    out, err = capsys.readouterr()
    assert out == ""
    expected = [
        r"load \.\.\.",
        r"prune \.\.\.",
        "by the way 0",
        f"block 1/3  neurons 5/8{LEFT}",
        "by the way 1",
        f"prune: block 2/3{LEFT}",
        "by the way 2",
        "block 3/3  neurons 5/8",
        "afterwards",
    ]
    for line, pattern in zip(err.splitlines(), expected, strict=True):
        assert re.fullmatch(pattern, line), line
    assert set(told.seconds) == {"load", "prune"}


def test_a_line_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """What a stranger has named must not look like words of ours."""
    Progress().say("note: a\nload it  evil\u2028b\x1b[2J")
    assert capsys.readouterr().err == "note: a load it  evil b\ufffd[2J\n"


def test_the_title_of_a_bar_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    titles = []
    monkeypatch.setattr(progress, "in_terminal", lambda _: True)
    monkeypatch.setattr("tqdm.tqdm", lambda desc, **_: titles.append(desc) or nullcontext(SimpleNamespace(update=None)))
    with Progress().phase("evaluate", 3, "perplexity of x\x1b]0;evil\x07\nload it"):
        pass
    assert titles == ["perplexity of x\ufffd]0;evil\ufffd load it"]


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    told = Progress(quiet=True)
    phases(told)
    assert capsys.readouterr() == ("", "")
    assert set(told.seconds) == {"load", "prune"}


def test_the_time_left_goes_by_the_last_blocks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    told = Progress()
    with told.phase("prune", 60) as step:
        for block in range(60):
            now += 100 if block >= 20 else 0  # the first ones an interrupted run had finished
            step()
    lines = capsys.readouterr().err.splitlines()
    assert lines[20] == "prune: block 20/60  (0:00:00 left)"
    assert lines[40] == "prune: block 40/60  (0:33:20 left)"
    assert lines[59] == "prune: block 59/60  (0:01:40 left)"
    assert lines[60] == "prune: block 60/60"
    assert told.seconds["prune"] == 4000


@pytest.mark.parametrize("count", [7, LINES, 925])
def test_a_log_does_not_overflow(capsys: pytest.CaptureFixture[str], count: int) -> None:
    with Progress().phase("perplexity", count, "wiki", unit="window") as step:
        for _ in range(count):
            step()
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "wiki ..."
    assert len(lines) == min(count, LINES)
    assert lines[-1] == f"wiki: window {count}/{count}"


def test_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with open(terminal, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        phases(Progress())
        read = b""
        while b"afterwards\r\n" not in read:
            read += os.read(main, 1000)
    os.close(main)
    seen = read.decode()
    assert "load ...\r\n" in seen
    assert "prune ..." not in seen
    assert re.search(r"\rprune: +0%\|", seen)
    assert "block 1/3  neurons 5/8\r\n" in seen
    assert seen.endswith("afterwards\r\n")


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [Progress(), Progress()]
    read, write = os.pipe()
    os.close(read)

    def listen() -> None:
        with open(write, "w", buffering=1) as stream:
            for nobody, each in zip((stream, None), told, strict=True):
                monkeypatch.setattr(sys, "stderr", nobody)
                phases(each)

    with pytest.raises(BrokenPipeError):  # what could not be written is still in the buffer when the stream is closed
        listen()
    assert all(set(each.seconds) == {"load", "prune"} for each in told)
