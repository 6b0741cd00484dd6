"""`validate`: an artifact again, by itself or against its checkpoint."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import OmegaConf

from evidence.baseline import against_baseline, open_baseline
from pipeline.calibrate import Calibration, calibration_of
from pipeline.config import CALIBRATION_TEXT, DEFAULT_TEXT, load_task, names_of
from pipeline.display import Display
from pipeline.export import export, lengths
from pipeline.load import LORA, Loaded, load
from pipeline.lower import lower
from pipeline.quantize import quantize
from pipeline.schema import ExportConfig, PinnedBounds, RunConfig, Target, ValidateConfig
from pipeline.validate import validate
from recipes.options import Recipe
from runtime.artifact import MANIFEST_FILE, MODEL_FILE, REFERENCE_FILE, ArtifactError, read_manifest, sha256
from runtime.errors import BadArtifactError, InputError, OutputError, UsageError
from runtime.program import ProgramError
from runtime.tokenizer import TOKENIZER_FILE, load_tokenizer
from validation.arm import figures_of, replay_on_cores
from validation.figure import Figure
from validation.float32 import Request
from validation.judge import check_artifact, checked_number
from validation.material import material_of, task_of
from validation.products import kernels
from validation.progress import Report
from validation.reference import ReferenceError
from validation.settings import Budget, TaskConfig, ValidationConfig, check_bounds, check_settings
from validation.solved import Solved, share_solved, solved_figure

T = TypeVar("T")
CHECKS = "prompts=FILE (with a checkpoint) and checker=FILE"


def revalidate(config: ValidateConfig, display: Display) -> list[Figure]:
    """Every figure anew. With the checkpoint eager's outputs too, and the export is repeated byte for byte.

    With a baseline, figures that compare with it come last. Raises `BadArtifactError`, `InputError` for a checkpoint
    that is not the artifact's, `UsageError` for a baseline that cannot be compared.
    """
    check_bounds("bounds.", vars(config.bounds))
    artifact = Path(config.artifact)
    try:
        manifest = read_manifest(artifact)
        if config.target is Target.arm64:
            with display.stage("validate") as report:
                return pinned(_on_arm(artifact, config, report), config.bounds)
        task = _task_of(artifact, manifest, config)
        baseline = None if config.baseline is None else open_baseline(Path(config.baseline), manifest)
        if config.checkpoint is not None:
            files = (Path(config.checkpoint), config.lora, config.texts, config.calibration)
            with tempfile.TemporaryDirectory() as folder:
                figures = _against_checkpoint(artifact, manifest, task, *files, config.threads, Path(folder), display)
        else:
            with display.stage("validate") as report:
                figures = _alone(artifact, manifest, task, config.threads, report)
        figures = pinned(figures, config.bounds)
        if baseline is not None:
            with display.stage("baseline") as report:
                margins = asdict(config.margins)
                figures += against_baseline(figures, artifact / MODEL_FILE, baseline, margins, report, config.threads)
        return figures
    except OSError as error:
        raise OutputError(f"{artifact} cannot be validated: {error.strerror or error}") from error
    except (ArtifactError, ProgramError, ReferenceError) as error:
        raise BadArtifactError(str(error)) from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        # What a changed manifest can make go wrong anywhere above.
        raise BadArtifactError(
            f"{artifact / MANIFEST_FILE}: not a manifest: {type(error).__name__}: {error}"
        ) from error


def pinned(figures: list[Figure], bounds: PinnedBounds) -> list[Figure]:
    """With these bounds in place of their own. One for a figure that was not measured is not held."""
    given = {name: bound for name, bound in vars(bounds).items() if bound is not None}
    missing = given.keys() - {figure.name for figure in figures}
    return [
        *(replace(figure, bound=given.get(figure.name, figure.bound)) for figure in figures),
        *(Figure("pinned", name, math.nan, given[name], True, "not measured") for name in sorted(missing)),
    ]


def _on_arm(artifact: Path, config: ValidateConfig, report: Report) -> list[Figure]:
    for name in ("checkpoint", "baseline", "threads"):
        if getattr(config, name) is not None:
            raise UsageError(f"{name} is for target=host: on Arm the recorded calls run, and nothing else")
    return figures_of(replay_on_cores(artifact, list(config.cores), config.runner, report))


def _alone(
    artifact: Path, manifest: dict[str, Any], task: TaskConfig, threads: int | None, report: Report
) -> list[Figure]:
    measured = check_artifact(artifact, threads, report)
    if measured.reference.task is None or measured.replay.answers is None or task.checker is None:
        return measured.figures
    tokenizer = load_tokenizer(artifact)
    if tokenizer is None:
        raise BadArtifactError(f"{artifact}: no {TOKENIZER_FILE}, its task cannot be checked")
    recorded = manifest["solved"]
    share = share_solved(tokenizer, Path(task.checker), measured.reference.task, measured.replay.answers.tokens)
    allowed = manifest["budget"]["solved"]
    drop = checked_number(manifest["recipe"]["bounds"]["solved_drop"] if allowed is None else allowed)
    solved = Solved(str(recorded["task"]), int(recorded["n"]), checked_number(recorded["float32"]), share)
    return [*measured.figures, solved_figure(solved, drop)]


def _against_checkpoint(
    artifact: Path,
    manifest: dict[str, Any],
    task: TaskConfig,
    checkpoint: Path,
    lora: str | None,
    texts: str | None,
    calibration_file: str | None,
    threads: int | None,
    folder: Path,
    display: Display,
) -> list[Figure]:
    """folder: for what is made on the way."""
    config = config_of(artifact, manifest)
    if config.validation.prompts is not None:
        if texts is None:
            raise UsageError(f"{artifact} was validated on {config.validation.prompts}: give texts=FILE")
        config.validation.prompts = texts
    check_settings(task, config.validation)
    with display.stage("load"):
        loaded = load(checkpoint, lora, folder)
        check_same(loaded, artifact, manifest)
        positions, max_rows = lengths(loaded.config, config.export)
        read = (task, config.validation, positions, DEFAULT_TEXT)
        given = calibration_file or task.calibration
        calibration = same_calibration(loaded, config.recipe, manifest["calibration"], given)
        material = material_of(loaded.folder, loaded.tokenizer, loaded.config, *read)
    with display.stage("quantize") as report:
        quantized = quantize(loaded, config.recipe, folder, report, calibration)
    with display.stage("export"):
        exported = export(quantized, config.export)
    with display.stage("lower") as report:
        again = lower(exported, quantized, folder / MODEL_FILE, report)
    other = kernels() if calibration is not None and kernels() != manifest["eager"] else None
    repeated = same_export(artifact / MODEL_FILE, again.pte, other)
    with display.stage("validate") as report:
        theirs = replace(again, pte=artifact / MODEL_FILE)
        its_task = task_of(loaded.tokenizer, material.prompts, task, positions)
        request = Request(material, its_task, task.new_tokens, config.validation, positions, max_rows)
        asked = (request, config.budget, task)
        validated = validate(theirs, quantized, loaded, *asked, folder / REFERENCE_FILE, folder, report, threads)
    return [*validated.figures, repeated]


def check_same(loaded: Loaded, artifact: Path, manifest: dict[str, Any]) -> None:
    """Raises `InputError` for a checkpoint, or an adapter, that the artifact was not made of; `UsageError` for none."""
    noted = manifest["checkpoint"]["sha256"]
    here, there = (any(name.startswith(LORA) for name in digests) for digests in (loaded.digests, noted))
    if there and not here:
        raise UsageError(f"{artifact} was made with a LoRA adapter: give lora=DIR")
    if loaded.digests != noted:
        raise InputError(
            f"{loaded.folder}{' with lora' * here} is not the checkpoint that {artifact} was made of: its sha256 differ"
        )


def same_export(pte: Path, again: Path, other_kernels: dict[str, str] | None = None) -> Figure:
    """other_kernels: this processor's, where calibration sums in another order than it did for the artifact."""
    differs = int(sha256(pte) != sha256(again))
    if other_kernels is not None:
        where = f"calibrated with other kernels: {', '.join(other_kernels.values())}"
        return Figure("repeatability", "exports_that_differ", differs, None, False, where)
    return Figure("repeatability", "exports_that_differ", differs, 0, False, "this export, byte for byte")


