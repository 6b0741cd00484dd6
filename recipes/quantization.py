"""Quantization with torchao, one slice of one weight at a time."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import Granularity, PerAxis, PerGroup

from model import DreamEdge
from recipes.options import Dtype, EmbeddingQuant, LinearQuant


class QuantizationError(ValueError):
    """A recipe that cannot be applied to this model. Names each layer and says why."""


SLICE = 2**19  # weights that are quantized at once: their float32 temporaries stay in a processor cache


def quantize_model(
    model: DreamEdge, dtype: Dtype, linear: LinearQuant | None, embedding: EmbeddingQuant | None
) -> None:
    """Quantize `model` in place, in memory; what stays float gets `dtype`.

    A tied output layer is untied where anything is quantized. Raises `QuantizationError` before anything is changed.
    """
    check_sizes(model, linear, embedding)
    tied = model.lm_head.weight is model.embed_tokens.weight
    if linear is not None or embedding is not None:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.data, requires_grad=False)
        tied = False
    for module in model.modules():
        quantize_module(module, dtype, linear, embedding)
    if tied:
        model.lm_head.weight = model.embed_tokens.weight


def quantize_module(
    module: nn.Module, dtype: Dtype, linear: LinearQuant | None, embedding: EmbeddingQuant | None
) -> None:
    """The parameters of `module` itself, not of its children, in place."""
    kind = getattr(torch, dtype.value)
    config: AOBaseConfig | None = None
    if isinstance(module, nn.Linear) and linear is not None:
        config = linear_config(linear)
    elif isinstance(module, nn.Embedding) and embedding is not None:
        config = embedding_config(embedding)
    for name, parameter in list(module.named_parameters(recurse=False)):
        made = _quantized(parameter, kind, config) if name == "weight" and config is not None else parameter.to(kind)
        setattr(module, name, nn.Parameter(made, requires_grad=False))


def _quantized(weight: Tensor, dtype: torch.dtype, config: AOBaseConfig) -> Tensor:
    """Rows do not know of each other: a slice at a time, so that no float copy of a large matrix is ever there."""
    rows = max(1, SLICE // weight.shape[1])
    whole: dict[str, Tensor] = {}
    attributes: dict[str, Any] = {}
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows]
        linear = nn.Linear(part.shape[1], part.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(part.to(dtype), requires_grad=False)
        quantize_(linear, config)
        quantized = cast(IntxUnpackedToInt8Tensor, linear.weight)
        attributes = {name: getattr(quantized, name) for name in quantized.tensor_attribute_names}
        for name in quantized.tensor_data_names:
            made = getattr(quantized, name)
            # Small results between large temporaries would leave the heap in holes: there is one place for all.
            into = whole.setdefault(name, made.new_empty(len(weight), *made.shape[1:]))
            into[start : start + rows] = made
    return IntxUnpackedToInt8Tensor(**whole, **attributes)


def linear_config(quant: LinearQuant) -> Int8DynamicActivationIntxWeightConfig:
    # XNNPACK keeps group scales in bfloat16: torchao must choose the integers for those same scales, or
    # eager and program differ in every weight (measured on one MLP: 44 dB in place of 131).
    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=_int_dtype(quant.weight_bits),
        weight_granularity=_granularity(quant.group_size),
        weight_scale_dtype=torch.bfloat16 if quant.weight_bits == 4 else None,
    )


def embedding_config(quant: EmbeddingQuant) -> IntxWeightOnlyConfig:
    return IntxWeightOnlyConfig(weight_dtype=_int_dtype(quant.weight_bits), granularity=_granularity(quant.group_size))


def _int_dtype(bits: int) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, f"int{bits}")
    return dtype


def _granularity(group_size: int | None) -> Granularity:
    return PerGroup(group_size) if group_size else PerAxis(0)


def check_sizes(model: DreamEdge, linear: LinearQuant | None, embedding: EmbeddingQuant | None) -> None:
    wrong = []
    if linear is not None:
        # Weight-only and other combinations lower without an error to programs that compute garbage.
        if linear.weight_bits not in (4, 8) or (linear.weight_bits == 8 and linear.group_size is not None):
            raise QuantizationError(
                "linear: XNNPACK computes 4-bit weights in groups, 4-bit or 8-bit ones per channel (group_size null); "
                f"got weight_bits {linear.weight_bits}, group_size {linear.group_size}"
            )
        if linear.group_size is not None and (linear.group_size < 32 or linear.group_size % 32):
            raise QuantizationError(f"linear: group_size must be a multiple of 32 for XNNPACK, got {linear.group_size}")
    if embedding is not None and embedding.weight_bits not in (4, 8):
        raise QuantizationError(f"embedding: weight_bits must be 4 or 8, got {embedding.weight_bits}")
    for name, module in model.named_modules():
        quant: LinearQuant | EmbeddingQuant | None
        if isinstance(module, nn.Linear):
            quant, width = linear, module.in_features
        elif isinstance(module, nn.Embedding):
            quant, width = embedding, module.embedding_dim
        else:
            continue
        if quant is not None and quant.group_size and width % quant.group_size:
            wrong.append(f"{name} is {width} wide, not a multiple of group_size {quant.group_size}")
        elif isinstance(module, nn.Linear) and quant is not None and quant.weight_bits == 4 and width % 32:
            wrong.append(f"{name} is {width} wide, not a multiple of 32, as 4-bit weights must be")
    if wrong:
        raise QuantizationError("sizes that cannot be quantized: " + "; ".join(wrong))
