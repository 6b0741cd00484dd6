"""Quantization with torchao, one module at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import Granularity, PerAxis, PerGroup

from model import DreamEdge
from recipes.blocks import Dtype, EmbeddingQuant, LinearQuant


class QuantizationError(ValueError):
    """A recipe that cannot be applied to this model. Names each layer and says why."""


@dataclass(frozen=True)
class Progress:
    done: int
    total: int
    name: str


def quantize_model(
    model: DreamEdge, dtype: Dtype, linear: LinearQuant | None, embedding: EmbeddingQuant | None
) -> Iterator[Progress]:
    """Quantize `model` in place, yielding after each module; what stays float gets `dtype`.

    Weights may be mappings of a checkpoint file: only one module at a time is held in float. A tied output
    layer is untied where the two are quantized differently. Raises `QuantizationError` before anything is changed.
    """
    _check_sizes(model, linear, embedding)
    if linear is not None or embedding is not None:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.data, requires_grad=False)
    modules = [(name, m) for name, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]
    tied = model.lm_head.weight is model.embed_tokens.weight
    for done, (name, module) in enumerate(modules, start=1):
        module.to(getattr(torch, dtype.value))
        if isinstance(module, nn.Linear) and linear is not None:
            quantize_(module, linear_config(linear))
        elif isinstance(module, nn.Embedding) and embedding is not None:
            quantize_(module, embedding_config(embedding), filter_fn=lambda m, _: isinstance(m, nn.Embedding))
        yield Progress(done, len(modules), name)
    if tied:
        model.lm_head.weight = model.embed_tokens.weight


def linear_config(quant: LinearQuant) -> Int8DynamicActivationIntxWeightConfig:
    # XNNPACK keeps group scales in bfloat16: torchao must choose the integers for those same scales, or
    # eager and program differ in every weight (measured on one MLP: 44 dB in place of 131).
    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=_int_dtype(quant.weight_bits),
        weight_granularity=_granularity(quant.group_size),
        weight_scale_dtype=torch.bfloat16 if quant.group_size else None,
    )


def embedding_config(quant: EmbeddingQuant) -> IntxWeightOnlyConfig:
    return IntxWeightOnlyConfig(weight_dtype=_int_dtype(quant.weight_bits), granularity=_granularity(quant.group_size))


def _int_dtype(bits: int) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, f"int{bits}")
    return dtype


def _granularity(group_size: int | None) -> Granularity:
    return PerGroup(group_size) if group_size else PerAxis(0)


def _check_sizes(model: DreamEdge, linear: LinearQuant | None, embedding: EmbeddingQuant | None) -> None:
    wrong = []
    if linear is not None:
        # Weight-only and other combinations lower without an error to programs that compute garbage.
        if (linear.weight_bits, linear.group_size is None) not in ((4, False), (8, True)):
            raise QuantizationError(
                "linear: XNNPACK computes 4-bit weights in groups, or 8-bit weights per channel (group_size null); "
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
    if wrong:
        raise QuantizationError("sizes that cannot be quantized: " + "; ".join(wrong))