def same_calibration(loaded: Loaded, recipe: Recipe, noted: Any, given: str | None) -> Calibration | None:
    """noted: the manifest's. Raises `UsageError` where the text that is here is another."""
    if noted is None:
        return None
    found = calibration_of(loaded, recipe, given, CALIBRATION_TEXT)
    if found is None or found.sha256 != noted["sha256"]:
        raise UsageError(f"the artifact was calibrated with another {noted['source']}: give calibration=FILE")
    return found


def _task_of(artifact: Path, manifest: dict[str, Any], config: ValidateConfig) -> TaskConfig:
    """The task that the artifact was validated with.

    Its files are those of `conf/task/`, or the user's: what a manifest names is not opened, and not run.
    """
    task = _part(artifact, TaskConfig, manifest["task"])
    known = load_task(task.name) if task.name in names_of("task") else TaskConfig()
    prompts, checker = config.prompts or known.prompts, config.checker or known.checker
    if task.n_solve and (checker is None or (config.checkpoint is not None and prompts is None)):
        raise UsageError(f"{artifact} was validated on a task {task.name!r}, which is none of conf/task: give {CHECKS}")
    return replace(task, prompts=prompts, checker=checker, calibration=known.calibration)


def config_of(artifact: Path, manifest: dict[str, Any]) -> RunConfig:
    """The configuration that the artifact was made with, checked against the types as any other."""
    return RunConfig(
        recipe=_part(artifact, Recipe, manifest["recipe"]),
        export=_part(artifact, ExportConfig, manifest["export"]),
        validation=_part(artifact, ValidationConfig, manifest["validation"]),
        budget=_part(artifact, Budget, manifest["budget"]),
    )


def _part(artifact: Path, schema: type[T], values: Any) -> T:
    """Values only: `${…}` would be resolved, and could ask for the environment."""
    try:
        if "${" in json.dumps(values):
            raise ValueError("an interpolation")
        part = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except Exception as error:
        raise BadArtifactError(f"{artifact / MANIFEST_FILE}: not a manifest: {error}") from error
    return cast(T, part)
