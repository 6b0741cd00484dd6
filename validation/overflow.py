"""Float16 ends at 65,504: a network whose activations pass that gives no numbers in it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from validation.eager import Watch


class Float16Error(ArithmeticError):
    """Says which layer is given what is no number."""


def overflow_watch(dtype: torch.dtype) -> Watch | None:
    """For a network that is computed in `dtype`. Raises `Float16Error`."""
    return _watch if dtype == torch.float16 else None


def _watch(name: str, _: nn.Linear, x_1ND: Tensor, __: Tensor) -> None:
    check_finite(name.removesuffix(".weight"), x_1ND)


def check_finite(layer: str, given: Tensor) -> None:
    """layer: that is given it. Raises `Float16Error`."""
    if not given.isfinite().all():
        largest = int(torch.finfo(torch.float16).max)
        raise Float16Error(f"activations pass {largest:,}, float16's largest, before {layer}")
