"""Directions and rotary pairs between query and key (METHOD, section 7): what is left is the best there is."""

from __future__ import annotations

import pytest
import torch
from test_heads import N, W, centred, normal, tokens
from torch import Tensor

from llm_snp.core.moments import Moments
from llm_snp.core.scores import FreeScores, RotaryPairs, score_basis


def second(x: Tensor) -> Tensor:
    """(H, W, W) second moments about zero."""
    return torch.einsum("nhv,nhw->hvw", x, x) / x.shape[0]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("nhw,mhw->hnm", q, k)


def test_score_basis_at_full_rank_gives_the_scores() -> None:
    q, k = tokens(20), tokens(30)
    query, key, _ = score_basis(second(q), centred(k), 0.0)
    q_new, k_new = (torch.einsum("hrw,nhw->nhr", t, x) for t, x in ((query, q), (key, k)))
    torch.testing.assert_close(scores(q_new, k_new), scores(q, k))


def test_score_basis_of_a_model_with_one_head() -> None:
    """Moments of one group come without the head axis."""
    q, k = tokens(20)[:, :1], tokens(30)[:, :1]
    queries, keys = (Moments.like(x.flatten(1), groups=1) for x in (q, k))
    queries.add(q.flatten(1))
    keys.add(k.flatten(1))
    query, key, power = score_basis(queries.uncentred, keys.covariance, 0.0)
    assert query.shape == key.shape == (1, W, W)
    assert power.shape == (1, W)
    q_new, k_new = (torch.einsum("hrw,nhw->nhr", t, x) for t, x in ((query, q), (key, k)))
    torch.testing.assert_close(scores(q_new, k_new), scores(q, k))


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_score_error_is_the_tail_and_the_least(rank: int) -> None:
    """Over all pairs of tokens, with keys about their mean: a constant per query leaves the softmax as it is."""
    q, k = tokens(20), tokens(30)
    query, key, power = score_basis(second(q), centred(k), 0.0)
    assert (power.diff(dim=1) <= 0).all()
    about = k - k.mean(0)
    truncated = scores(
        torch.einsum("hrw,nhw->nhr", query[:, :rank], q), torch.einsum("hrw,nhw->nhr", key[:, :rank], about)
    )
    error = (scores(q, about) - truncated).square().mean((1, 2))
    torch.testing.assert_close(error, power[:, rank:].sum(1), rtol=1e-9, atol=1e-9 * power.max().item())
    # Eckart-Young on the matrix of all scores: no other pair of rank-r transforms does better.
    singular = torch.linalg.svdvals(scores(q, about)) / N
    torch.testing.assert_close(error, singular[:, rank:].square().sum(1), rtol=1e-7, atol=1e-9 * power.max().item())


def test_key_mean_does_not_reach_the_softmax() -> None:
    q, k = tokens(20), tokens(30)
    query, key, _ = score_basis(second(q), centred(k), 0.0)
    for rank in (2, W):
        q_new = torch.einsum("hrw,nhw->nhr", query[:, :rank], q)
        with_mean = scores(q_new, torch.einsum("hrw,nhw->nhr", key[:, :rank], k))
        without = scores(q_new, torch.einsum("hrw,nhw->nhr", key[:, :rank], k - k.mean(0)))
        assert not torch.allclose(with_mean, without, atol=0.1)
        torch.testing.assert_close(with_mean.softmax(-1), without.softmax(-1))
    torch.testing.assert_close(with_mean.softmax(-1), scores(q, k).softmax(-1))


def test_a_dead_head_gets_finite_transforms_and_nothing_is_modified() -> None:
    covariance = centred(tokens(0))
    covariance[2] = 0.0
    before = covariance.clone()
    for damping in (0.0, 1e-3):
        assert all(torch.isfinite(t).all() for t in score_basis(covariance, covariance, damping))
    assert torch.equal(covariance, before)


def test_directions_that_are_left_and_masked_give_the_same_scores() -> None:
    q, k = tokens(20), tokens(30)
    free = FreeScores.of(second(q), centred(k), 0.0)
    torch.testing.assert_close(free.power, score_basis(second(q), centred(k), 0.0)[2].sum(0))
    for rank in range(1, W + 1):
        found = [
            scores(*(torch.einsum("hrw,nhw->nhr", t, x) for t, x in zip(transforms, (q, k), strict=True)))
            for transforms in (free.left(rank), free.masked(rank))
        ]
        torch.testing.assert_close(found[0], found[1])
        assert free.table(rank) is None


K, Q = 2, 3  # key/value heads, and query heads of each


def rotary_tokens(seed: int, heads: int) -> Tensor:
    """(N, heads, W): pairs of unequal strength, another one the strongest in each head, far from zero."""
    strength = torch.stack([torch.tensor([3.0, 0.3]).roll(head // (heads // K)) for head in range(heads)])
    x = normal(seed, N, heads, W) @ normal(seed + 1, W, W) * strength.repeat(1, 2)
    return x + 2 * normal(seed + 2, heads, W)


def rotary() -> tuple[Tensor, Tensor, RotaryPairs]:
    q, k = rotary_tokens(80, K * Q), rotary_tokens(90, K)
    return q, k, RotaryPairs.of(second(q), centred(k))


def test_power_of_pairs_is_what_they_add_to_the_scores() -> None:
    """Over all pairs of tokens, with keys about their mean; the strongest pair of each head first."""
    q, k, found = rotary()
    about = k - k.mean(0)
    added = torch.zeros(K, W // 2, dtype=torch.float64)
    for head in range(K * Q):
        for pair in range(W // 2):
            dims = [pair, pair + W // 2]
            scores = q[:, head, dims] @ about[:, head // Q, dims].mT
            added[head // Q, pair] += scores.square().mean()
    assert found.pairs.tolist() == added.argsort(1, descending=True).tolist() == [[0, 1], [1, 0]]
    torch.testing.assert_close(found.power, added.sort(1, descending=True).values.sum(0))


def test_pairs_that_are_left_are_whole_and_ascending() -> None:
    q, k, found = rotary()
    assert found.table(1).tolist() == [[0], [1]]
    assert found.table(2).tolist() == [[0, 1], [0, 1]]
    query, key = found.left(1)
    torch.testing.assert_close(torch.einsum("hrw,nhw->nhr", key, k)[:, 1], k[:, 1, [1, 3]])
    torch.testing.assert_close(torch.einsum("hrw,nhw->nhr", query, q)[:, Q - 1], q[:, Q - 1, [0, 2]])
    for rank in (1, 2):
        found_scores = []
        for of_query, of_key in (found.left(rank), found.masked(rank)):
            q_new, k_new = torch.einsum("hrw,nhw->nhr", of_query, q), torch.einsum("hrw,nhw->nhr", of_key, k)
            found_scores.append(scores(q_new, k_new.repeat_interleave(Q, 1)))
        torch.testing.assert_close(found_scores[0], found_scores[1])
    torch.testing.assert_close(found_scores[0], scores(q, k.repeat_interleave(Q, 1)))
