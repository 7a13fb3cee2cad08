"""Greedy backward elimination of all units at a small multiple of the cost of a Cholesky factorisation.

The optimal-brain-surgeon family (OSSCAR, ZipLM, SlimGPT) removes the unit whose removal, with the rest refitted,
costs the least output energy, and repeats. Done one by one that is u memory-bound sweeps over two matrices; the
updates are delayed in panels instead, as blocked Cholesky does (METHOD: section 3, "greedy at factorisation cost").
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linalg import strips

PANEL_COLUMNS = 128
# Removed columns stay in the matrices, masked, until at most this share of the columns is left: copying the rest
# together costs about as much as flushing a panel.
COMPACT_AT = 0.8
# Of a symmetric product only row strips of this height up to their diagonal block are multiplied.
STRIP_ROWS = 512


def eliminate(
    inverse: Tensor, energy: Tensor, group: int = 1, panel: int = PANEL_COLUMNS, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Rank units by repeated removal of the cheapest one.

    inverse    (m, m) H = (C + λI)⁻¹, symmetric positive definite
    energy     (m, m) M = Wᵀ G W, symmetric positive semi-definite
    group      g, the columns of a unit; unit i holds columns i·g .. (i+1)·g - 1, m = u·g
    panel      columns whose updates are delayed together
    overwrite  work in the memory of inverse and energy, which must be contiguous, instead of in copies

    Returns `removed` (u,) in order of removal and `increments` (u,) ≥ 0: increments[j] is the output energy that
    removing removed[j] adds after the least-squares refit of the units still there. They sum to tr(M (C + λI)).
    """
    if not overwrite:
        inverse, energy = (m.clone(memory_format=torch.contiguous_format) for m in (inverse, energy))
    units = inverse.shape[0] // group
    per_panel = max(1, panel // group)
    present = torch.arange(units, device=inverse.device)
    gone = torch.zeros(units, dtype=torch.bool, device=inverse.device)
    removed, increments = [], []
    h, e, left = inverse, energy, units
    while left:
        steps = min(per_panel, left)
        picked, cost, k, hk, q = _panel(h, e, gone, group, steps)
        removed.append(present[picked])
        increments.append(cost)
        left -= steps
        if not left:
            break
        if left <= COMPACT_AT * present.numel():
            keep = (~gone).nonzero().squeeze(1)
            present, gone = present[keep], gone[keep]
            columns = _columns(keep, group)
            k, hk, q = (rows.index_select(1, columns) for rows in (k, hk, q))
            h, e = _compacted(h, columns), _compacted(e, columns)
        _subtract_symmetric(h, hk, k)
        _subtract_symmetric(e, torch.cat([q, k]), torch.cat([k, q]))
    return torch.cat(removed), torch.cat(increments).clamp_min(0.0)


def _panel(h: Tensor, e: Tensor, gone: Tensor, g: int, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Remove `steps` units that are not `gone` (u,) and mark them so, keeping the updates of h and e as factors.

    With p the removed columns, K = (h_pp)⁻¹ h_p: and Q = e_p: - ½ e_pp K, removal updates
    h ← h - h_p:ᵀ K and e ← e - Qᵀ K - Kᵀ Q. Rows and the diagonal blocks needed for the scores are brought up to
    date at once, the rest by the caller. All stays on the device: no element is read back.
    Returns picked (steps,), cost (steps,), and K, h_p:, Q stacked (steps·g, m).
    """
    m = h.shape[0]
    units = m // g
    diagonal_h, diagonal_e = _diagonal_blocks(h, g), _diagonal_blocks(e, g)
    k, hk, q = (h.new_empty(steps * g, m) for _ in range(3))
    picked = torch.empty(steps, dtype=torch.long, device=h.device)
    cost = h.new_empty(steps)
    eye = torch.eye(g, dtype=h.dtype, device=h.device)
    for j in range(steps):
        if g == 1:
            score = diagonal_e.view(-1) / diagonal_h.view(-1)
        else:
            # A removed unit's block of h is zero: replace it, its score is masked anyway.
            safe = torch.where(gone.view(-1, 1, 1), eye, diagonal_h)
            score = _solve(safe, diagonal_e).diagonal(dim1=-2, dim2=-1).sum(-1)
        score = score.masked_fill(gone, torch.inf)
        unit = score.argmin().view(1)
        columns = _columns(unit, g)
        done = slice(0, j * g)
        k_p, q_p = k[done].index_select(1, columns), q[done].index_select(1, columns)
        h_row = h.index_select(0, columns).addmm_(hk[done].index_select(1, columns).mT, k[done], alpha=-1)
        e_row = e.index_select(0, columns).addmm_(q_p.mT, k[done], alpha=-1).addmm_(k_p.mT, q[done], alpha=-1)
        h_pp, e_pp = h_row.index_select(1, columns), e_row.index_select(1, columns)
        new_k = h_row / h_pp if g == 1 else _solve(h_pp, h_row)
        new_q = e_row.addmm_(e_pp, new_k, alpha=-0.5)
        now = slice(j * g, (j + 1) * g)
        k[now], hk[now], q[now] = new_k, h_row, new_q
        picked[j : j + 1] = unit
        cost[j : j + 1] = score.index_select(0, unit)
        gone.index_fill_(0, unit, True)
        if g == 1:
            diagonal_h.view(-1).addcmul_(h_row[0], new_k[0], value=-1)
            diagonal_e.view(-1).addcmul_(new_q[0], new_k[0], value=-2)
        else:
            by_unit_k = new_k.view(g, units, g).permute(1, 2, 0)
            diagonal_h -= by_unit_k @ h_row.view(g, units, g).transpose(0, 1)
            qk = by_unit_k @ new_q.view(g, units, g).transpose(0, 1)
            diagonal_e -= qk + qk.mT
    return picked, cost, k, hk, q


def _compacted(matrix: Tensor, columns: Tensor) -> Tensor:
    """matrix (m, m) at `columns` (k,) ascending, (k, k), in the same memory.

    Rows move forwards only: row i of the result ends where row i of the matrix, or an earlier one, ends.
    """
    k, memory = columns.numel(), matrix.view(-1)
    for rows in strips(k, STRIP_ROWS):
        memory[rows.start * k : rows.stop * k] = matrix[columns[rows].view(-1, 1), columns].view(-1)
    return memory[: k * k].view(k, k)


def _subtract_symmetric(matrix: Tensor, left: Tensor, right: Tensor) -> None:
    """matrix (m, m) -= leftᵀ right in place, for factors (p, m) whose product is symmetric: half is multiplied."""
    for start in range(0, matrix.shape[0], STRIP_ROWS):
        strip = slice(start, start + STRIP_ROWS)
        up_to = slice(0, start + STRIP_ROWS)
        matrix[strip, up_to].addmm_(left[:, strip].mT, right[:, up_to], alpha=-1)
        matrix[:start, strip] = matrix[strip, :start].mT


def _solve(a: Tensor, b: Tensor) -> Tensor:
    """a⁻¹ b without the check for singularity, which would read back from the device."""
    return torch.linalg.solve_ex(a, b)[0]


def _columns(units: Tensor, g: int) -> Tensor:
    """Columns of the given units, (len·g,)."""
    if g == 1:
        return units
    return (units.view(-1, 1) * g + torch.arange(g, device=units.device)).view(-1)


def _diagonal_blocks(matrix: Tensor, g: int) -> Tensor:
    """A copy of the (u, g, g) diagonal blocks of matrix (u·g, u·g)."""
    u = matrix.shape[0] // g
    blocks = matrix.view(u, g, u, g).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return blocks.clone(memory_format=torch.contiguous_format)
