"""Runs scripts, and looks at results, in processes in which llm_snp is not installed."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

# Where importing llm_snp fails. Forks a process for each line of its input, which runs a script as `python SCRIPT`
# would: to import torch and transformers takes longer than most scripts.
INTERPRETER = r"""
import json, os, pathlib, runpy, sys, traceback

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "llm_snp" or name.startswith("llm_snp."):
            raise ImportError("llm_snp is not here")

sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Trainer, dynamic_module_utils, pipeline

torch.set_num_threads(1)

def run(script, arguments, folder, environment):
    os.chdir(folder)
    os.environ.update(environment)
    dynamic_module_utils.HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"]
    sys.argv, sys.path[0] = [script, *arguments], str(pathlib.Path(script).parent)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "printed"), (2, "errors")):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if not child:
        status = 1
        try:
            status = run(**task)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _interpreter() -> subprocess.Popen[str]:
    """The interpreter that forks, until the tests end."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", INTERPRETER], env=environment, text=True, **pipes)
    atexit.register(process.kill)
    return process


def run(script: Path, *arguments: object, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script run in `folder`: its exit code, and what it printed (files `printed`, `errors` there)."""
    process = _interpreter()
    assert process.stdin is not None
    assert process.stdout is not None
    task = {
        "script": str(script),
        "arguments": [str(argument) for argument in arguments],
        "folder": str(folder),
        "environment": {"HF_MODULES_CACHE": str(folder / "modules"), **environment},
    }
    print(json.dumps(task), file=process.stdin, flush=True)
    code = int(process.stdout.readline())
    out, err = ((folder / name).read_text() if (folder / name).exists() else "" for name in ("printed", "errors"))
    return subprocess.CompletedProcess(task["arguments"], code, out, err)


def elsewhere(directory: Path, workplace: Path, ids: torch.Tensor) -> dict[str, Any]:
    """What `look.py` finds of a result."""
    torch.save(ids, workplace / "ids.pt")
    script = Path(__file__).with_name("look.py")
    done = run(script, directory, workplace / "again", workplace / "ids.pt", folder=workplace)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((workplace / "found.json").read_text())
    return found
