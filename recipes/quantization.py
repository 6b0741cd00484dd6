"""Quantization with torchao, one slice of one weight at a time."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
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
from torchao.quantization.quantize_.workflows.intx.intx_choose_qparams_algorithm import IntxChooseQParamsAlgorithm
from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
    IntxUnpackedToInt8TensorActivationQuantization,
)

from model import DreamEdge
from recipes.gptq import LayerInputs, gptq, scale_of
from recipes.options import Dtype, EmbeddingQuant, LinearQuant, Rounding, Scales
from recipes.threads import by_slices


class QuantizationError(ValueError):
    """A recipe that cannot be applied to this model. Names each layer and says why."""


SLICE = 2**19  # weights that are quantized at once: their float32 temporaries stay in a processor cache
INT8_ACTIVATIONS = IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN
InputsByLayer = Mapping[str, LayerInputs]  # by the name of a linear layer, as `gptq` takes them


def quant_of(name: str, linear: LinearQuant | None) -> LinearQuant | None:
    """Of the linear layer of this name: the first rule's format that matches it, else that of all."""
    if linear is None:
        return None
    for pattern, written in linear.rules.items():
        if matches(name, pattern):
            bits, group_size = format_of(written)
            return replace(linear, weight_bits=bits, group_size=group_size)
    return linear


