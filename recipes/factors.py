"""Factors of channels, that what writes them is divided by and what reads them is multiplied with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALPHAS = tuple(i / 10 for i in range(11))
ROWS = 256  # of a matrix, evenly spread, at least (and less than twice as many), that factors are tried on
LARGEST = 2.0**20  # of a factor, and 1 / its least
STANDS_OUT = math.log(4)  # how far from the median of channels
SPAN = 6.0  # what the channels of a token span, in root mean squares of the loudest


@dataclass(frozen=True)
class WeightGrid:
    """Symmetric, of weights; their inputs become int8 for each token. Fields as in `recipes.options.LinearQuant`."""

    weight_bits: int = 4
    group_size: int | None = 32

    def error(self, weight: Tensor, rms: Tensor) -> float:
        """Of the product, mean square: weight [out, in] with inputs of root mean squares [in], taken as independent."""
        group = self.group_size if self.group_size and weight.shape[1] % self.group_size == 0 else weight.shape[1]
        grouped = weight.view(len(weight), -1, group)
        steps = 2**self.weight_bits
        scale = grouped.abs().amax(-1, keepdim=True).mul_(2 / (steps - 1)).clamp_min_(torch.finfo(weight.dtype).tiny)
        rounded = (grouped / scale).round_().clamp_(-steps // 2, steps // 2 - 1).mul_(scale)
        of_weights = rounded.sub_(grouped).view_as(weight).square_().sum(0) @ rms.square()
        of_inputs = (SPAN * rms.max() / 255).square() / 12 * weight.square().sum()
        return float(of_weights + of_inputs)


def channel_factors(
    written: Tensor,
    readers: Sequence[Tensor],
    rms: Tensor | None,
    grid: WeightGrid | None,
    groups: int = 1,
    shared: int = 1,
) -> Tensor:
    """Of each channel one factor, float64 [channels], finite and positive.

    Of three kinds that of least error: none; only what stands out, a channel that is loud and little read, or the other
    way; rms^alpha / norm of a column^(1 - alpha) for each alpha, as in AWQ (arXiv 2306.00978). Only the error of
    `readers` counts: what writes a channel has a scale for each row, or is a norm.

    written: what the channels' loudness is taken for without `rms`: the largest weight that writes each, [channels].
    readers: [out, in] each, in = groups * shared * (channels / groups): `shared` heads read each group of channels.
    rms: root mean square of each input of the readers, [in].
    grid: None for what stands out, without a search.
    """
    tried = torch.cat([reader[:: max(1, len(reader) // ROWS)] for reader in readers]).double()
    columns = _positive(tried.square().sum(0).view(groups, shared, -1).sum(1).view(-1).sqrt()).log()
    # A channel that is never heard, or never read, is treated as those between loud and quiet are.
    inputs = _positive((rms if rms is not None else for_inputs(written, groups, shared)).double())
    loudness = inputs.view(groups, shared, -1).square().mean(1).view(-1).sqrt().log()
    even = _centred((loudness - columns) / 2)
    stands_out = _factors(torch.where(even.abs() > STANDS_OUT, even, 0.0))
    if grid is None:
        return stands_out
    best, least = torch.ones_like(stands_out), grid.error(tried, inputs)
    for factors in (stands_out, *(_factors(_centred(a * loudness - (1 - a) * columns)) for a in ALPHAS)):
        wide = for_inputs(factors, groups, shared)
        error = grid.error(tried * wide, inputs / wide)
        if error < least:
            best, least = factors, error
    return best


def _centred(logarithms: Tensor) -> Tensor:
    return logarithms - logarithms.median()


def _factors(logarithms: Tensor) -> Tensor:
    return logarithms.exp().clamp(1 / LARGEST, LARGEST)


def for_inputs(of_channels: Tensor, groups: int, shared: int) -> Tensor:
    """[channels] to [in]: each group of channels once for each head that reads it."""
    return of_channels.view(groups, 1, -1).expand(-1, shared, -1).reshape(-1)


def largest(matrix: Tensor, dim: int) -> Tensor:
    """By absolute value, along `dim`, without a copy of the matrix."""
    low, high = torch.aminmax(matrix, dim=dim)
    return torch.maximum(high, -low)


def _positive(values: Tensor) -> Tensor:
    """What is zero, or no number, becomes the geometric mean of the others."""
    known = values.isfinite() & (values > 0)
    mean = values[known].log().mean().exp() if known.any() else torch.ones((), dtype=values.dtype)
    return torch.where(known, values, mean)
