"""Stage 2: the float model to the recipe's, in place, one module at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from model import DreamEdge
from pipeline.errors import RecipeError
from pipeline.load import Loaded
from recipes.blocks import Recipe
from recipes.quantization import QuantizationError, quantize_model


@dataclass(frozen=True)
class Quantized:
    """model: runs in eager as the program shall run on the device."""

    model: DreamEdge
    recipe: Recipe


def quantize(loaded: Loaded, recipe: Recipe, report: Callable[[str], None]) -> Quantized:
    """Raises `RecipeError` that names the layers whose sizes do not fit. `loaded.model` is used up."""
    try:
        for step in quantize_model(loaded.model, recipe.dtype, recipe.linear, recipe.embedding):
            report(f"{step.done}/{step.total} {step.name}")
    except QuantizationError as error:
        raise RecipeError(f"recipe {recipe.name} on {loaded.folder}: {error}") from error
    return Quantized(loaded.model, recipe)
