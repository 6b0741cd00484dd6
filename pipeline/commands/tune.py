"""`tune`: a format for each matrix by what it costs, verified on held-out texts, as a recipe for `run`."""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from pipeline.calibrate import Calibration, calibration_of
from pipeline.config import AUTO, CALIBRATION_TEXT, DEFAULT_TEXT, RECIPE_FILES, load_task, task_of_checkpoint
from pipeline.display import Display, Report
from pipeline.estimate import of_sizes
from pipeline.export import lengths
from pipeline.load import Loaded, load
from pipeline.quantize import quantize
from pipeline.schema import ExportConfig, TuneBudget, TuneConfig
from pipeline.sensitivity import linears, sensitivities, texts_of
from pipeline.tuning import (
    BEST,
    FORMATS,
    ROOM,
    Option,
    Tried,
    choose,
    formats_that_fit,
    matrix_bytes,
    meets,
    recipe_of,
    scaled,
)
from recipes.options import Recipe
from recipes.stored import Weights
from report.files import check_output, write_text
from report.front import tuned_plot
from report.page import picture
from report.terminal import mib, show, table
from runtime.errors import OutputError, UsageError
from validation.divergence import Divergence
from validation.material import material_of, whole_sequences
from validation.progress import within
from validation.settings import check_settings


@dataclass(frozen=True)
class Measured:
    """A checkpoint, ready to be chosen for. single: one format for all matrices that it fits, by the format.

    rest: bytes of all weights that are no matrix. units: the options of each matrix.
    """

    loaded: Loaded
    recipe: Recipe
    cache: Path
    calibration: Calibration | None
    divergence: Divergence
    rest: int
    single: dict[str, Tried]
    units: dict[str, tuple[Option, ...]]

    def attempt(self, formats: dict[str, str], report: Report) -> Tried:
        """Quantized by these formats, and measured."""
        made = quantize(self.loaded, recipe_of(self.recipe, formats), self.cache, report, self.calibration).weights
        kl = self.divergence.of(made, report)
        made.release()
        n_bytes = sum(o.bytes for name, options in self.units.items() for o in options if o.format == formats[name])
        return Tried(formats, self.rest + n_bytes, kl)


def tune(config: TuneConfig, display: Display) -> tuple[Measured, Tried]:
    """(what one format for all costs, what was chosen). Writes `config.output`, and `config.plot` if given.

    Raises `PipelineError`.
    """
    check_budget(config.budget)
    output = _outputs(config)
    measured = measure(config, display)
    with display.stage("choose") as report:
        chosen = choose(config.budget, measured.units, measured.single, measured.attempt, report)
    write_recipe(output, config, chosen)
    if config.plot is not None:
        single = {f"{written} for all": (one.bytes, one.kl) for written, one in measured.single.items()}
        write_text(Path(config.plot), picture([tuned_plot(single, {"chosen": (chosen.bytes, chosen.kl)})]))
    return measured, chosen


def check_budget(budget: TuneBudget) -> None:
    """Raises `UsageError` unless one budget is given."""
    if (budget.kl is None) == (budget.bytes is None):
        raise UsageError(
            f"{'no budget' if budget.kl is None else 'two budgets'}: give one of budget.kl=NATS and budget.bytes=N"
        )
    for name, given in (("kl", budget.kl), ("bytes", budget.bytes)):
        if given is not None and not 0 < given < math.inf:
            raise UsageError(f"budget.{name} {given:g}: must be above 0")


def _outputs(config: TuneConfig) -> Path:
    """Before the long work."""
    output = Path(config.output)
    if output.suffix not in RECIPE_FILES:
        raise UsageError(f"output {output}: its name must end in one of {', '.join(RECIPE_FILES)}")
    if config.plot is not None and Path(config.plot).suffix != ".svg":
        raise UsageError(f"plot {config.plot}: its name must end in .svg")
    try:
        if output.parent.name == "artifacts":
            output.parent.mkdir(exist_ok=True)  # the default's; others are the user's to make
    except OSError as error:
        raise OutputError(f"output {output} cannot be written: {error.strerror or error}") from error
    for file in (output, config.plot):
        if file is not None:
            check_output(Path(file))
    return output


