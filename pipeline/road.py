"""The road: six stages from a checkpoint to an artifact, to be read as a table of contents."""

from __future__ import annotations

import gc
import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from pipeline.admission import admitted
from pipeline.beside import float32_begun, reference_begun
from pipeline.calibrate import calibration_of
from pipeline.config import AUTO, CALIBRATION_TEXT, DEFAULT_TEXT, load_task, task_of_checkpoint
from pipeline.display import Display
from pipeline.estimate import Estimate, check_resources, estimate
from pipeline.export import export, lengths
from pipeline.load import Loaded, load
from pipeline.lower import lower
from pipeline.pack import pack
from pipeline.package import Packaged, package, with_cores
from pipeline.quantize import quantize
from pipeline.schema import RunConfig, Target
from pipeline.staging import place, place_failed, staging
from pipeline.validate import validate
from recipes.exporter import garbage_of_now_only
from recipes.stored import Weights
from report.report_json import noise_of
from runtime.artifact import MODEL_FILE, REFERENCE_FILE
from runtime.errors import UsageError, ValidationError
from validation.arm import checked_tools, figures_of, replay_on_cores
from validation.child import start_ahead
from validation.float32 import Request
from validation.judge import Validated
from validation.material import material_of, task_of
from validation.settings import check_bounds, check_budget, check_settings

log = logging.getLogger(__name__)


def run(config: RunConfig, display: Display) -> tuple[Packaged, Validated]:
    """Raises `PipelineError`; nothing is left at `config.output` then."""
    output = Path(config.output).resolve()
    if config.task.name == AUTO:
        config = replace(config, task=load_task(task_of_checkpoint(Path(config.checkpoint))))
    check_settings(config.task, config.validation)
    check_bounds("recipe.bounds.", vars(config.recipe.bounds))
    check_targets(config)
    needs = estimate(config)
    with admitted(0 if config.force else needs.most, config.memory, display.console):
        check_resources(config, needs, display.console)
        return _build(config, output, needs, display)


def _build(config: RunConfig, output: Path, needs: Estimate, display: Display) -> tuple[Packaged, Validated]:
    cache = Path(config.cache)
    with staging(output, config.overwrite) as folder, ExitStack() as ended_with_it:
        with display.stage("load"):
            loaded = load(Path(config.checkpoint), config.lora, cache)
            max_seq_len, max_rows = lengths(loaded.config, config.export)  # before the long work
            asked = (config.task, config.validation, max_seq_len, DEFAULT_TEXT)
            material = material_of(loaded.folder, loaded.tokenizer, loaded.config, *asked)
            given = config.calibration or config.task.calibration
            calibration = calibration_of(loaded, config.recipe, given, CALIBRATION_TEXT)
            if calibration is None and config.calibration is not None:
                _warn_unused(config.calibration, loaded, config.recipe.name)
                config = replace(config, calibration=None)
            check_budget(config.budget, bool(material.texts), config.task.n_solve > 0)
            task = task_of(loaded.tokenizer, material.prompts, config.task, max_seq_len)
        request = Request(material, task, config.task.new_tokens, config.validation, max_seq_len, max_rows)
        start_ahead()
        wait_for_float32 = ended_with_it.enter_context(float32_begun(loaded, cache, request))
        with display.stage("quantize") as report:
            quantized = quantize(loaded, config.recipe, cache, report, calibration)
        take_reference = ended_with_it.enter_context(reference_begun(loaded, quantized, cache, request, folder))
        with garbage_of_now_only():
            with display.stage("export"):
                exported = export(quantized, config.export)
            with display.stage("lower") as report:
                lowered = lower(exported, quantized, folder / MODEL_FILE, report)
                del exported
                gc.collect()  # graphs hold each other, and the last copy of the embedding
        with display.stage("validate") as report:
            wait_for_float32(report)
            begun = take_reference(report)
            reference_file = folder / REFERENCE_FILE
            asked_of = (request, config.budget, config.task)
            validated = validate(lowered, quantized, loaded, *asked_of, reference_file, cache, report, begun=begun)
            sequences = validated.measured.reference.sequences
            floats = quantized.floats or Weights(loaded.model, {})
            noise = noise_of(floats, quantized.weights, config.recipe, sequences, report)
        with display.stage("package"):
            sealed = package(folder, config, loaded, calibration, lowered, validated, noise, display.stages, needs)
        figures = list(validated.figures)
        if Target.arm64 in config.targets and validated.ok:
            with display.stage("arm64") as report:
                cores = replay_on_cores(folder, list(config.cores), config.runner, report)
                figures += figures_of(cores)
            sealed = with_cores(folder, sealed, cores, display.stages)
        if wrong := "; ".join(str(figure) for figure in figures if not figure.ok):
            raise ValidationError(f"out of bounds: {wrong}. Kept for a look in {place_failed(folder, output)}")
        placed = place(folder, output)
    if config.packed_cache is not None:
        with display.stage("pack"):
            pack(placed, Path(config.packed_cache))
    return Packaged(placed, sealed.manifest, figures), validated


def _warn_unused(calibration: str, loaded: Loaded, recipe: str) -> None:
    """Of a text that no rounding goes by. Raises `UsageError` for one that is not there."""
    if not Path(calibration).is_file():
        raise UsageError(f"calibration: {calibration} cannot be read: no such file")
    mute = f"{loaded.folder} has no tokenizer to read it with"
    why = f"recipe {recipe} goes by no text" if loaded.tokenizer else mute
    log.warning("calibration: %s is not used: %s", calibration, why)


def check_targets(config: RunConfig) -> None:
    """Raises `UsageError`: before the long work."""
    if Target.host not in config.targets or len(set(config.targets)) < len(config.targets):
        named = ", ".join(target.value for target in config.targets)
        raise UsageError(f"targets [{named}]: host, which the artifact is made on, and arm64 besides")
    if Target.arm64 in config.targets:
        checked_tools(list(config.cores), config.runner)
