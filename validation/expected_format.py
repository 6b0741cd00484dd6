"""What the bytes of a program must show, worked out from its recipe and its model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from model import DreamEdge, DreamEdgeConfig
from model.cache import cache_shape
from model.dream import rope_cos_sin
from recipes.options import Attention, Backend, LinearQuant, Recipe
from recipes.packing import tensor_sha256
from recipes.quantization import linear_bytes, quant_of, weight_type
from recipes.stored import Weights
from validation.format import ExpectedFormat


def expected_format(
    weights: Weights, recipe: Recipe, max_seq_len: int, max_rows: int, metadata: dict[str, Any]
) -> ExpectedFormat:
    """What the bytes of the program must show for this recipe and this quantized model."""
    config = weights.model.config
    with torch.device("meta"):
        linears = {name: m for name, m in DreamEdge(config).named_modules() if isinstance(m, nn.Linear)}
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    quants = {name: quant_of(name, recipe.linear) for name in shapes}
    D, S, d = config.hidden_size, max_seq_len, config.head_dim
    itemsize = getattr(torch, recipe.dtype.value).itemsize
    return ExpectedFormat(
        weight_types=tuple(dict.fromkeys([*recipe.weight_types, *(weight_type(q) for q in quants.values() if q)])),
        outside_ops=tuple(recipe.outside_ops),
        linear_shapes=tuple(shapes.values()),
        helper_shapes=((1, D), (d, d)) if recipe.backend is Backend.xnnpack else (),
        weights=weights.digests | constant_digests(config, S, recipe),
        bytes_per_weight=ideal_bytes_per_weight(shapes, quants, itemsize),
        planned_memory=recipe.bounds.planned_memory * largest_plan(config, recipe.attention, S, max_rows, itemsize),
        metadata=metadata,
    )


def largest_plan(config: DreamEdgeConfig, attention: Attention, S: int, max_rows: int, itemsize: int) -> int:
    """Bytes that a plan may have room for at once: the caches, and the tensors between delegates where they are most.

    How well the planner packs them is no formula: it never cuts the room of a tensor for two that live longer. Of 150
    drawn shapes most stayed below this, and the worst, of one head and small layers, took 1.26 times as much.
    """
    kv = config.num_key_value_heads * config.head_dim
    caches = 2 * config.num_hidden_layers * math.prod(cache_shape(config, 1, S)) * itemsize
    stream = S * (config.hidden_size + kv) * itemsize
    logits = 4 * max_rows * config.vocab_size
    if attention is Attention.delegated:
        # All of a layer is in one delegate, but for what is written to the caches and what is read from them.
        return caches + max(logits, 4 * stream) + 2 * stream
    mlp = 4 * S * config.intermediate_size * itemsize
    if attention is Attention.custom_sdpa:
        logits += 2 * max_rows * config.vocab_size * (itemsize == 2)  # before they are float32
        return caches + max(logits, mlp, 5 * stream) + 2 * stream
    # Caches are written as new tensors, and copied back at the end; scores are there before the softmax, in it, after.
    scores = 3 * config.num_attention_heads * S * S * itemsize
    return 2 * caches + 10 * stream + max(scores, mlp, 2 * logits)


def constant_digests(config: DreamEdgeConfig, max_seq_len: int, recipe: Recipe) -> dict[str, list[str]]:
    """sha256 of what no checkpoint file holds: the tables that turn queries and keys, and the norms' eps."""
    dtype = getattr(torch, recipe.dtype.value)
    cos_1S1d, sin_1S1d = rope_cos_sin(config, torch.arange(max_seq_len)[None], dtype)
    constants = {"rope.cos": cos_1S1d, "rope.sin": sin_1S1d}
    if recipe.backend is Backend.xnnpack:  # elsewhere it is no constant, but an argument
        constants["norms.eps"] = torch.tensor(config.rms_norm_eps, dtype=torch.float32)
    return {name: [tensor_sha256(constant)] for name, constant in constants.items()}


def ideal_bytes_per_weight(
    shapes: dict[str, tuple[int, int]], quants: dict[str, LinearQuant | None], itemsize: int
) -> float:
    """Of the linear layers, by name, with their scales."""
    n_bytes = 0.0
    for name, (rows, columns) in shapes.items():
        quant = quants[name]
        if quant is None:
            n_bytes += itemsize * rows * columns
        else:
            n_bytes += linear_bytes(rows, columns, quant)
    return n_bytes / sum(rows * columns for rows, columns in shapes.values())
