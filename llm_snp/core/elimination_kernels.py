"""What `elimination` does, in Triton, which comes with CUDA builds of torch: one kernel a neuron, four a head.

A step of the elimination is a few microseconds of arithmetic on a GPU; told operation by operation it is a dozen
launches. Here each program owns a tile of columns. What it needs of the others, the cheapest unit and its variance, the
step before has left as one minimum per tile, in turns in two buffers, so that nobody waits within a step.
"""

from __future__ import annotations

import subprocess

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

# Columns of a program, and rows of the factors that it reads at once.
COLUMNS = 64
ROWS = 32
# At least so many minima are looked through: fewer save nothing, and would be another kernel as the matrix shrinks.
TILES = 128
# Of a program that removes a group, which holds two blocks of the group's width in registers; and their size at most.
GROUP_COLUMNS = 16
BLOCK_BYTES = 64 * 64 * 8
WARPS = 8
# What Triton raises where kernels cannot be compiled or run: it asserts that there is a libcuda, and imports what it
# compiles to launch them.
REFUSALS = (TritonError, RuntimeError, OSError, subprocess.SubprocessError, AssertionError, ImportError)


@triton.jit(do_not_specialize=["j", "steps", "tiles"])
def _step(
    h,
    e,
    factors,
    diagonals,
    minima,
    cheapest,
    picked,
    cost,
    j,
    m,
    steps,
    tiles,
    C: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
):
    """Remove unit j of a panel, whatever is cheapest; j = -1 only looks for the first.

    h, e (m, m); factors (3, steps, m): Q, h_p: and K; diagonals (2, m): half of e's and h's; picked, cost (steps,).
    minima (2, 2, tiles): in turns the least half cost in every tile and the variance there; cheapest (2, tiles): where.
    C columns in a tile, T a power of two that is no less than `tiles`, R rows of the factors at once.
    """
    tile = tl.program_id(0)
    columns = tile * C + tl.arange(0, C)
    inside = columns < m
    energy = tl.load(diagonals + columns, mask=inside, other=float("inf"))
    variance = tl.load(diagonals + m + columns, mask=inside, other=1.0)
    if j >= 0:
        before = j % 2
        t = tl.arange(0, T)
        least = tl.load(minima + 2 * before * tiles + t, mask=t < tiles, other=float("inf"))
        at = tl.load(cheapest + before * tiles + t, mask=t < tiles, other=m)
        variances = tl.load(minima + (2 * before + 1) * tiles + t, mask=t < tiles, other=0.0)
        half_cost = tl.min(least, 0)
        unit = tl.minimum(tl.min(tl.where(least == half_cost, at, m), 0), m - 1)
        pivot = tl.sum(tl.where(at == unit, variances, 0.0), 0)
        hk = tl.load(h + unit * m + columns, mask=inside, other=0.0)
        q = tl.load(e + unit * m + columns, mask=inside, other=0.0)
        for first in range(0, j, R):
            row = first + tl.arange(0, R)
            q_p = tl.load(factors + row * m + unit, mask=row < j, other=0.0)
            hk_p = tl.load(factors + (steps + row) * m + unit, mask=row < j, other=0.0)
            k_p = tl.load(factors + (2 * steps + row) * m + unit, mask=row < j, other=0.0)
            known = (row < j)[:, None] & inside[None, :]
            rows_q = tl.load(factors + row[:, None] * m + columns[None, :], mask=known, other=0.0)
            rows_k = tl.load(factors + (2 * steps + row)[:, None] * m + columns[None, :], mask=known, other=0.0)
            hk -= tl.sum(hk_p[:, None] * rows_k, 0)
            q -= tl.sum(q_p[:, None] * rows_k + k_p[:, None] * rows_q, 0)
        k = hk / pivot
        q -= half_cost * hk
        tl.store(factors + j * m + columns, q, mask=inside)
        tl.store(factors + (steps + j) * m + columns, hk, mask=inside)
        tl.store(factors + (2 * steps + j) * m + columns, k, mask=inside)
        energy = tl.where(columns == unit, float("inf"), energy - q * k)
        variance = tl.where(columns == unit, 1.0, variance - hk * k)
        tl.store(diagonals + columns, energy, mask=inside)
        tl.store(diagonals + m + columns, variance, mask=inside)
        if tile == 0:
            tl.store(picked + j, unit)
            tl.store(cost + j, half_cost)
    score = energy / variance
    after = (j + 1) % 2
    lowest = tl.min(score, 0)
    here = tl.min(tl.where(score == lowest, columns, m), 0)
    tl.store(minima + 2 * after * tiles + tile, lowest)
    tl.store(minima + (2 * after + 1) * tiles + tile, tl.sum(tl.where(columns == here, variance, 0.0), 0))
    tl.store(cheapest + after * tiles + tile, here.to(tl.int64))


