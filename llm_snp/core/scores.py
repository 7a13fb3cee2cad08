"""What can go between query and key: directions of their common space, or rotary pairs.

Without rotary positions any basis folds into q_proj and k_proj (METHOD, section 7). With them query and key are turned
by position in pairs of dimensions, so whole pairs go, those of each key/value head its own.
Letters: h query heads, k key/value heads, w head_dim, p rotary pairs left, r directions left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .heads import damp_heads
from .linalg import decomposed, symmetric_powers
from .stopwatch import timed


@dataclass(frozen=True)
class FreeScores:
    """Directions between query and key, transforms (h, w, w) whose first rows are the best for every rank.

    power (w,): what each direction adds to the mean square of the scores of all heads, falling.
    """

    query: Tensor
    key: Tensor
    power: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor, damping: float) -> FreeScores:
        """query (h, w, w): E q qᵀ; key (h, w, w): covariance of k, see `score_basis`."""
        query, key, power = score_basis(query, key, damping)
        return cls(query, key, power.sum(0))

    def left(self, rank: int) -> tuple[Tensor, Tensor]:
        """Transforms of query and key (h, rank, w) to what is left of them."""
        return self.query[:, :rank], self.key[:, :rank]

    def masked(self, rank: int) -> tuple[Tensor, Tensor]:
        """Transforms (h, w, w) that give the same scores at full width."""
        query, key = self.query.clone(), self.key.clone()
        query[:, rank:] = key[:, rank:] = 0.0
        return query, key

    def table(self, rank: int) -> None:
        """Nothing has to be known of the directions that are left."""
        return None


@dataclass(frozen=True)
class RotaryPairs:
    """Rotary pairs of the key/value heads: dimensions i and i + w/2 of the query heads that read them, and of the key.

    pairs (k, w/2) long: those of each head, the strongest first; queries: query heads for each key/value head;
    power (w/2,): what the pairs of each rank add to the mean square of the scores of all heads, falling.
    """

    pairs: Tensor
    queries: int
    power: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor) -> RotaryPairs:
        """query (h, w, w): E q qᵀ; key (k, w, w): covariance of k; both as they are after the rotation.

        A pair adds q_pᵀ k_p to a score. Its key's mean is a constant per query, which the softmax does not see; the
        rest has the mean square tr(E q_p q_pᵀ · cov k_p), for queries and keys of independent positions.
        """
        k = key.shape[0]
        of_query = _pair_blocks(query)
        of_query = of_query.view(k, -1, *of_query.shape[1:]).sum(1)
        power, pairs = (of_query * _pair_blocks(key)).sum((1, 2)).sort(1, descending=True)
        return cls(pairs, query.shape[0] // k, power.sum(0))

    def table(self, rank: int) -> Tensor:
        """(k, rank) long: the pairs that are left of each key/value head, ascending."""
        return self.pairs[:, :rank].sort(1).values

    def left(self, rank: int) -> tuple[Tensor, Tensor]:
        """Transforms of query (h, 2·rank, w) and key (k, 2·rank, w) to what is left of them."""
        half = self.pairs.shape[1]
        kept = self.table(rank)
        rows = torch.eye(2 * half, dtype=torch.float64, device=kept.device)[torch.cat([kept, kept + half], 1)]
        return rows.repeat_interleave(self.queries, 0), rows

    def masked(self, rank: int) -> tuple[Tensor, Tensor]:
        """Transforms (h, w, w) and (k, w, w) that give the same scores at full width."""
        return tuple(rows.mT @ rows for rows in self.left(rank))  # type: ignore[return-value]


def _pair_blocks(second: Tensor) -> Tensor:
    """(h, 2, 2, w/2): of moments (h, w, w) those within each pair of dimensions i and i + w/2."""
    h, w, _ = second.shape
    return second.view(h, 2, w // 2, 2, w // 2).diagonal(dim1=2, dim2=4)


@timed("subspace")
def score_basis(query: Tensor, key: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Transforms (h, w, w) of query and key whose first r rows give the best rank-r scores in mean square.

    query  (h, w, w), or (w, w) for one head: uncentred second moments E q qᵀ
    key    the same, centred: covariance of k; a constant per query leaves the softmax unchanged
    With Cq^½ Ck^½ = U S Vᵀ: q' = S^½ Uᵀ Cq^-½ q and k' = S^½ Vᵀ Ck^-½ k; with all w rows q'ᵀk' = qᵀk.
    Also returns s² (h, w), falling: rank r leaves Σ_{i>r} s_i² of the scores' mean square.
    """
    w = query.shape[-1]
    query, _ = damp_heads(query.reshape(-1, w, w), damping)
    key, _ = damp_heads(key.reshape(-1, w, w), damping)
    (query_root, query_inverse), (key_root, key_inverse) = (symmetric_powers(m, 0.5, -0.5) for m in (query, key))
    u, s, vh = decomposed(torch.linalg.svd, query_root @ key_root)
    scale = s.clamp_min(torch.finfo(s.dtype).tiny).sqrt().unsqueeze(-1)
    return scale * (u.mT @ query_inverse), scale * (vh @ key_inverse), s.square()
