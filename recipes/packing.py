"""The bytes that a program holds for each weight, worked out from the model alone."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


def packed_digests(model: nn.Module) -> dict[str, list[str]]:
    """By parameter name the sha256 that its bytes in a `.pte` may have; scales have an entry of their own.

    A float weight is kept in its own type or widened to float32 (biases of quantized layers), and without a delegate
    the other way round, as a product with plain operators wants it. int4 is packed two to a
    byte, the even column low, as XNNPACK wants a linear's weight; an embedding's even column is the high half.
    """
    digests: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{kind}"
            if hasattr(parameter, "qdata"):
                digests[full] = [_sha256(packed) for packed in _packings(parameter)]
                digests[f"{full}.scale"] = [_sha256(parameter.scale), _sha256(parameter.scale.float())]
            else:
                forms = [parameter.data, parameter.data.t()] if parameter.dim() == 2 else [parameter.data]
                digests[full] = [_sha256(form) for tensor in forms for form in (tensor, tensor.float())]
    return digests


def _packings(parameter: Tensor) -> list[Tensor]:
    integers = parameter.qdata  # type: ignore[attr-defined]
    if parameter.target_dtype != torch.int4:  # type: ignore[attr-defined]
        return [integers]
    unsigned = (integers + 8).to(torch.uint8)
    even, odd = unsigned[:, ::2], unsigned[:, 1::2]
    return [odd << 4 | even, even << 4 | odd]


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()
