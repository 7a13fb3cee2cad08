"""Prune directions inside the heads of a block: of the value path, and between query and key."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import PruneConfig
from ..core import heads as head_space
from ..core.moments import Moments
from ..core.subspace import truncate
from ..families import Attention, Site
from .order import order_scores, order_values
from .weights import State, linear_weights, store


def narrow_heads(
    state: State,
    site: Site,
    attention: Attention,
    moments: Mapping[str, Moments],
    kept: Mapping[str, int],
    options: PruneConfig,
    sensitivity: Tensor | None,
) -> State:
    """Keep as many directions of every head as `kept` says; the consumer is refitted to itself.

    moments: of the consumer's input (by the site's name), and of the outputs of `query` and `key`, grouped by head.
    """
    values, damping = moments[site.name], options.curve_damping
    device, new = values.first.device, dict(state)
    # layer -> rows of its heads (h, w), and what they become (h, r, w)
    cuts: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    rank = attention.value_rank(kept)
    if rank < attention.value_dim:
        weight, bias = linear_weights(state, site.consumer, device)
        basis, in_basis, subspace = order_values(
            values.covariance, weight, attention, damping, sensitivity, options.sensitive_order
        )
        cuts[attention.value.layer].append((attention.value.of(attention.heads), basis[:, :rank]))
        columns, refit = truncate(subspace, in_basis, rank)
        if bias is not None:
            mean = head_space.to_basis(values.mean[None], basis.repeat_interleave(attention.queries, 0))[0]
            bias = bias + in_basis @ mean - refit @ mean[columns]
        store(new, site.consumer, refit, bias)
    rank = attention.score_rank(kept)
    if rank < attention.score_units:
        scores = order_scores(attention, moments, damping)
        for (layer, rows), transform in zip(attention.projections.values(), scores.left(rank), strict=True):
            cuts[layer].append((rows, transform))
        table = scores.table(rank)
        if table is not None:
            table, before = table.cpu(), state.get(attention.pair_table)
            new[attention.pair_table] = table if before is None else before.gather(1, table)
    for layer, parts in cuts.items():
        weight, bias = linear_weights(state, layer, device)
        store(new, layer, *cut_rows(weight, bias, parts))
    return new


def cut_rows(weight: Tensor, bias: Tensor | None, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor | None]:
    """A layer (n, d) in whose place of the rows (h, w) of some heads are fewer, transformed by (h, r, w)."""
    turned, turned_bias = weight.clone(), None if bias is None else bias.clone()
    stays = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    for rows, transform in parts:
        rank, flat = transform.shape[1], rows.flatten()
        found, found_bias = head_space.transform_rows(weight[flat], None if bias is None else bias[flat], transform)
        first = rows[:, :rank].flatten()
        turned[first] = found
        if turned_bias is not None and found_bias is not None:
            turned_bias[first] = found_bias
        stays[rows[:, rank:].flatten()] = False
    return turned[stays], None if turned_bias is None else turned_bias[stays]
