"""Exporting from Python."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from model import DreamEdge
from pipeline.config import load_recipe
from pipeline.export import export
from pipeline.lower import lower
from pipeline.quantize import Quantized
from pipeline.schema import ExportConfig
from recipes.quantization import QuantizationError, quantize_model
from recipes.stored import in_memory, rewrite
from runtime.errors import RecipeError
from runtime.program import Program

RECIPES = {None: "fp32_xnnpack", "fp16": "fp16_xnnpack", "int8": "int8_xnnpack", "int4": "int4_xnnpack"}


def export_model(
    model: DreamEdge,
    example_inputs: tuple[Tensor, ...],
    output_path: str | os.PathLike[str],
    quantization: Literal["fp16", "int8", "int4"] | None = None,
) -> Path:
    """Write `model` as a `.pte` by the recipe of that name (`conf/recipe/`), and run it once.

    example_inputs: (input_ids,), int64 [1, T]: the new program runs on them, and has to give finite logits.
    The model is left as it is; a copy is quantized. The full validation is `python -m pipeline run`.

    Raises `ValueError` for inputs or a quantization that do not exist, `runtime.errors.RecipeError` where the
    recipe does not fit the model. Nothing is written then.
    """
    if quantization not in RECIPES:
        raise ValueError(f"quantization must be None, 'fp16', 'int8' or 'int4', got {quantization!r}")
    if not example_inputs or example_inputs[0].dim() != 2 or example_inputs[0].shape[0] != 1:
        raise ValueError("example_inputs must be (input_ids,) with input_ids int64 [1, T]")
    recipe = load_recipe(RECIPES[quantization])
    output = Path(output_path)
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    try:
        rewrite(twin, recipe)
        quantize_model(twin, recipe.dtype, recipe.linear, recipe.embedding)
    except QuantizationError as error:
        raise RecipeError(f"recipe {recipe.name}: {error}") from error
    quantized = Quantized(in_memory(twin, recipe.backend), recipe)
    exported = export(quantized, ExportConfig())
    with tempfile.TemporaryDirectory(dir=output.resolve().parent) as folder:
        pte = Path(folder) / output.name
        lower(exported, quantized, pte)
        tokens = example_inputs[0][0]
        logits = Program.open(pte).forward(tokens, 0, len(tokens))
        if not torch.isfinite(logits).all():
            raise RecipeError(f"recipe {recipe.name}: the program gives logits that are not finite")
        pte.replace(output)
    return output
