"""Whole experts of a mixture: what the output of a block loses when some go and the router chooses among the others.

Of x the router gives logits, an expert o_e(x); a set S of experts gives y_S = Σ p_e o_e over the k of S with the
largest logits, with p the softmax over S, divided by its sum over the k where the family does that. So
(y_S - y)ᵀ G (y_S - y) = (p_S - p)ᵀ A (p_S - p) with A_ef = o_eᵀ G o_f: of a token its logits and E² products are all
that has to be known, and no width of the model is in what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .linalg import all_finite, strips, tail_sums

# Products of so many bytes are made of outputs at once.
PART_BYTES = 1 << 26


@dataclass(frozen=True)
class Routing:
    """What is known of n tokens and E experts.

    logits   (n, E) float64, of the router
    gram     (n, E, E) float32, A of each token
    norms    (n, E) float32: ‖o_e‖
    whole    (n, E) float64: A p, with p the weights when all experts are there
    energy   (n,) float64: pᵀ A p = yᵀ G y
    picked   k, experts that work on a token
    divided  whether the weights of those that are picked are divided by their sum
    """

    logits: Tensor
    gram: Tensor
    norms: Tensor
    whole: Tensor
    energy: Tensor
    picked: int
    divided: bool

    @classmethod
    def of(cls, logits: Tensor, outputs: Tensor, sensitivity: Tensor | None, picked: int, divided: bool) -> Routing:
        """logits (n, E), outputs (E, n, d) of all experts, unweighted; sensitivity G (d, d), None for the identity."""
        by_token, p = outputs.transpose(0, 1), weights(logits.double(), picked, divided)  # (n, E, d), (n, E)
        gram = torch.empty(*logits.shape, logits.shape[1], dtype=torch.float32, device=logits.device)
        whole, norms = torch.empty_like(p), torch.empty_like(p, dtype=torch.float32)
        weighs = None if sensitivity is None else sensitivity.float()
        for rows in strips(len(logits), max(1, PART_BYTES // (4 * outputs.shape[0] * outputs.shape[2]))):
            part = by_token[rows].float()
            torch.bmm(part if weighs is None else part @ weighs, part.mT, out=gram[rows])
            whole[rows] = torch.bmm(gram[rows].double(), p[rows].unsqueeze(2)).squeeze(2)
            norms[rows] = part.norm(dim=2)
        return cls(logits.double(), gram, norms, whole, (whole * p).sum(1), picked, divided)

    @classmethod
    def cat(cls, parts: Sequence[Routing]) -> Routing:
        """Of the tokens of all parts."""
        names = ("logits", "gram", "norms", "whole", "energy")
        tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return cls(**tensors, picked=parts[0].picked, divided=parts[0].divided)

    @property
    def experts(self) -> int:
        return self.logits.shape[1]

    @property
    def finite(self) -> bool:
        """False as soon as one number was infinite or NaN."""
        return bool(torch.stack([all_finite(t) for t in (self.logits, self.gram, self.norms)]).all())

    def losses_without(self, left: Tensor) -> Tensor:
        """(E,) float64: Σ over tokens of what is lost when of the experts `left` (E,) bool one more goes; infinite for
        those that are gone.

        More than k have to be left. The next one takes the place of an expert, whichever of those picked that is.
        """
        k = self.picked
        logits = self.logits.masked_fill(~left, -torch.inf)
        places, shares = logits.topk(k + 1, dim=1).indices, logits.softmax(1)
        ranked = shares.gather(1, places)
        gram = self.gram.gather(1, places.unsqueeze(2).expand(-1, -1, self.experts))
        gram = gram.gather(2, places.unsqueeze(1).expand(-1, k + 1, -1)).double()  # (n, k+1, k+1)
        whole = self.whole.gather(1, places)

        def lost(raw: Tensor, rest: Tensor) -> Tensor:
            """raw (n, s, k+1): softmax of those that work, s times; rest (n, s) divides it. Gives (n, s)."""
            p = raw / rest.clamp_min(torch.finfo(raw.dtype).tiny).unsqueeze(2)
            return ((p @ gram) * p).sum(2) - 2 * (p @ whole.unsqueeze(2)).squeeze(2) + self.energy.unsqueeze(1)

        one_less = ranked.unsqueeze(1) * (1 - torch.eye(k + 1, dtype=ranked.dtype, device=ranked.device)[:k])
        now = ranked.clone()
        now[:, k] = 0
        if self.divided:
            found = lost(now.unsqueeze(1), now.sum(1, keepdim=True)).expand_as(shares).clone()
            without = lost(one_less, one_less.sum(2))
        else:
            # Of another that goes the others take the share; (n, E) of the same weights, scaled.
            square, product = lost(now.unsqueeze(1), torch.ones_like(now[:, :1])), (now * whole).sum(1, keepdim=True)
            square = square + 2 * product - self.energy.unsqueeze(1)
            scale = 1 / (1 - shares).clamp_min(torch.finfo(shares.dtype).tiny)
            found = scale.square() * square - 2 * scale * product + self.energy.unsqueeze(1)
            rest = 1 - ranked[:, :k]
            rest[:, 0] = shares.scatter(1, places[:, :1], 0.0).sum(1)  # exact also where the first has all but nothing
            without = lost(one_less, rest)
        found = found.scatter(1, places[:, :k], without)
        return found.sum(0).masked_fill(~left, torch.inf)

    def sums(self) -> Tensor:
        """(3, E) float64: of each expert the sums over its tokens of p_e ‖o_e‖ and of its square, and their number."""
        p = weights(self.logits, self.picked, self.divided)
        norms = p * self.norms
        return torch.stack([norms.sum(0), norms.square().sum(0), (p > 0).sum(0, dtype=torch.float64)])


def weights(logits: Tensor, picked: int, divided: bool) -> Tensor:
    """(n, E): p of each token, zero for the experts that do not work on it."""
    found, places = logits.softmax(1).topk(picked, dim=1)
    found = found / found.sum(1, keepdim=True) if divided else found
    return torch.zeros_like(logits).scatter_(1, places, found)


@dataclass(frozen=True)
class Removal:
    """What is left of E experts, and what is lost then.

    order     all of them, those that stay longest first, as far as some may go
    loss      (E+1,) float64: mean over tokens of what is lost when the first so many are left; below the least that
              have to be left a line to the loss of all
    variance  (E+1,) float64: share of E p_e² ‖o_e‖² that those have that are gone then
    """

    order: list[int]
    loss: Tensor
    variance: Tensor


def remove(routing: Routing, total: Callable[[Tensor], None], order: str, generator: torch.Generator) -> Removal:
    """Experts go one after the other, by a criterion of `EXPERT_ORDERS`.

    total: sums a tensor in place over processes, each of which has tokens of its own.
    """
    device, experts, least = routing.logits.device, routing.experts, routing.picked
    left = torch.ones(experts, dtype=torch.bool, device=device)
    energy = routing.energy.sum() if routing.finite else torch.full((), torch.nan, dtype=torch.float64, device=device)
    whole, sums = torch.stack([energy, torch.full_like(energy, len(routing.logits))]), routing.sums()
    for each in (whole, sums):
        total(each)
    all_lost, tokens = whole.cpu().tolist()
    first = EXPERT_ORDERS[order](sums, generator)
    loss, gone = torch.zeros(experts + 1, dtype=torch.float64), list[int]()
    while experts - len(gone) > least:
        found = routing.losses_without(left)
        total(found)
        expert = int(found.argmin()) if first is None else first[len(gone)]
        gone.append(expert)
        left[expert] = False
        loss[experts - len(gone)] = max(0.0, found[expert].item() / tokens)
    loss[: least + 1] = torch.linspace(all_lost / tokens, loss[least].item(), least + 1, dtype=torch.float64)
    stay = [*left.nonzero().flatten().cpu().tolist(), *reversed(gone)]
    variance = tail_sums(sums[1].cpu()[stay])
    return Removal(stay, loss, variance / variance[0].clamp_min(torch.finfo(variance.dtype).tiny))


def order_greedy(sums: Tensor, generator: torch.Generator) -> None:
    """Whatever loses least next to what is gone already."""


def order_reap(sums: Tensor, generator: torch.Generator) -> list[int]:
    """The least mean over an expert's tokens of routing weight times norm of the output first (REAP, Lasby et al.,
    arXiv 2510.13999). sums: see `Routing.sums`.
    """
    return torch.argsort(sums[0] / sums[2].clamp_min(1.0), stable=True).cpu().tolist()


def order_random(sums: Tensor, generator: torch.Generator) -> list[int]:
    """A seeded random order: the floor of every comparison."""
    return torch.randperm(sums.shape[1], generator=generator).tolist()


# Which expert goes first; None where that is decided one after the other.
EXPERT_ORDERS: dict[str, Callable[[Tensor, torch.Generator], list[int] | None]] = {
    "greedy": order_greedy,
    "reap": order_reap,
    "random": order_random,
}
