"""Stage 4: the exported program to a `.pte` file."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.display import Report, silent
from pipeline.export import Exported
from pipeline.quantize import Quantized
from recipes.lowering import lower_program
from recipes.partitions import UnlikeError
from recipes.static_program import export_program
from runtime.errors import RecipeError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lowered:
    pte: Path
    max_seq_len: int
    max_rows: int
    metadata: dict[str, Any]


def lower(exported: Exported, quantized: Quantized, pte: Path, report: Report = silent) -> Lowered:
    """Raises `RecipeError` where the backend refuses the recipe, and `OSError` from writing."""
    recipe = quantized.recipe
    try:
        asked = (recipe.backend, exported.constant_methods, quantized.weights, report)
        try:
            program = lower_program(exported.program, *asked, exported.left_out)
        except UnlikeError as error:
            log.warning("each layer is lowered by itself, which takes longer: %s", error)
            program = lower_program(export_program(exported.left_out.program, exported.max_rows), *asked)
    except Exception as error:
        raise RecipeError(f"recipe {recipe.name} cannot be lowered: {_first_line(error)}") from error
    report("writing")
    with pte.open("wb") as file:
        program.write_to_file(file)
    quantized.weights.release()
    return Lowered(pte, exported.max_seq_len, exported.max_rows, exported.constant_methods)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