def measure(config: TuneConfig, display: Display) -> Measured:
    """All that is to be known of a checkpoint before formats are chosen. Raises `PipelineError`."""
    recipe, budget = config.recipe, config.budget
    if recipe.linear is None:
        raise UsageError(f"recipe {recipe.name}: it leaves matrices as floats, and there is nothing to choose")
    if recipe.linear.rules:
        raise UsageError(f"recipe {recipe.name}: recipe.linear.rules are what `tune` chooses; give a recipe without")
    task = config.task
    if task.name == AUTO:
        task = load_task(task_of_checkpoint(Path(config.checkpoint)))
    check_settings(task, config.validation)
    with display.stage("load") as report:
        loaded = load(Path(config.checkpoint), config.lora, Path(config.cache))
        float32 = Weights(loaded.model, {})
        max_seq_len, max_rows = lengths(loaded.config, ExportConfig())
        asked = (task, config.validation, max_seq_len, DEFAULT_TEXT)
        material = material_of(loaded.folder, loaded.tokenizer, loaded.config, *asked)
        if material.is_random:
            raise UsageError(f"checkpoint {loaded.folder}: it reads no text, so that no quality can be measured")
        text = Path(config.calibration or task.calibration or CALIBRATION_TEXT)
        seen = texts_of(loaded, text, config.validation.seed)
        calibration = calibration_of(loaded, recipe, str(text), CALIBRATION_TEXT)
        shapes = linears(loaded.config)
        every = {f: {n: f if f in formats_that_fit(shape[1]) else BEST for n, shape in shapes.items()} for f in FORMATS}
        sizes = {f: sum(matrix_bytes(*shapes[n], kind) for n, kind in every[f].items()) for f in FORMATS}
        whole = of_sizes(loaded.config, loaded.weights, recipe_of(recipe, every[BEST]), max_seq_len, max_rows)
        rest = whole.output - sizes[BEST]
        least = rest + sizes[FORMATS[0]]
        if budget.bytes is not None and budget.bytes < least:
            raise UsageError(f"budget.bytes {budget.bytes}: the smallest that can be met is budget.bytes={least}")
        settings = (task.new_tokens, config.validation, max_seq_len, max_rows)
        held_out, _ = whole_sequences(float32, material, *settings, within("texts", report))
    with display.stage("measure") as report:
        divergence = Divergence(float32, held_out, report)
        single, plain = {}, {}
        for written in FORMATS:
            named = within(written, report)
            made = quantize(loaded, recipe_of(recipe, every[written]), Path(config.cache), named, calibration)
            plain[written] = made.weights if made.plain is None else made.plain
            single[written] = Tried(every[written], rest + sizes[written], divergence.of(made.weights, named))
        lowest = min(one.kl for one in single.values())
        if budget.kl is not None and not any(meets(one, budget) for one in single.values()):
            nearest = lowest / (1 - ROOM) * 1.001
            raise UsageError(f"budget.kl {budget.kl:g}: the smallest that can be met is budget.kl={nearest:.3g}")
    with display.stage("weigh") as report:
        added = sensitivities(loaded, plain, seen, report)
    units = scaled(added, shapes, single)
    return Measured(loaded, recipe, Path(config.cache), calibration, divergence, rest, single, units)


def write_recipe(output: Path, config: TuneConfig, chosen: Tried) -> None:
    """As `run recipe=FILE` reads it. Raises `OutputError`."""
    name = output.stem.removeprefix(f"{Path(config.checkpoint).resolve().name}-")
    recipe = replace(
        recipe_of(config.recipe, chosen.formats),
        name=name,
        description=f"{config.recipe.description}; a format for each matrix, by `tune`: {chosen.kl:.3g} nats in eager",
    )
    write_text(output, OmegaConf.to_yaml(OmegaConf.create(_plain(asdict(recipe)))))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return value.value if isinstance(value, Enum) else value


def show_tuned(console: Console, measured: Measured, chosen: Tried, config: TuneConfig) -> None:
    """Sizes and divergences, and what to do next."""
    n = len(measured.units)
    listing = table(None, "formats", "weights", "bytes", "KL, nats")
    for written, one in measured.single.items():
        listing.add_row(f"{written} for all", mib(one.bytes), f"{one.bytes:,}", f"{one.kl:.5f}")
    listing.add_row(f"chosen for {n} matrices", mib(chosen.bytes), f"{chosen.bytes:,}", f"[bold]{chosen.kl:.5f}[/]")
    show(console, listing)
    counts = {f: sum(written == f for written in chosen.formats.values()) for f in FORMATS}
    console.print(", ".join(f"{count} {f}" for f, count in counts.items() if count), highlight=False, markup=False)
    budget = "" if config.budget.kl is None else f" budget.kl={config.budget.kl:g}"
    words = [f"recipe={config.output}", f"checkpoint={config.checkpoint}"]
    command = f"python -m pipeline run {' '.join(shlex.quote(word) for word in words)}{budget}"
    console.print(f"next: {command}", highlight=False, markup=False, soft_wrap=True)
