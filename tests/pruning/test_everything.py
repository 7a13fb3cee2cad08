"""The loop of `--method everything`: what its candidates are, and which of them it takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load
from test_sensitivity import session_of
from tiny_models import save_tiny

from llm_snp.config import HELD_OUT
from llm_snp.core.similarity import linear_cka
from llm_snp.errors import NumericalError
from llm_snp.families import first_attentions
from llm_snp.pruning import everything as loop
from llm_snp.pruning.everything import everything, similarity
from llm_snp.pruning.left_out import losses_without
from llm_snp.pruning.plan import Plan
from llm_snp.pruning.session import Session
from llm_snp.pruning.steps import Candidate, Step

TOKENS = torch.randint(4, 2048, (17, 24), generator=torch.Generator().manual_seed(3))
CHEAP: dict[str, Any] = {
    "method": "everything",
    "attention": "heads",
    "sensitivity": "relative",
    "samples": len(TOKENS),
}


def session_for(name: str, tmp_path: Path, **options: Any) -> Session:
    return session_of(save_tiny(name, tmp_path / "dense"), TOKENS, tmp_path, **CHEAP, **options)


def cost(session: Session, index: int, name: str) -> int:
    site = next(site for site in session.sites(index) if site.name == name)
    return session.family.site_cost(session.skeleton.blocks[index], site)


@pytest.mark.parametrize("name", ["opt", "llama", "gemma3"])
def test_similarity_is_that_of_what_the_head_reads(name: str, tmp_path: Path) -> None:
    """Here of a model and of the same without its middle block."""
    session = session_for(name, tmp_path)
    streams = [session.stream(5), session.stream(5)]
    for index, state in session.skeleton.block_states(range(len(session.skeleton))):
        block = session.skeleton.load_block(index, state)
        for stream in streams if index != 1 else streams[:1]:
            stream.advance(index, block)
    model, features = load(tmp_path / "dense"), []
    for left_out in (False, True):
        if left_out:
            model.get_submodule(f"{session.family.blocks}.1").register_forward_hook(
                lambda module, args, output: args[0]
            )
        with torch.no_grad():
            features.append(model.base_model(input_ids=TOKENS[:5]).last_hidden_state.flatten(0, 1))
    expected = linear_cka(torch.cov(torch.cat(features, 1).double().T))
    assert similarity(*streams) == pytest.approx(expected, rel=1e-4)
    for rows, hidden in streams[1].parts():
        streams[1].put(rows, hidden * torch.inf)
    with pytest.raises(NumericalError, match="hidden states behind the final norm overflow"):
        similarity(*streams)
    assert expected < 0.99


@pytest.mark.parametrize(("name", "sparsity"), [("opt", 0.35), ("gemma3", 0.45), ("llama", 0.3)])
def test_every_step(name: str, sparsity: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates are of one size, of each parent the next; the more similar one is taken; the budget is met."""
    session = session_for(name, tmp_path, sparsity=sparsity)
    plans: list[Plan] = []
    prune_blocks = loop.prune_blocks

    def noted(session: Session, plan: Plan, *arguments: Any, **options: Any) -> None:
        assert session.tokens.shape[0] == len(TOKENS) - max(1, len(TOKENS) // HELD_OUT)
        plans.append(plan)
        prune_blocks(session, plan, *arguments, **options)

    monkeypatch.setattr(loop, "prune_blocks", noted)
    plan = everything(session)
    unit = max(curve.cost for curve in plans[0].curves)
    assert plan.removed == pytest.approx(plan.asked, abs=unit)
    assert all(plan.kept[index]["heads"] for index in first_attentions(session.config))
    made, parent = iter(plans[1:]), plans[0]
    assert parent.removed == 0
    for step in plan.steps:
        found: dict[str, Plan] = {}
        for which, candidate in (("layer", step.layer), ("units", step.units)):
            if candidate is None:
                continue
            found[which] = next(made)
            assert candidate.parameters == found[which].removed - parent.removed > 0
            assert 0 < candidate.to_parent <= 1
            pairs = [(kept[u], was[u]) for kept, was in zip(found[which].kept, parent.kept, strict=True) for u in was]
            assert all(kept <= was for kept, was in pairs)
            if which == "layer":
                assert [kept for kept, was in pairs if kept != was] == [0]
        if len(found) == 2:
            assert step.layer is not None
            assert step.units is not None
            assert step.units.parameters == pytest.approx(step.layer.parameters, abs=unit)
            assert (step.taken == "layer") is (step.layer.to_parent >= step.units.to_parent)
        parent = found[step.taken]
    assert next(made, None) is None
    assert parent.kept == plan.kept
    assert plan.steps[0].choice.to_parent == plan.steps[0].choice.to_dense
    assert plan.why.startswith(f"in {len(plan.steps)} steps, ")
    first, held_out = plan.steps[0].layer, replace(session, tokens=TOKENS[-session.options.held_out :])
    losses = losses_without(held_out)
    least = min(losses, key=lambda key: losses[key] / cost(session, *key))
    assert first is not None
    assert (first.block, first.site) == least
    assert first.loss == pytest.approx(losses[least])


def test_what_was_decided_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_for("opt", tmp_path, sparsity=0.25)
    plan = everything(session)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "prune_blocks", None)  # nothing is made again
        again = everything(session)
    assert (again.kept, again.steps) == (plan.kept, plan.steps)
    last = f"step-{len(plan.steps) - 1:05d}"
    record = session.journal.read(last)
    assert record is not None
    session.journal.write(last, record | {"before": [{}] * len(plan.kept), "kept": [{}] * len(plan.kept)})
    again = everything(session)
    assert (again.kept, again.steps) == (plan.kept, plan.steps)
    assert session.journal.rescued == [f"{last} of the interrupted run began at another plan: made again"]


def test_the_more_similar_one_is_taken() -> None:
    layer, units = Candidate(10, 0.9, 0.8, 1, "mlp", 0.1), Candidate(10, 0.91, 0.7)
    assert Step.of(layer, units).choice is units
    assert Step.of(replace(layer, to_parent=0.92), units).taken == "layer"
    assert Step.of(replace(layer, to_parent=0.91), units).taken == "layer"  # which is faster
    assert Step.of(None, units).taken == "units"
    assert Step.of(layer, None).taken == "layer"
