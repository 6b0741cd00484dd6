"""`validate`: an artifact again, by itself or against its checkpoint."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from pipeline.config import ROOT, ExportConfig, RunConfig, TaskConfig, ValidationConfig
from pipeline.display import Display
from pipeline.errors import BadArtifactError, InputError
from pipeline.export import export
from pipeline.load import load
from pipeline.lower import lower
from pipeline.quantize import quantize
from pipeline.record import check_settings
from pipeline.validate import Solved, share_solved, solved_figure, validate
from recipes.blocks import Recipe
from runtime.artifact import (
    MANIFEST_FILE,
    REFERENCE_FILE,
    ArtifactError,
    check_artifact,
    read_manifest,
    sha256,
)
from runtime.figures import Figure
from runtime.program import MODEL_FILE, ProgramError
from runtime.reference import ReferenceError, load_reference


def revalidate(artifact: Path, checkpoint: Path | None, display: Display) -> list[Figure]:
    """Every figure anew. With the checkpoint eager's outputs too, and the export is repeated byte for byte.

    Raises `BadArtifactError`, `InputError` for a checkpoint that is not the artifact's.
    """
    try:
        manifest = read_manifest(artifact)
        if checkpoint is not None:
            return _against_checkpoint(artifact, manifest, checkpoint, display)
        with display.stage("validate"):
            measured = check_artifact(artifact)
        task = load_reference(artifact / REFERENCE_FILE).task
        if task is None:
            return measured.figures
        recorded = manifest["solved"]
        assert measured.replay.answers is not None
        share = share_solved(artifact, recorded["task"], task, measured.replay.answers)
        solved = Solved(recorded["task"], recorded["n"], recorded["float32"], share)
        return [*measured.figures, solved_figure(solved, manifest["recipe"]["bounds"]["solved_drop"])]
    except (ArtifactError, ProgramError, ReferenceError) as error:
        raise BadArtifactError(str(error)) from error
    except (KeyError, TypeError, ValueError) as error:
        # What a changed manifest can make go wrong anywhere above.
        raise BadArtifactError(
            f"{artifact / MANIFEST_FILE}: not a manifest: {type(error).__name__}: {error}"
        ) from error


def _against_checkpoint(artifact: Path, manifest: dict[str, Any], checkpoint: Path, display: Display) -> list[Figure]:
    config = _config_of(artifact, manifest)
    check_settings(config.task, config.validation)
    with display.stage("load"):
        loaded = load(checkpoint)
        if loaded.digests != manifest["checkpoint"]["sha256"]:
            raise InputError(f"{checkpoint} is not the checkpoint that {artifact} was made of: its sha256 differ")
    with display.stage("quantize") as report:
        quantized = quantize(loaded, config.recipe, report)
    with display.stage("export"):
        exported = export(quantized, config.export)
    with tempfile.TemporaryDirectory() as folder:
        with display.stage("lower"):
            again = lower(exported, config.recipe, Path(folder) / MODEL_FILE)
        same = sha256(again.pte) == sha256(artifact / MODEL_FILE)
        repeated = Figure("repeatability", "exports_that_differ", int(not same), 0, False, "this export, byte for byte")
        with display.stage("validate") as report:
            given = replace(again, pte=artifact / MODEL_FILE)
            reference_file = Path(folder) / REFERENCE_FILE
            validated = validate(given, quantized, loaded, config.task, config.validation, reference_file, report)
    return [*validated.figures, repeated]


def _config_of(artifact: Path, manifest: dict[str, Any]) -> RunConfig:
    """The configuration that the artifact was made with, checked against the types as any other."""
    try:
        task = dict(manifest["task"])
        if task["prompts"] is not None:
            task["prompts"] = str(ROOT / "assets" / "tasks" / Path(task["prompts"]).name)
        parts = [
            (Recipe, manifest["recipe"]),
            (TaskConfig, task),
            (ExportConfig, manifest["export"]),
            (ValidationConfig, manifest["validation"]),
        ]
        recipe, task_config, export_config, validation = (
            OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values)) for schema, values in parts
        )
    except Exception as error:
        raise BadArtifactError(f"{artifact / MANIFEST_FILE}: not a manifest: {error}") from error
    return RunConfig(
        recipe=cast(Recipe, recipe),
        task=cast(TaskConfig, task_config),
        export=cast(ExportConfig, export_config),
        validation=cast(ValidationConfig, validation),
    )
