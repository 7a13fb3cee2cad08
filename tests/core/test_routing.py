"""What a block loses without some of its experts: by products of their outputs, against doing it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm_snp import config
from llm_snp.core.routing import EXPERT_ORDERS, Routing, remove, weights

TOKENS, EXPERTS, PICKED, WIDTH = 40, 6, 2, 5


def one_process(_: Tensor) -> None:
    """What sums over processes, where there is one."""


def drawn(divided: bool, sharp: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Routing]:
    """logits, outputs, G, and what is known of them."""
    generator = torch.Generator().manual_seed(0)
    logits = sharp * torch.randn(TOKENS, EXPERTS, generator=generator, dtype=torch.float64)
    outputs = torch.randn(EXPERTS, TOKENS, WIDTH, generator=generator)
    root = torch.randn(WIDTH, WIDTH, generator=generator)
    g = (root @ root.mT).double()
    return logits, outputs, g, Routing.of(logits, outputs, g, PICKED, divided)


def lost(logits: Tensor, outputs: Tensor, g: Tensor, left: list[int], divided: bool) -> Tensor:
    """Σ over tokens of (y_S - y)ᵀ G (y_S - y), by the outputs."""
    masked = torch.full_like(logits, -torch.inf)
    masked[:, left] = logits[:, left]
    change = weights(masked, PICKED, divided) - weights(logits, PICKED, divided)
    error = (change.mT.unsqueeze(2) * outputs.double()).sum(0)
    return ((error @ g) * error).sum()


@pytest.mark.parametrize("divided", [True, False])
@pytest.mark.parametrize("sharp", [1.0, 30.0])  # at 30 a router gives one expert all but nothing
def test_what_is_lost_without_one_more(divided: bool, sharp: float) -> None:
    logits, outputs, g, routing = drawn(divided, sharp)
    left = torch.tensor([True, True, False, True, True, True])
    found = routing.losses_without(left)
    assert found[2] == torch.inf
    for expert in (0, 1, 3, 4, 5):
        rest = [other for other in (0, 1, 3, 4, 5) if other != expert]
        torch.testing.assert_close(found[expert], lost(logits, outputs, g, rest, divided), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("divided", [True, False])
def test_what_is_lost_at_every_count(divided: bool) -> None:
    """Down to as many as work on a token; of none all of the output is lost."""
    logits, outputs, g, routing = drawn(divided)
    whole = lost(logits, outputs, g, list(range(EXPERTS)), divided)
    assert whole == 0
    for order in EXPERT_ORDERS:
        found = remove(routing, one_process, order, torch.Generator().manual_seed(1))
        assert sorted(found.order) == list(range(EXPERTS))
        assert found.loss[EXPERTS] == found.variance[EXPERTS] == 0
        assert found.variance[0] == 1
        for kept in range(PICKED, EXPERTS):
            expected = lost(logits, outputs, g, found.order[:kept], divided) / TOKENS
            torch.testing.assert_close(found.loss[kept], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.loss[0], routing.energy.mean())


def test_greedy_takes_each_time_the_least() -> None:
    logits, outputs, g, routing = drawn(divided=True)
    found = remove(routing, one_process, "greedy", torch.Generator()).order
    left = list(range(EXPERTS))
    while len(left) > PICKED:
        each = {e: lost(logits, outputs, g, [other for other in left if other != e], True) for e in left}
        left.remove(min(each, key=lambda expert: each[expert].item()))
        assert sorted(found[: len(left)]) == left


def test_reap_is_the_mean_over_an_experts_own_tokens() -> None:
    logits, outputs, _, routing = drawn(divided=True)
    p = weights(logits, PICKED, True)
    norms = outputs.double().norm(dim=2)
    scores = [(p[p[:, e] > 0, e] * norms[e, p[:, e] > 0]).mean().item() for e in range(EXPERTS)]
    expected = sorted(range(EXPERTS), key=lambda expert: -scores[expert])
    found = remove(routing, one_process, "reap", torch.Generator()).order
    assert found[PICKED:] == expected[PICKED:]
    assert sorted(found[:PICKED]) == sorted(expected[:PICKED])


def test_an_expert_that_no_token_needs_goes_first_and_without_loss() -> None:
    """Where weights are divided by their sum; elsewhere the others take its share of the softmax."""
    logits, outputs, g, _ = drawn(divided=True)
    logits[:, 3] = -5.0 + logits.min()
    found = remove(Routing.of(logits, outputs, g, PICKED, True), one_process, "greedy", torch.Generator())
    assert found.order[-1] == 3
    assert found.loss[EXPERTS - 1] < 1e-9
    undivided = remove(Routing.of(logits, outputs, g, PICKED, False), one_process, "greedy", torch.Generator())
    assert undivided.order[-1] == 3
    assert 0 < undivided.loss[EXPERTS - 1] < 1e-4 * undivided.loss[0]


def test_several_processes_sum_up() -> None:
    """Each has tokens of its own, and the sums of all."""
    logits, outputs, g, routing = drawn(divided=True)
    parts = [Routing.of(logits[rows], outputs[:, rows], g, PICKED, True) for rows in (slice(0, 15), slice(15, TOKENS))]
    joined = Routing.cat(parts)
    torch.testing.assert_close(joined.gram, routing.gram)
    expected = remove(routing, one_process, "greedy", torch.Generator())
    found = remove(joined, one_process, "greedy", torch.Generator())
    assert found.order == expected.order
    torch.testing.assert_close(found.loss, expected.loss)


def test_what_overflows_is_told() -> None:
    _, outputs, g, _ = drawn(divided=True)
    outputs[1, 2] = torch.inf
    routing = Routing.of(torch.randn(TOKENS, EXPERTS, dtype=torch.float64), outputs, g, PICKED, True)
    assert not routing.finite
    assert not torch.isfinite(remove(routing, one_process, "greedy", torch.Generator()).loss).all()


def test_names_are_those_of_the_options() -> None:
    assert tuple(EXPERT_ORDERS) == config.EXPERT_ORDERS
