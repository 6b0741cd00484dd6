"""A right artifact, programs made with one thing wrong, and what validation says of them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import DreamEdge, load_hf_model
from pipeline.commands.validate import config_of, same_export
from recipes.lowering import lower_program
from recipes.options import Recipe
from recipes.quantization import quantize_model
from recipes.static_program import StaticProgram, export_program, metadata
from recipes.stored import Weights, in_memory
from runtime.artifact import MODEL_FILE, REFERENCE_FILE, ArtifactError, read_manifest
from runtime.errors import BadArtifactError
from runtime.program import ProgramError
from tests.resealing import reseal
from validation.arm import figures_of, replay_on_cores
from validation.figure import Figure
from validation.judge import expectations, measure
from validation.reference import Reference, ReferenceError, load_reference
from validation.wrong_layers import name_wrong_layer

# What stands in place of a figure where there is none.
FOLDER, RUNTIME = "artifact", "runtime"


@dataclass(frozen=True)
class Right:
    """An artifact as it should be, and the quantized model that it was made of, which nobody changes."""

    artifact: Path
    checkpoint: Path
    recipe: Recipe
    model: DreamEdge
    weights: Weights
    reference: Reference
    max_seq_len: int
    max_rows: int


@dataclass(frozen=True)
class Verdict:
    """checks: the figures out of bounds, or `FOLDER` or `RUNTIME` where it did not come to figures.

    says: all that a user reads of it.
    """

    checks: tuple[str, ...]
    says: str


def right(artifact: Path, checkpoint: Path) -> Right:
    config = config_of(artifact, manifest := read_manifest(artifact))
    model = quantized(checkpoint, config.recipe)
    return Right(
        artifact=artifact,
        checkpoint=checkpoint,
        recipe=config.recipe,
        model=model,
        weights=in_memory(model, config.recipe.backend),
        reference=load_reference(artifact / REFERENCE_FILE),
        max_seq_len=manifest["export"]["max_seq_len"],
        max_rows=manifest["export"]["max_rows"],
    )


def quantized(checkpoint: Path, recipe: Recipe) -> DreamEdge:
    model, _, _ = load_hf_model(checkpoint, dtype=None)
    quantize_model(model, recipe.dtype, recipe.linear, recipe.embedding)
    return model


def export_with(
    right: Right,
    pte: Path,
    program: Callable[[StaticProgram], None] = lambda _: None,
    weights: Callable[[DreamEdge, Recipe], None] = lambda _, __: None,
    max_seq_len: int = 0,
    max_rows: int = 0,
    export: Callable[[StaticProgram, int], Any] = export_program,
    methods: dict[str, Any] | None = None,
) -> None:
    """Write the program that the recipe makes, but for what is given. `methods` say otherwise only if told to."""
    recipe, model = right.recipe, copy.deepcopy(right.model)
    weights(model, recipe)
    exported = StaticProgram(model, max_seq_len or right.max_seq_len, recipe.backend, recipe.attention)
    program(exported)
    constant_methods = metadata(model, right.max_seq_len, right.max_rows, recipe.attention) | (methods or {})
    made = lower_program(export(exported, max_rows or right.max_rows), recipe.backend, constant_methods)
    with pte.open("wb") as file:
        made.write_to_file(file)


def judge_program(right: Right, pte: Path) -> Verdict:
    """As the validate stage judges what was lowered, and `validate checkpoint=` what it exports once more."""
    bounds, expected = expectations(right.artifact, read_manifest(right.artifact))
    try:
        measured = measure(pte, right.artifact / REFERENCE_FILE, right.reference, bounds, expected)
    except ProgramError as error:
        return Verdict((RUNTIME,), str(error))
    figures = name_wrong_layer(measured.figures, pte, right.weights, right.reference, right.recipe.bounds)
    figures.append(same_export(right.artifact / MODEL_FILE, pte))
    return verdict_on(figures)


def verdict_on(figures: list[Figure]) -> Verdict:
    wrong = [figure for figure in figures if not figure.ok]
    return Verdict(tuple(figure.name for figure in wrong), "; ".join(map(str, wrong)))


def judge_on_arm(right: Right, pte: Path, folder: Path, runner: Path) -> Verdict:
    """As `validate target=arm64` does, of an artifact whose digests are right. folder: is made."""
    copied(right, folder)
    shutil.copy(pte, folder / MODEL_FILE)
    reseal(folder)
    try:
        figures = figures_of(replay_on_cores(folder, ["cortex-a53"], str(runner)))
    except BadArtifactError as error:
        return Verdict((RUNTIME,), str(error))
    return verdict_on(figures)


def judge_folder(artifact: Path) -> Verdict:
    """As `validate` begins."""
    try:
        read_manifest(artifact)
    except (ArtifactError, ReferenceError) as error:
        return Verdict((FOLDER,), str(error))
    return Verdict((), "")


def copied(right: Right, folder: Path) -> Path:
    shutil.copytree(right.artifact, folder)
    return folder
