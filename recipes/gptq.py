"""Integers chosen one column after another: what rounding one input's weights costs, the inputs after it make good.

Frantar et al., "GPTQ", arXiv 2210.17323, with scales for symmetric integers and XNNPACK's way to keep them. Shapes: M
outputs, N inputs, g inputs that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.threads import one_thread_each

DAMPING = 0.01  # of the mean diagonal, added to it
BLOCK = 128  # columns after which what was lost reaches the rest of the matrix
ROWS = 2048  # outputs that one thread has at once: of fewer, Python takes longer than the sums
WIDEST = 5120  # inputs that know of each other: a wider layer's are cut, for Cholesky's cost grows with their cube
TILE = 512  # of a Hessian
SHRINKS = torch.linspace(0.5, 1.0, 26)  # of the scale that has room for the largest weight


@dataclass(frozen=True)
class LayerInputs:
    """What is known of the inputs of a layer, or of several that share them.

    importance_N: how much each input counts. factors: one for each of `hessian_blocks`, see `inverse_factor`.
    """

    importance_N: Tensor
    factors: list[Tensor]


def inputs_by_layer(hessians: dict[str, list[Tensor]]) -> dict[str, LayerInputs]:
    """hessians: float32, by layer the sums of x x^T over calibration inputs, one for each of `hessian_blocks`. They are
    taken out of it: what is kept of them is as large.
    """
    importance = {name: torch.cat([one.diagonal() for one in found]) for name, found in hessians.items()}
    waiting = {(name, i): found.pop(0) for name, found in hessians.items() for i in range(len(found))}
    parts = list(waiting)
    order = sorted(parts, key=lambda part: -len(waiting[part]))  # so that all threads end together
    with one_thread_each() as workers:
        made = dict(zip(order, workers(lambda part: inverse_factor(waiting.pop(part)), order), strict=True))
    return {name: LayerInputs(known, [made[p] for p in parts if p[0] == name]) for name, known in importance.items()}


def gptq(
    weight_MN: Tensor,
    inputs: LayerInputs,
    bits: int,
    group_size: int | None,
    scale_dtype: torch.dtype,
    fitted: bool,
) -> tuple[Tensor, Tensor]:
    """(int8 [M, N], scales [M, N / g] of scale_dtype).

    fitted: scales by least squares, weighted with how much inputs count; else by the largest weight.
    """
    M, N = weight_MN.shape
    weight_MN, g = weight_MN.detach().float().clone(), group_size or N
    importance_N = inputs.importance_N
    integers_MN, scales = torch.empty(M, N, dtype=torch.int8), torch.empty(M, N // g, dtype=scale_dtype)
    top = 2 ** (bits - 1)

    def choose(rows: slice) -> None:
        at = 0
        for factor_NN in inputs.factors:
            choose_part(rows, at, factor_NN)
            at += len(factor_NN)

    def choose_part(rows: slice, at: int, factor_NN: Tensor) -> None:
        """Of the inputs from `at` on, that know of each other."""
        w_mN = weight_MN[rows, at : at + len(factor_NN)]
        for start in range(0, len(factor_NN), BLOCK):
            stop = min(len(factor_NN), start + BLOCK)
            # An input's weights lie together, as they are gone through one input after another.
            w_Bm, within_BB = w_mN[:, start:stop].T.contiguous(), factor_NN[start:stop, start:stop]
            lost_Bm, integers_Bm = torch.empty_like(w_Bm), torch.empty(w_Bm.shape, dtype=torch.int8)
            for j in range(stop - start):
                i = at + start + j
                if i % g == 0:
                    group = slice(i, i + g)
                    ahead = min(g, stop - start - j)  # of the block; what lies behind it has lost nothing in it yet
                    part = torch.cat([w_Bm[j : j + ahead].T, weight_MN[rows, i + ahead : i + g]], dim=1)
                    scales[rows, i // g] = scale_of(part, importance_N[group], bits, scale_dtype, fitted)
                scale_m = scales[rows, i // g].float()
                integer_m = (w_Bm[j] / scale_m).round_().clamp_(-top, top - 1)
                integers_Bm[j] = integer_m
                lost_Bm[j] = (w_Bm[j] - integer_m * scale_m) / within_BB[j, j]
                w_Bm[j:] -= within_BB[j, j:, None] * lost_Bm[j]
            integers_MN[rows, at + start : at + stop] = integers_Bm.T
            w_mN[:, stop:] -= lost_Bm.T.contiguous() @ factor_NN[start:stop, stop:]

    with one_thread_each() as workers:
        list(workers(choose, [slice(start, start + ROWS) for start in range(0, M, ROWS)]))
    return integers_MN, scales


def add_squares(hessian_NN: Tensor, x_KN: Tensor) -> None:
    """Add x^T x in place. It is symmetric, so half of it is summed; by as many threads as torch has, whose number
    changes no bit.
    """
    starts = range(0, len(hessian_NN), TILE)
    tiles = [(slice(i, i + TILE), slice(j, j + TILE)) for i in starts for j in starts if i <= j]

    def add(tile: tuple[slice, slice]) -> None:
        rows, columns = tile
        hessian_NN[rows, columns] += x_KN[:, rows].T @ x_KN[:, columns]
        if rows != columns:
            hessian_NN[columns, rows] = hessian_NN[rows, columns].T

    with one_thread_each() as workers:
        list(workers(add, tiles))


def inverse_factor(hessian_NN: Tensor) -> Tensor:
    """Upper triangular U with U^T U the inverse of the damped Hessian: its rows say whom a column's loss concerns."""
    diagonal_N = hessian_NN.diagonal()
    mean = diagonal_N.mean().clamp_min(torch.finfo(torch.float32).tiny)
    damped_NN = hessian_NN + torch.diag_embed(torch.where(diagonal_N == 0, mean, DAMPING * mean))
    # From the last input to the first H = R R^T with an upper R; so U is R's inverse, and H itself is never inverted.
    upper_NN = torch.linalg.cholesky(damped_NN.double().flip(0, 1)).flip(0, 1)
    return inverse_of_triangle(upper_NN).float()


