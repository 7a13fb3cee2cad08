"""benchmarks/gpu.py: steps end in time, what fails is told, and devices are held against the CPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gpu
import pytest


def python(name: str, code: str, limit: int = 60, output: Path | None = None) -> gpu.Step:
    return gpu.Step(name, limit, [*gpu.PYTHON, "-c", code], output)


def report(output: Path, perplexity: float) -> str:
    text = json.dumps({"evaluation": {"a": {"pruned": {"perplexity": perplexity}}}, "plan": {"kept": [1, 2]}})
    return f"import pathlib; p = pathlib.Path({str(output)!r}); p.mkdir(); (p / 'report.json').write_text({text!r})"


def test_every_step_ends_and_the_table_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = {kind: tmp_path / kind for kind in ("cpu", "float32", "float16")}
    made = [
        python("good", "print('as it comes')"),
        python("bad", "raise SystemExit(3)"),
        python("slow", "import time; time.sleep(60)", limit=1),
        python("m cpu", report(out["cpu"], 100.0), output=out["cpu"]),
        python("m float32", report(out["float32"], 100.05), output=out["float32"]),
        python("m float16", report(out["float16"], 100.2), output=out["float16"]),
    ]
    monkeypatch.setattr(gpu, "steps", lambda args, folder: made)
    text = tmp_path / "text"
    text.write_text("text")
    arguments = ["--text", str(text), "--evaluate", str(text), "--device", "cpu", "--json", str(tmp_path / "gpu.json")]
    assert gpu.main(arguments) == 1
    printed = capfd.readouterr().out
    assert "as it comes" in printed
    ended = {row["step"]: row["ended"] for row in json.loads((tmp_path / "gpu.json").read_text())["results"]}
    assert ended == {
        "good": "ok",
        "bad": "failed (3)",
        "slow": "out of time",
        "m cpu": "ok",
        "m float32": "ok",
        "m float16": "off by more than 0.1%",
    }
    assert "+0.050%" in printed
    made[1:] = []
    assert gpu.main(arguments) == 0
    assert gpu.main([*arguments[:3], str(tmp_path / "none")]) == 2
    assert "none is no file" in capfd.readouterr().err


def test_commands_that_can_be_parsed(tmp_path: Path) -> None:
    """The options of every step are those of the scripts and the command line, whether quick or not."""
    import speed

    from llm_snp.cli import parse

    for device, quick in (("cpu", True), ("cuda", False)):
        given: Any = argparse.Namespace(device=device, quick=quick, text="t", evaluate="e", model="m")
        found = gpu.steps(given, tmp_path)
        assert len({step.name for step in found}) == len(found)
        assert sum(max(step.limit for step in stage) for stage in gpu.stages(found)) < 15 * 60
        for step in found:
            script, *arguments = step.command[2:]
            if script.endswith("speed.py"):
                assert speed.parser().parse_args(arguments).device == device
            elif arguments[0] == "llm_snp":
                assert parse(arguments[1:])[1].device in ("cpu", device)