def remove_columns(h: Tensor, e: Tensor, diagonals: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """A panel of `steps` single columns; see `elimination._panel`. diagonals (2, m): half of e's, and h's."""
    m = h.shape[0]
    tiles = triton.cdiv(m, COLUMNS)
    factors = h.new_empty(3, steps, m)
    minima = h.new_empty(2, 2, tiles)
    cheapest = torch.empty(2, tiles, dtype=torch.long, device=h.device)
    picked = torch.empty(steps, dtype=torch.long, device=h.device)
    cost = h.new_empty(steps)
    memory = (h, e, factors, diagonals, minima, cheapest, picked, cost)
    width = max(TILES, triton.next_power_of_2(tiles))
    for j in range(-1, steps):
        _step[(tiles,)](*memory, j, m, steps, tiles, C=COLUMNS, R=ROWS, T=width)
    return picked, cost, factors


@triton.jit
def _swept(block_h, block_e, t, G: tl.constexpr):
    """What removing column t of a group does to its own blocks (g, g): rows and columns of the update, and its cost.

    Returns column t of K, of Q, h_tt, ½ e_tt / h_tt, and both blocks after it.
    """
    at = tl.arange(0, G)
    is_row = (at == t)[:, None]
    is_column = (at == t)[None, :]
    row_h = tl.sum(tl.where(is_row, block_h, 0.0), 0)
    row_e = tl.sum(tl.where(is_row, block_e, 0.0), 0)
    column_h = tl.sum(tl.where(is_column, block_h, 0.0), 1)
    column_e = tl.sum(tl.where(is_column, block_e, 0.0), 1)
    pivot = tl.sum(tl.where(at == t, row_h, 0.0), 0)
    half_cost = 0.5 * tl.sum(tl.where(at == t, row_e, 0.0), 0) / pivot
    column_k = column_h / pivot
    column_q = column_e - half_cost * column_h
    row_k = row_h / pivot
    row_q = row_e - half_cost * row_h
    block_h -= column_k[:, None] * row_h[None, :]
    block_e -= column_q[:, None] * row_k[None, :] + column_k[:, None] * row_q[None, :]
    return column_k, column_q, pivot, half_cost, block_h, block_e


@triton.jit
def _blocks(h, e, unit, m, g, G: tl.constexpr):
    """The blocks (G, G) of h and e that a unit of g columns has on their diagonals, and where they are not padding."""
    at = tl.arange(0, G)
    inside = (at < g)[:, None] & (at < g)[None, :]
    where = (unit * g + at).to(tl.int64)[:, None] * m + (unit * g + at)[None, :]
    return tl.load(h + where, mask=inside, other=0.0), tl.load(e + where, mask=inside, other=0.0), inside


@triton.jit
def _price(h, e, gone, score, m, g, G: tl.constexpr):
    """score (u,): what removing each unit of g columns costs, column by column; infinite for those that are gone."""
    unit = tl.program_id(0)
    block_h, block_e, inside = _blocks(h, e, unit, m, g, G)
    lost = tl.load(gone + unit)
    price = tl.sum(tl.sum(tl.where(inside, 0.0, block_e), 0), 0)  # zero, of the type of e
    for t in range(g):
        _, _, _, half_cost, block_h, block_e = _swept(block_h, block_e, t, G)
        price += 2.0 * half_cost
    tl.store(score + unit, tl.where(lost != 0, float("inf"), price))


@triton.jit(do_not_specialize=["j"])
def _factor(
    h, e, gone, score, factors, picked, cost, j, m, g, units, G: tl.constexpr, C: tl.constexpr, U: tl.constexpr
):
    """Removal of the cheapest unit as factors (4, g, m): h_p:, Q, K and Q again, its columns one after the other.

    gone, score (u,); U a power of two that is no less than u. C columns in a tile. The unit becomes picked[j].
    """
    tile = tl.program_id(0)
    u = tl.arange(0, U)
    scores = tl.load(score + u, mask=u < units, other=float("inf"))
    paid = tl.min(scores, 0)
    unit = tl.minimum(tl.min(tl.where(scores == paid, u, units), 0), units - 1)
    block_h, block_e, _ = _blocks(h, e, unit, m, g, G)
    at = tl.arange(0, G)
    rows = (unit * g + at).to(tl.int64)[:, None] * m
    columns = tile * C + tl.arange(0, C)
    known = (at < g)[:, None] & (columns < m)[None, :]
    tile_h = tl.load(h + rows + columns[None, :], mask=known, other=0.0)
    tile_e = tl.load(e + rows + columns[None, :], mask=known, other=0.0)
    for t in range(g):
        is_row = (at == t)[:, None]
        hk = tl.sum(tl.where(is_row, tile_h, 0.0), 0)
        q = tl.sum(tl.where(is_row, tile_e, 0.0), 0)
        column_k, column_q, pivot, half_cost, block_h, block_e = _swept(block_h, block_e, t, G)
        k = hk / pivot
        q -= half_cost * hk
        tile_h -= column_k[:, None] * hk[None, :]
        tile_e -= column_q[:, None] * k[None, :] + column_k[:, None] * q[None, :]
        tl.store(factors + t * m + columns, hk, mask=columns < m)
        tl.store(factors + (g + t) * m + columns, q, mask=columns < m)
        tl.store(factors + (2 * g + t) * m + columns, k, mask=columns < m)
        tl.store(factors + (3 * g + t) * m + columns, q, mask=columns < m)
    if tile == 0:
        tl.store(picked + j, unit.to(tl.int64))
        tl.store(cost + j, paid)
        tl.store(gone + unit, 1)


def takes_groups(g: int, units: int, dtype: torch.dtype) -> bool:
    """Whether units of g columns can be removed by `remove_groups`."""
    return int(triton.next_power_of_2(g)) ** 2 * dtype.itemsize <= BLOCK_BYTES and units <= 1024


def remove_groups(h: Tensor, e: Tensor, g: int) -> tuple[Tensor, Tensor]:
    """All units of g columns in order of removal, and what each costs; h and e (m, m) are worked in.

    Four kernels each: all prices, the factors of the cheapest, and a product for either matrix.
    """
    m = h.shape[0]
    units = m // g
    width, tiles = triton.next_power_of_2(g), triton.cdiv(m, GROUP_COLUMNS)
    factors, score, cost = h.new_empty(4, g, m), h.new_empty(units), h.new_empty(units)
    gone = torch.zeros(units, dtype=torch.int32, device=h.device)
    picked = torch.empty(units, dtype=torch.long, device=h.device)
    hk, _, k, _ = factors.unbind()
    memory, all_units = (h, e, gone, score, factors, picked, cost), triton.next_power_of_2(units)
    left, right = factors[1:3].view(2 * g, m).mT, factors[2:].view(2 * g, m)
    for j in range(units):
        _price[(units,)](h, e, gone, score, m, g, G=width, num_warps=WARPS)
        _factor[(tiles,)](*memory, j, m, g, units, G=width, C=GROUP_COLUMNS, U=all_units, num_warps=WARPS)
        h.addmm_(hk.mT, k, alpha=-1)
        e.addmm_(left, right, alpha=-1)
    return picked, cost
