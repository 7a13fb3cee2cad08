"""Greedy backward elimination of all units at a small multiple of the cost of a Cholesky factorisation.

The optimal-brain-surgeon family (OSSCAR, ZipLM, SlimGPT) removes the unit whose removal, with the rest refitted,
costs the least output energy, and repeats. Done one by one that is u memory-bound sweeps over two matrices; the
updates are delayed in panels instead, as blocked Cholesky does (METHOD: section 3, "greedy at factorisation cost").
On a GPU with Triton a unit takes one kernel (`elimination_kernels`), elsewhere a dozen operations of torch.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

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
    kernels = fused(inverse.device, inverse.dtype)
    removed, increments = _eliminate(inverse, energy, group, panel, kernels)
    return removed, increments.clamp_min(0.0)


def _eliminate(
    inverse: Tensor, energy: Tensor, group: int, panel: int, kernels: ModuleType | None
) -> tuple[Tensor, Tensor]:
    """`eliminate` in the memory of its arguments, with the Triton kernels if there are any."""
    units = inverse.shape[0] // group
    if kernels is not None and group > 1 and kernels.takes_groups(group, units, inverse.dtype):
        return kernels.remove_groups(inverse, energy, group)  # type: ignore[no-any-return]
    per_panel = max(1, panel // group)
    present = torch.arange(units, device=inverse.device)
    gone = torch.zeros(units, dtype=torch.bool, device=inverse.device)
    removed, increments = [], []
    h, e, left = inverse, energy, units
    while left:
        steps = min(per_panel, left)
        if group > 1:
            picked, cost, factors = _group_panel(h, e, gone, group, steps)
        else:
            remove = _panel if kernels is None else kernels.remove_columns
            picked, half_cost, factors = remove(h, e, _diagonals(h, e, gone), steps)
            cost = 2.0 * half_cost
        gone.index_fill_(0, picked, True)
        removed.append(present[picked])
        increments.append(cost)
        left -= steps
        if not left:
            break
        if left <= COMPACT_AT * present.numel():
            keep = (~gone).nonzero().squeeze(1)
            present, gone = present[keep], gone[keep]
            columns = _columns(keep, group)
            factors = factors.index_select(2, columns)
            h, e = _compacted(h, columns), _compacted(e, columns)
        q, hk, k = factors.unbind()
        _subtract_symmetric(h, hk, k)
        _subtract_symmetric(e, torch.cat([q, k]), torch.cat([k, q]))
    return torch.cat(removed), torch.cat(increments)


@cache
def fused(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """`elimination_kernels` if there is Triton for this device, and it ranks a small problem as torch does."""
    if device.type != "cuda":
        return None
    try:
        from . import elimination_kernels
    except ImportError:
        return None
    return elimination_kernels if agree(elimination_kernels, device, dtype) else None


def agree(kernels: ModuleType, device: torch.device, dtype: torch.dtype, units: int = 96) -> bool:
    """Whether the Triton kernels can be compiled for a device, and remove columns and groups as the operations do."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, units, generator=generator, dtype=torch.float64) for n in (2 * units, 8))
    inverse, energy = (matrix.contiguous().to(device, dtype) for matrix in (torch.linalg.inv(x.mT @ x), w.mT @ w))
    for group in (1, 4):
        expected, costs = _eliminate(inverse.clone(), energy.clone(), group, 32, None)
        try:
            removed, found = _eliminate(inverse.clone(), energy.clone(), group, 32, kernels)
        except kernels.REFUSALS:
            return False
        if not (torch.equal(removed, expected) and torch.allclose(found, costs, rtol=1e-3)):
            return False
    return True


def _diagonals(h: Tensor, e: Tensor, gone: Tensor) -> Tensor:
    """(2, m): half the diagonal of e, and that of h. What is gone costs infinitely much."""
    lost = torch.tensor([[torch.inf], [1.0]], dtype=h.dtype, device=h.device)
    return torch.where(gone, lost, torch.stack([0.5 * e.diagonal(), h.diagonal()]))


# With p the removed columns, K = (h_pp)⁻¹ h_p: and Q = e_p: - ½ e_pp K, removal updates
#     h ← h - h_p:ᵀ K    and    e ← e - Qᵀ K - Kᵀ Q.
# A panel removes `steps` units and keeps the updates as the factors Q, h_p: and K, stacked (3, steps·g, m). Rows and
# the diagonal blocks needed for the scores are brought up to date at once, the rest by the caller. All stays on the
# device: no element is read back. Every operation is a kernel that a GPU has to be told of, which takes longer than
# the arithmetic: they write into what they are given, and are as few as can be.


