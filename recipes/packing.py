"""The bytes that a program holds for each weight, worked out from the model alone."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from model.pages import large
from recipes.options import Backend
from recipes.threads import by_slices


def packed_digests(model: nn.Module, backend: Backend) -> dict[str, list[str]]:
    """By parameter name the sha256 that its bytes in a `.pte` may have; scales have an entry of their own.

    A float matrix is kept as it is; without a delegate a linear's is kept the other way round, as a product with
    plain operators wants it. Norms and biases are kept in their own type or widened to float32. int4 is packed two
    to a byte.
    """
    digests: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{kind}" if name else kind
            if hasattr(parameter, "qdata"):
                digests[full] = [tensor_sha256(packed) for packed in _packings(module, parameter)]
                digests[f"{full}.scale"] = [tensor_sha256(parameter.scale)]
                if parameter.scale.dtype != torch.float32:
                    digests[f"{full}.scale"].append(tensor_sha256(parameter.scale.float()))
            else:
                digests[full] = [tensor_sha256(form) for form in _float_forms(parameter.data, backend)]
    return digests


def pack_int4(integers: Tensor) -> Tensor:
    """int8 -8..7 [rows, columns] to uint8 [rows, columns / 2], as XNNPACK wants a linear's: the even column low.

    The same as `convert_to_qc4w` in executorch's XNNPACK backend, a few rows at a time.
    """
    packed = torch.empty(integers.shape[0], integers.shape[1] // 2, dtype=torch.uint8)
    for part, into in zip(integers.split(_ROWS), packed.split(_ROWS), strict=True):
        words = (part.contiguous().view(torch.uint8) + 8).view(torch.int16)  # the even column is the low byte
        into.copy_(words | words >> 4)  # a copy keeps of a word the low byte
    return packed


def unpack_int4(packed: Tensor) -> Tensor:
    """The way back."""
    words = packed.to(torch.int16)
    words.bitwise_or_(words << 4).bitwise_and_(0x0F0F)
    return words.view(torch.int8).sub_(8)


_ROWS = 128  # that are packed at once
AT_ONCE = 2**19  # weights that become floats at once


def dequantized(integers: Tensor, scale: Tensor, dtype: torch.dtype, is_packed: bool = False) -> Tensor:
    """[rows, columns], bit for bit what torchao's `dequantize` gives, in a fraction of its time: some rows at a time,
    by all threads, into large pages. integers: int8, or packed by `pack_int4`. scale: [rows, groups].
    """
    columns = integers.shape[1] * (2 if is_packed else 1)
    floats = large((*scale.shape, columns // scale.shape[1]), dtype)

    def fill(part: slice) -> None:
        rows = unpack_int4(integers[part]) if is_packed else integers[part]
        torch.mul(rows.view(floats[part].shape), scale[part, :, None].to(dtype), out=floats[part])

    by_slices(len(integers), max(1, AT_ONCE // columns), fill)
    return floats.view(len(integers), columns)


def _packings(module: nn.Module, parameter: Tensor) -> list[Tensor]:
    integers = parameter.qdata  # type: ignore[attr-defined]
    if parameter.target_dtype != torch.int4:  # type: ignore[attr-defined]
        return [integers]
    packed = pack_int4(integers)
    # An embedding's even column is the high half.
    return [packed] if isinstance(module, nn.Linear) else [packed << 4 | packed >> 4]


def _float_forms(tensor: Tensor, backend: Backend) -> list[Tensor]:
    forms = [tensor]
    if tensor.dim() == 2 and backend is Backend.portable:
        forms.append(tensor.t())
    if tensor.dim() == 1 and tensor.dtype != torch.float32:
        forms.append(tensor.float())
    return forms


def tensor_sha256(tensor: Tensor) -> str:
    """Of its elements in order, as a file would hold them."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
