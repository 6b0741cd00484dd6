"""Stage 3: the model to an exported program with a static cache and a dynamic length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from model import DreamEdgeConfig
from pipeline.quantize import Quantized
from pipeline.schema import ExportConfig
from recipes.equal_layers import LeftOut, runs_of, shortened
from recipes.static_program import StaticProgram, export_program, metadata
from runtime.errors import RecipeError

LOGITS_BYTES = 2**26  # a program plans memory for the logits of max_rows rows: 110 of Dream-7B's vocabulary
MIN_LENGTH = 4  # shorter programs have no room for the calls that validate them


@dataclass(frozen=True)
class Exported:
    """program: without layers that become like others, which lowering puts back (`left_out`).

    constant_methods: the metadata that travels in the program.
    """

    program: torch.export.ExportedProgram
    left_out: LeftOut
    constant_methods: dict[str, Any]
    max_seq_len: int
    max_rows: int


def lengths(config: DreamEdgeConfig, export: ExportConfig) -> tuple[int, int]:
    """(max_seq_len, max_rows). Raises `RecipeError` for lengths that the model cannot have."""
    max_seq_len = export.max_seq_len if export.max_seq_len is not None else config.max_seq_len
    if not MIN_LENGTH <= max_seq_len <= config.max_position_embeddings:
        raise RecipeError(
            f"export.max_seq_len {max_seq_len}: must be from {MIN_LENGTH} to {config.max_position_embeddings}, "
            "the positions that the model knows (max_position_embeddings)"
        )
    fitting = max(MIN_LENGTH, LOGITS_BYTES // (4 * config.vocab_size))
    max_rows = export.max_rows if export.max_rows is not None else min(max_seq_len, fitting)
    if not MIN_LENGTH <= max_rows <= max_seq_len:
        raise RecipeError(f"export.max_rows {max_rows}: must be from {MIN_LENGTH} to max_seq_len, {max_seq_len}")
    return max_seq_len, max_rows


def export(quantized: Quantized, settings: ExportConfig) -> Exported:
    model, recipe = quantized.weights.model, quantized.recipe
    max_seq_len, max_rows = lengths(model.config, settings)
    program = StaticProgram(model, max_seq_len, recipe.backend, recipe.attention)
    left_out = LeftOut(program, runs_of(program))
    return Exported(
        program=export_program(shortened(program, left_out.runs), max_rows),
        left_out=left_out,
        constant_methods=metadata(model, max_seq_len, max_rows, recipe.attention),
        max_seq_len=max_seq_len,
        max_rows=max_rows,
    )
