"""Looks at a result in a process in which llm_snp is not installed."""

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

# Runs where importing llm_snp fails. For each line of its input, the paths of a result, of a copy that it writes, of
# token ids and of a folder, it forks a process that looks at the result, and leaves what was found there as JSON. One
# interpreter for all: to import torch and transformers takes longer than to look.
ELSEWHERE = r"""
import json, os, pathlib, sys, traceback

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "llm_snp" or name.startswith("llm_snp."):
            raise ImportError("llm_snp is not here")

sys.meta_path.insert(0, Blocker())
try:
    import llm_snp
except ImportError:
    found = {"llm_snp": "absent"}
else:
    found = {"llm_snp": "present"}

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils, pipeline

torch.set_num_threads(1)

def look(directory, again, data):
    ids = torch.load(data, weights_only=True)

    def load(path):
        return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).float().eval()

    def logits(model, ids=ids):
        with torch.no_grad():
            return model(input_ids=ids).logits

    def generate(model, **options):
        ones = torch.ones_like(ids)
        length = {"min_new_tokens": 12, "max_new_tokens": 12}
        return model.generate(ids, attention_mask=ones, do_sample=False, **length, **options)

    model = load(directory)
    found["class"] = type(model).__name__
    found["module"] = type(model).__module__
    found["logits"] = logits(model).tolist()
    found["cached"] = generate(model, use_cache=True).tolist()
    found["uncached"] = generate(model, use_cache=False).tolist()
    stepwise = ids
    for _ in range(12):
        scores = logits(model, stepwise)[:, -1]
        scores[:, model.generation_config.eos_token_id] = -torch.inf  # not before so many tokens
        stepwise = torch.cat([stepwise, scores.argmax(-1, keepdim=True)], 1)
    found["stepwise"] = stepwise.tolist()
    padded = torch.cat([torch.ones_like(ids[:, :5]), ids], 1)
    mask = torch.cat([torch.zeros_like(ids[:, :5]), torch.ones_like(ids)], 1)
    with torch.no_grad():
        behind = model(input_ids=padded, attention_mask=mask).logits[:, 5:]
    found["padded"] = (behind - logits(model)).abs().max().item()

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    found["tokens"] = tokenizer("Ba den ki lo, per saver!\n\n Nu")["input_ids"]
    writer = pipeline("text-generation", model=directory, tokenizer=tokenizer, trust_remote_code=True)
    found["pipeline"] = writer("Ba den ki", do_sample=False, max_new_tokens=5)[0]["generated_text"]

    model.save_pretrained(again)
    found["again"] = torch.equal(logits(load(again)), logits(model))
    found["files again"] = sorted(p.name for p in pathlib.Path(again).iterdir())

    half = load(directory).half()
    found["half"] = [str(logits(half).dtype), (logits(half).float() - logits(model)).abs().max().item()]

    def train(model):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for _ in range(2):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
        still = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
        # A key's bias adds the same to all scores of a query: its gradient is zero, up to rounding.
        idle = [n for n, p in model.named_parameters() if not p.grad.abs().sum() > 0 and "k_proj.bias" not in n]
        return losses, still + idle, {n: p.grad.clone() for n, p in model.named_parameters()}

    losses, idle, plain = train(load(directory))
    found["losses"], found["idle"] = losses, idle
    checkpointed = load(directory)
    checkpointed.gradient_checkpointing_enable()
    losses, _, gradients = train(checkpointed)
    found["checkpointed losses"] = losses
    found["checkpointed"] = max((gradients[n] - plain[n]).abs().max().item() for n in plain)

for line in sys.stdin:
    directory, again, data, place = json.loads(line)
    place = pathlib.Path(place)
    child = os.fork()
    if not child:
        status = 1
        try:
            os.chdir(place)
            dynamic_module_utils.HF_MODULES_CACHE = str(place / "modules")
            look(directory, again, data)
            (place / "found.json").write_text(json.dumps(found))
            status = 0
        except BaseException:
            (place / "failed.txt").write_text(traceback.format_exc())
        finally:
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _interpreter() -> subprocess.Popen[str]:
    """The interpreter that looks, until the tests end."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", ELSEWHERE], env=environment, text=True, **pipes)
    atexit.register(process.kill)
    return process


def elsewhere(directory: Path, workplace: Path, ids: torch.Tensor) -> dict[str, Any]:
    """What `ELSEWHERE` finds of a result."""
    torch.save(ids, workplace / "ids.pt")
    process, again = _interpreter(), workplace / "again"
    assert process.stdin is not None
    assert process.stdout is not None
    print(
        json.dumps([str(p) for p in (directory, again, workplace / "ids.pt", workplace)]),
        file=process.stdin,
        flush=True,
    )
    status, failed = process.stdout.readline().strip(), workplace / "failed.txt"
    assert status == "0", failed.read_text() if failed.exists() else status
    found: dict[str, Any] = json.loads((workplace / "found.json").read_text())
    return found
