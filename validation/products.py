"""What a linear layer computes in eager: float32 sums whose bits no number of threads changes."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from threadpoolctl import ThreadpoolController
from torch import Tensor

from recipes.threads import by_slices

SLICE = 512  # rows of a weight that one thread multiplies with at once


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`. In float32 by numpy's BLAS: torch's, MKL, is a third slower on AMD (125 and 90 GFLOP/s).

    BLAS sums in another order when it has another number of threads. So it is given one, and slices of the weight, by
    as many threads of ours as torch has: the bits depend on the processor's kernel alone, and on how many tokens go
    together.
    """
    if x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    x_ND, out_NM = x.detach().reshape(-1, x.shape[-1]).numpy(), torch.empty(x.shape[:-1].numel(), len(weight)).numpy()

    def fill(rows: slice) -> None:
        np.matmul(x_ND, weight[rows].detach().numpy().T, out=out_NM[:, rows])

    with blas().limit(limits=1, user_api="blas"):
        by_slices(len(weight), SLICE, fill)
    out = torch.from_numpy(out_NM).view(*x.shape[:-1], len(weight))
    return out if bias is None else out.add_(bias)


def product_in_halves(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, as right as `product` and summed in another order: by torch, and half of the inputs at a time."""
    half, out = x.shape[-1] // 2, x.new_empty(*x.shape[:-1], len(weight))

    def fill(rows: slice) -> None:
        first = F.linear(x[..., :half], weight[rows, :half])
        out[..., rows] = first + F.linear(x[..., half:], weight[rows, half:], None if bias is None else bias[rows])

    by_slices(len(weight), SLICE, fill)
    return out


@cache
def blas() -> ThreadpoolController:
    """Of the libraries that are there now: numpy's is, whatever comes later."""
    return ThreadpoolController()


def kernels() -> dict[str, str]:
    """Which code multiplies here: where these differ, eager's float32 sums come in another order."""
    # scipy brings one of its own, and is there where somebody else has imported it.
    numpys = next(info for info in blas().info() if "numpy" in info["filepath"] and info["user_api"] == "blas")
    return {
        "float32 products": f"{numpys['internal_api']} {numpys['version']} {numpys['architecture']}",
        "other operators": f"torch {torch.__version__.partition('+')[0]} {torch.backends.cpu.get_cpu_capability()}",
    }