def inverse_of_triangle(upper_NN: Tensor) -> Tensor:
    """By products of halves, which are faster than what LAPACK has for it."""
    N = len(upper_NN)
    if N <= TILE:
        return torch.linalg.solve_triangular(upper_NN, torch.eye(N, dtype=upper_NN.dtype), upper=True)
    half, inverse_NN = N // 2, torch.zeros_like(upper_NN)
    first, last = inverse_NN[:half, :half], inverse_NN[half:, half:]
    first[:], last[:] = inverse_of_triangle(upper_NN[:half, :half]), inverse_of_triangle(upper_NN[half:, half:])
    inverse_NN[:half, half:] = -(first @ upper_NN[:half, half:] @ last)
    return inverse_NN


def scale_of(w_mg: Tensor, importance_g: Tensor | None, bits: int, scale_dtype: torch.dtype, fitted: bool) -> Tensor:
    """[m], as it is kept: integers are chosen for what is kept. Zeros have a scale, too."""
    top = 2 ** (bits - 1)
    room_m = w_mg.abs().amax(1) / (top - 0.5)  # torchao's own: an integer range is not symmetric by half a step
    room_m = room_m.clamp_min(torch.finfo(torch.float32).eps)
    if not fitted:
        return room_m.to(scale_dtype)
    if importance_g is None or not importance_g.any():
        importance_g = torch.ones(w_mg.shape[1])
    importance_g = importance_g + 1e-3 * importance_g.mean()  # an input that was never there counts a little, too
    best_m, chosen_m = torch.full_like(room_m, torch.inf), room_m.to(scale_dtype)
    if w_mg.shape[1] < w_mg.shape[0]:
        w_mg = w_mg.T.contiguous().T  # torch goes along what lies together: the longer, the better
    # One place for all: memory that is given back and asked for at each step takes longer than the sums.
    lost_mg = torch.empty_like(w_mg)
    for shrink in SHRINKS:
        scale_m = (room_m * shrink).to(scale_dtype)
        wide_m1 = scale_m.float()[:, None]
        torch.div(w_mg, wide_m1, out=lost_mg).round_().clamp_(-top, top - 1).mul_(wide_m1).sub_(w_mg).square_()
        loss_m = lost_mg @ importance_g
        better_m = loss_m < best_m
        best_m, chosen_m = torch.where(better_m, loss_m, best_m), torch.where(better_m, scale_m, chosen_m)
    return chosen_m


def hessian_blocks(n_inputs: int, group_size: int | None) -> list[slice]:
    """All inputs of a layer, or parts of a wide one that know nothing of each other. No group lies in two of them."""
    g = group_size or 1
    width = -(-n_inputs // -(-n_inputs // WIDEST) // g) * g
    return [slice(start, min(n_inputs, start + width)) for start in range(0, n_inputs, width)]
