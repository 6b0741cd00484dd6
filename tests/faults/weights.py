"""Faults of weights: each changes the quantized model that is exported, and not the one that it is held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model import DreamEdge
from recipes.options import LinearQuant, Recipe
from recipes.quantization import quantize_model, quantize_module
from tests.faults.network import LAYER

Change = Callable[[DreamEdge, Recipe], None]


def quantized(model: DreamEdge, name: str) -> Any:
    """torchao's tensor of one matrix of layer `LAYER`."""
    return model.get_submodule(f"layers.{LAYER}.{name}").weight.data


def scale_doubled(model: DreamEdge, _: Recipe) -> None:
    quantized(model, "mlp.up_proj").scale[3, 0] *= 2


def block_zeroed(model: DreamEdge, _: Recipe) -> None:
    quantized(model, "self_attn.v_proj").qdata[5, :32] = 0


def nibbles_swapped(model: DreamEdge, _: Recipe) -> None:
    """The two weights of each byte of a matrix."""
    integers: Tensor = quantized(model, "mlp.down_proj").qdata
    integers.copy_(integers.view(len(integers), -1, 2).flip(-1).reshape(integers.shape))


def transposed(model: DreamEdge, _: Recipe) -> None:
    """A square matrix: no shape tells."""
    integers: Tensor = quantized(model, "self_attn.q_proj").qdata
    assert integers.shape[0] == integers.shape[1]
    integers.copy_(integers.t().clone())


def of_another_checkpoint(model: DreamEdge, recipe: Recipe) -> None:
    generator = torch.Generator().manual_seed(1)
    other = DreamEdge(model.config)
    for parameter in other.parameters():
        if parameter.dim() == 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    quantize_model(other, recipe.dtype, recipe.linear, recipe.embedding)
    for name, parameter in list(other.named_parameters()):
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, parameter)


def nan_in_a_scale(model: DreamEdge, _: Recipe) -> None:
    quantized(model, "mlp.gate_proj").scale[7] = torch.nan


def nan_in_a_row(model: DreamEdge, _: Recipe) -> None:
    model.get_parameter(f"layers.{LAYER}.mlp.down_proj.weight").data[7] = torch.nan


def lm_head_quantized(model: DreamEdge, recipe: Recipe) -> None:
    quantize_module("lm_head", model.lm_head, recipe.dtype, LinearQuant(weight_bits=8, group_size=None), None)
