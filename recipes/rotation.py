"""Rotations that spread what one channel holds over all of them; the network computes what it computed.

A size n = 2^k m, m odd, is rotated by R = diag(signs) (H ⊗ … ⊗ H ⊗ C): random signs, Hadamard matrices of at most 64
rows, and Hartley's matrix cos + sin of 2πij/m, whose entries are nearly as even (1 for m = 1, so that powers of two
have entries ±1/√n). One factor after the other is applied, a block of rows at a time: there is never an n x n matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from model import DreamEdgeConfig
from recipes.options import Rotate
from recipes.quantization import QuantizationError

ODD = 127  # the largest odd factor: Hartley's matrix is multiplied as it stands
HADAMARD = 64  # rows of one factor
BLOCK = 2**20  # entries that are rotated at once, in float64


def check_rotation(config: DreamEdgeConfig, rotate: Iterable[Rotate]) -> None:
    """Raises `QuantizationError` for a size that cannot be rotated."""
    sizes = {Rotate.r1: ("hidden_size", config.hidden_size), Rotate.r2: ("head_dim", config.head_dim)}
    for kind in rotate:
        name, size = sizes[kind]
        _, odd = _power_and_odd(size)
        if odd > ODD:
            raise QuantizationError(
                f"rotate {kind.value}: {name} {size} is a power of two times {odd}; "
                f"a rotation needs an odd factor of at most {ODD}"
            )


def rotate_rows(matrix: Tensor) -> None:
    """Each row of `matrix`, [rows, n] and any strides, times R, in place. R depends on n alone."""
    n = matrix.shape[1]
    signs, factors = _signs(n), _factors(n)
    rows = max(1, BLOCK // n)
    for start in range(0, len(matrix), rows):
        part = matrix[start : start + rows]
        turned = part.double() * signs
        after = n
        for factor in factors:
            size = len(factor)
            after //= size
            # Symmetric, so it does not matter from which side.
            turned = factor @ turned.reshape(-1, size, after) if after > 1 else turned.reshape(-1, size) @ factor
        part.copy_(turned.reshape(part.shape))


def _power_and_odd(n: int) -> tuple[int, int]:
    power = n & -n
    return power, n // power


def _signs(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1


def _factors(n: int) -> list[Tensor]:
    """Symmetric and orthogonal, float64, of sizes whose product is n."""
    power, odd = _power_and_odd(n)
    factors = []
    while power > 1:
        factors.append(_hadamard(min(power, HADAMARD)))
        power //= len(factors[-1])
    if odd > 1:
        index = torch.arange(odd)
        angles = torch.outer(index, index).remainder(odd).double() * (2 * math.pi / odd)
        factors.append((angles.cos() + angles.sin()) / math.sqrt(odd))
    return factors


def _hadamard(n: int) -> Tensor:
    made = torch.ones(1, 1, dtype=torch.float64)
    while len(made) < n:
        made = torch.cat((torch.cat((made, made), 1), torch.cat((made, -made), 1)))
    return made / math.sqrt(n)
