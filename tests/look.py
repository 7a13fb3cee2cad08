"""What `elsewhere.elsewhere` runs: looks at a result, and leaves what was found there as found.json.

python look.py RESULT COPY IDS     COPY: where to save it again; IDS: a file of token ids (sequences, tokens)
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

directory, again, data = sys.argv[1:]
found: dict[str, Any] = {}
try:
    import llm_snp  # noqa: F401
except ImportError:
    found["llm_snp"] = "absent"
else:
    found["llm_snp"] = "present"

ids = torch.load(data, weights_only=True)


def load(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).float().eval()


def logits(model: Any, ids: torch.Tensor = ids) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def generate(model: Any, **options: Any) -> torch.Tensor:
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


def train(model: Any) -> tuple[list[float], list[str], dict[str, torch.Tensor]]:
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

pathlib.Path("found.json").write_text(json.dumps(found))