def matches(name: str, pattern: str) -> bool:
    """`down_proj` matches as `*.down_proj` does."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def format_of(written: str) -> tuple[int, int | None]:
    """(bits, group size) of int8, int4, int4_64, int4_channel. Raises `QuantizationError`."""
    found = re.fullmatch(r"int8|int4(?:_(channel|\d{1,6}))?", written)
    if found is None:
        raise QuantizationError(
            f"linear.rules: no format {written!r}; there are int8, int4, int4_64 and other sizes, int4_channel"
        )
    if written == "int8":
        return 8, None
    return 4, None if found[1] == "channel" else int(found[1] or 32)


def weight_type(quant: LinearQuant) -> str:
    """As XNNPACK names it."""
    return "qcint8" if quant.weight_bits == 8 else "qbint4"  # one scale a channel is a block as wide as the matrix


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
    for name, module in model.named_modules():
        quantize_module(name, module, dtype, linear, embedding)
    if tied:
        model.lm_head.weight = model.embed_tokens.weight


def quantize_module(
    name: str,
    module: nn.Module,
    dtype: Dtype,
    linear: LinearQuant | None,
    embedding: EmbeddingQuant | None,
    layer_inputs: InputsByLayer | None = None,
) -> None:
    """The parameters of `module` itself, not of its children, in place.

    layer_inputs: for `gptq`; without them each weight goes to the nearest.
    """
    kind = getattr(torch, dtype.value)
    quant: LinearQuant | EmbeddingQuant | None = None
    if isinstance(module, nn.Linear):
        quant = quant_of(name, linear)
    elif isinstance(module, nn.Embedding):
        quant = embedding
    for leaf, parameter in list(module.named_parameters(recurse=False)):
        if leaf != "weight" or quant is None:
            made = parameter.to(kind)
        elif isinstance(quant, EmbeddingQuant):
            made = _by_torchao(parameter, kind, embedding_config(quant))
        elif quant.rounding is Rounding.gptq and layer_inputs is not None:
            fitted = quant.scales is Scales.least_squares
            found = gptq(parameter, layer_inputs[name], quant.weight_bits, quant.group_size, scale_dtype(quant), fitted)
            made = quantized_linear(*found, quant.weight_bits, kind)
        elif quant.rounding is Rounding.nearest and quant.scales is Scales.least_squares:
            made = quantized_linear(*_fitted(parameter, quant), quant.weight_bits, kind)
        else:
            made = _by_torchao(parameter, kind, linear_config(quant))
        setattr(module, leaf, nn.Parameter(made, requires_grad=False))


def quantized_linear(integers: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """As torchao makes it. integers: int8 [out, in]. scale: [out, groups]."""
    return IntxUnpackedToInt8Tensor(
        qdata=integers,
        scale=scale,
        zero_point=torch.zeros(scale.shape, dtype=torch.int8),
        target_dtype=_int_dtype(bits),
        block_size=(1, integers.shape[1] // scale.shape[1]),
        dtype=dtype,
        activation_quantization=INT8_ACTIVATIONS,
    )


def _fitted(weight: Tensor, quant: LinearQuant) -> tuple[Tensor, Tensor]:
    """(integers, scales) with the least loss by rounding, a slice at a time."""
    weight = weight.detach()  # what torch is told of gradients holds for one thread
    M, N = weight.shape
    g, top = quant.group_size or N, 2 ** (quant.weight_bits - 1)
    integers, scales = torch.empty(M, N, dtype=torch.int8), torch.empty(M, N // g, dtype=scale_dtype(quant))

    def fill(rows: slice) -> None:
        groups = weight[rows].float().reshape(-1, g)
        scale = scale_of(groups, None, quant.weight_bits, scale_dtype(quant), fitted=True)
        integers[rows] = (groups / scale.float()[:, None]).round_().clamp_(-top, top - 1).to(torch.int8).view(-1, N)
        scales[rows] = scale.view(-1, N // g)

    by_slices(M, max(1, SLICE // N), fill)
    return integers, scales


def _by_torchao(weight: Tensor, dtype: torch.dtype, config: AOBaseConfig) -> Tensor:
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
        # `quantize_` leaves the layer in a cycle: of a large vocabulary all slices together, 1.6 GiB, would wait for
        # Python's collector (findings/torchao_quantized_layer_outlives_its_name.sh).
        del linear.weight
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
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY
        if quant.rounding is Rounding.hqq
        else IntxChooseQParamsAlgorithm.AFFINE,
    )


def scale_dtype(quant: LinearQuant) -> torch.dtype:
    return torch.bfloat16 if quant.weight_bits == 4 else torch.float32


def linear_bytes(rows: int, columns: int, quant: LinearQuant) -> float:
    """Of a matrix in a program, with its scales."""
    scales = rows * (columns // quant.group_size if quant.group_size else 1)
    return rows * columns * quant.weight_bits / 8 + scales * scale_dtype(quant).itemsize


def embedding_config(quant: EmbeddingQuant) -> IntxWeightOnlyConfig:
    return IntxWeightOnlyConfig(weight_dtype=_int_dtype(quant.weight_bits), granularity=_granularity(quant.group_size))


def _int_dtype(bits: int) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, f"int{bits}")
    return dtype


def _granularity(group_size: int | None) -> Granularity:
    return PerGroup(group_size) if group_size else PerAxis(0)


def check_sizes(model: DreamEdge, linear: LinearQuant | None, embedding: EmbeddingQuant | None) -> None:
    """Raises `QuantizationError` that names layers that do not fit."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    _check_rules(names, linear)
    wrong = []
    for quant in {_format(quant_of(name, linear)) for name in names}:
        # Weight-only and other combinations lower without an error to programs that compute garbage.
        if quant is not None and (quant[0] not in (4, 8) or (quant[0] == 8 and quant[1] is not None)):
            raise QuantizationError(
                "linear: XNNPACK computes 4-bit weights in groups, 4-bit or 8-bit ones per channel (group_size null); "
                f"got weight_bits {quant[0]}, group_size {quant[1]}"
            )
        if quant is not None and quant[1] is not None and (quant[1] < 32 or quant[1] % 32):
            raise QuantizationError(f"linear: group_size must be a multiple of 32 for XNNPACK, got {quant[1]}")
    if embedding is not None and embedding.weight_bits not in (4, 8):
        raise QuantizationError(f"embedding: weight_bits must be 4 or 8, got {embedding.weight_bits}")
    for name, module in model.named_modules():
        quant_here: LinearQuant | EmbeddingQuant | None
        if isinstance(module, nn.Linear):
            quant_here, width = quant_of(name, linear), module.in_features
        elif isinstance(module, nn.Embedding):
            quant_here, width = embedding, module.embedding_dim
        else:
            continue
        if quant_here is not None and quant_here.group_size and width % quant_here.group_size:
            wrong.append(f"{name} is {width} wide, not a multiple of group_size {quant_here.group_size}")
        elif isinstance(module, nn.Linear) and quant_here and quant_here.weight_bits == 4 and width % 32:
            wrong.append(f"{name} is {width} wide, not a multiple of 32, as 4-bit weights must be")
    if wrong:
        more = f"; and {len(wrong) - 3} others" if len(wrong) > 3 else ""
        raise QuantizationError("sizes that cannot be quantized: " + "; ".join(wrong[:3]) + more)


def _check_rules(names: list[str], linear: LinearQuant | None) -> None:
    """Raises `QuantizationError` for rules that name no layer, or a format that is none."""
    for pattern, written in (linear.rules if linear is not None else {}).items():
        format_of(written)
        if not any(matches(name, pattern) for name in names):
            kinds = list(dict.fromkeys([*(name.rpartition(".")[2] for name in names), *names]))
            close = difflib.get_close_matches(pattern, kinds, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(kinds[:8])}"
            raise QuantizationError(f"linear.rules: {pattern!r} matches no linear layer{hint}")


def _format(quant: LinearQuant | None) -> tuple[int, int | None] | None:
    return (quant.weight_bits, quant.group_size) if quant is not None else None
