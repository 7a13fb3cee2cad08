"""What a report says of healing, in the words and numbers that summary, card and page share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def healing_line(step: Mapping[str, Any]) -> str:
    """`1,000,448 tokens in 244 steps, 123.4 s: perplexity 41.20 -> 33.10 on held-out windows (teacher 30.1), KL ...`"""
    held_out = step["held_out"]
    before, after = held_out["before"], held_out["after"]
    return (
        f"{step['tokens']:,} tokens in {step['steps']:,} steps, {step['seconds']:,.1f} s: perplexity "
        f"{before['perplexity']:,.2f} -> {after['perplexity']:,.2f} on held-out windows (teacher "
        f"{held_out['teacher_perplexity']:,.2f}), KL {before['kl']:.4f} -> {after['kl']:.4f} nats"
    )


def healing_rows(step: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Lines of a table: text, then the perplexity of the teacher, before and after."""
    held_out = step["held_out"]
    own = {when: held_out[when]["perplexity"] for when in ("before", "after")}
    own["teacher"] = held_out["teacher_perplexity"]
    known = {f"held-out windows of {step['text']['source']}": own} | step["evaluation"]
    return [(name, *(f"{found[w]:,.2f}" for w in ("teacher", "before", "after"))) for name, found in known.items()]


def healing_sentences(step: Mapping[str, Any]) -> str:
    """What was trained, for how long, and what came of it."""
    before, after, text = step["held_out"]["before"], step["held_out"]["after"], step["text"]
    what = "all weights" if step["lora"] is None else f"LoRA matrices of rank {step['lora']}, merged at the end"
    return (
        f"Trained: {what} ({step['trained']:,} parameters), to predict what {step['teacher']['name']} predicts, on "
        f"{step['tokens']:,} tokens of {text['source']}, in {step['seconds']:,.1f} s on {step['device']['name']}. The "
        f"weights are those after step {after['step']:,} of {step['steps']:,}, the best on {text['held_out']} windows "
        f"that were not trained on: KL divergence from the teacher {before['kl']:.4f} nats per token before, "
        f"{after['kl']:.4f} after."
    )


def healed_tokens(report: Mapping[str, Any]) -> int:
    """Tokens that were trained on since the pruning, in all healings."""
    return sum(step["tokens"] for step in report.get("healing", []))


def after_pruning(report: Mapping[str, Any]) -> str:
    """A sentence on what was trained since."""
    healing = report.get("healing", [])
    if not healing:
        return "No training followed."
    teachers = dict.fromkeys(step["teacher"]["name"] for step in healing)
    return (
        f"Then it was trained for {healed_tokens(report):,} tokens to predict what {' and '.join(teachers)} predicts."
    )