def _panel(h: Tensor, e: Tensor, diagonals: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Single columns: 12 kernels for each. Returns the picked ones (steps,), half their cost (steps,), and the factors.

    diagonals (2, m), see `_diagonals`; brought up to date.
    """
    factors = h.new_empty(3, steps, h.shape[0])
    q, hk, k = factors.unbind()
    rows, q_rows, hk_rows, k_rows = factors[:2].unbind(1), q.unbind(), hk.unbind(), k.unbind()
    q_slots, hk_slots = torch.split(q, 1), torch.split(hk, 1)
    half_energy, variance = diagonals.unbind()
    lost = torch.tensor([[torch.inf], [1.0]], dtype=h.dtype, device=h.device)
    score = torch.empty_like(variance)
    picked = torch.empty(steps, dtype=torch.long, device=h.device)
    cost, pivot = h.new_empty(steps), h.new_empty(1)
    for j, (unit, half_cost) in enumerate(zip(torch.split(picked, 1), torch.split(cost, 1), strict=True)):
        torch.div(half_energy, variance, out=score)
        torch.min(score, 0, keepdim=True, out=(half_cost, unit))
        torch.index_select(e, 0, unit, out=q_slots[j])
        torch.index_select(h, 0, unit, out=hk_slots[j])
        if j:
            at_p = factors[:, :j].index_select(2, unit).squeeze(2)
            rows[j].addmm_(at_p[:2], k[:j], alpha=-1)
            q_rows[j].addmv_(q[:j].mT, at_p[2], alpha=-1)
        torch.index_select(variance, 0, unit, out=pivot)
        torch.div(hk_rows[j], pivot, out=k_rows[j])
        q_rows[j].addcmul_(hk_rows[j], half_cost, value=-1)  # ½ e_pp K = ½ (e_pp / h_pp) h_p:
        diagonals.addcmul_(rows[j], k_rows[j], value=-1)
        diagonals.index_copy_(1, unit, lost)
    return picked, cost, factors


def _group_panel(h: Tensor, e: Tensor, gone: Tensor, g: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Units of g columns that are not `gone` (u,): 21 kernels for each, two of them solving.

    Returns the picked units (steps,), their cost (steps,), and the factors.
    """
    m = h.shape[0]
    units = m // g
    factors = h.new_empty(3, steps * g, m)
    parts = torch.split(factors, g, 1)
    table = torch.arange(m, device=h.device).view(units, g)
    diagonal_h, diagonal_e = _diagonal_blocks(h, g), _diagonal_blocks(e, g)
    # What is gone costs infinitely much, whatever is left of its blocks: that of h would be singular.
    penalty = h.new_zeros(units).masked_fill_(gone, torch.inf)
    eye = torch.eye(g, dtype=h.dtype, device=h.device).unsqueeze(0)
    diagonal_h.copy_(torch.where(gone.view(-1, 1, 1), eye, diagonal_h))
    score = h.new_empty(units)
    picked = torch.empty(steps, dtype=torch.long, device=h.device)
    cost = h.new_empty(steps)
    for j, (unit, paid) in enumerate(zip(torch.split(picked, 1), torch.split(cost, 1), strict=True)):
        torch.sum(_solve(diagonal_h, diagonal_e).diagonal(dim1=-2, dim2=-1), -1, out=score)
        torch.min(score.add_(penalty), 0, keepdim=True, out=(paid, unit))
        columns = table.index_select(0, unit).squeeze(0)
        q, hk, k = parts[j].unbind()
        torch.index_select(e, 0, columns, out=q)
        torch.index_select(h, 0, columns, out=hk)
        if j:
            q_done, _, k_done = factors[:, : j * g].unbind()
            q_p, hk_p, k_p = factors[:, : j * g].index_select(2, columns).unbind()
            hk.addmm_(hk_p.mT, k_done, alpha=-1)
            q.addmm_(q_p.mT, k_done, alpha=-1).addmm_(k_p.mT, q_done, alpha=-1)
        h_pp, e_pp = parts[j][1].index_select(1, columns), parts[j][0].index_select(1, columns)
        k.copy_(_solve(h_pp, hk))
        q.addmm_(e_pp, k, alpha=-0.5)
        q_by, hk_by, k_by = (rows.view(g, units, g).transpose(0, 1) for rows in (q, hk, k))
        diagonal_h.baddbmm_(k_by.mT, hk_by, alpha=-1)
        diagonal_e.baddbmm_(k_by.mT, q_by, alpha=-1).baddbmm_(q_by.mT, k_by, alpha=-1)
        diagonal_h.index_copy_(0, unit, eye)
        penalty.index_fill_(0, unit, torch.inf)
    return picked, cost, factors


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
