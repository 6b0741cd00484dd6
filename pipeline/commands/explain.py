"""`explain`: which layers and which matrices of an artifact cost its quality, and whether the program is to blame."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pipeline.commands.validate import check_same, config_of, same_calibration
from pipeline.config import load_task, names_of
from pipeline.display import Display
from pipeline.load import load
from pipeline.quantize import quantize
from pipeline.schema import ExplainConfig
from recipes.stored import Weights
from report.files import check_output, json_numbers, write_json, write_text
from report.page import page, picture
from report.plots import costliest, noise_plots
from report.terminal import table
from runtime.artifact import MODEL_FILE, REFERENCE_FILE, ArtifactError, read_manifest
from runtime.errors import BadArtifactError, OutputError, UsageError, ValidationError
from runtime.program import ProgramError
from validation.figure import IDENTICAL_DB
from validation.quantization_noise import KINDS, ModelNoise, quantization_noise
from validation.reference import ReferenceError, load_reference
from validation.wrong_layers import WrongLayers, find_wrong_layers

SUFFIXES = (".json", ".svg", ".html")


@dataclass(frozen=True)
class Explained:
    """quantization: the quantized model against float32. program: `model.pte` against the quantized model."""

    artifact: str
    recipe: str
    quantization: ModelNoise
    program: WrongLayers


def explain_artifact(config: ExplainConfig, display: Display) -> Explained:
    """Writes `config.output`, if given. Raises `PipelineError`."""
    artifact, output = Path(config.artifact), config.output and Path(config.output)
    if output:
        if output.suffix not in SUFFIXES:
            raise UsageError(f"output {output}: its name must end in one of {', '.join(SUFFIXES)}")
        check_output(output)
    try:
        manifest = read_manifest(artifact)
        recipe = config_of(artifact, manifest).recipe
        with display.stage("load"):
            loaded = load(Path(config.checkpoint), config.lora, Path(config.cache))
            check_same(loaded, artifact, manifest)
            task = manifest["task"]["name"]
            known = load_task(task).calibration if task in names_of("task") else None
            noted = manifest["calibration"]
            calibration = same_calibration(loaded, recipe, noted, config.calibration or known)
        with display.stage("quantize") as report:
            quantized = quantize(loaded, recipe, Path(config.cache), report, calibration)
        with display.stage("explain") as report:
            sequences = load_reference(artifact / REFERENCE_FILE).sequences
            floats, weights = quantized.floats or Weights(loaded.model, {}), quantized.weights
            noise = quantization_noise(floats, weights, sequences, report)
            program = find_wrong_layers(artifact / MODEL_FILE, weights, sequences, recipe.bounds, report)
    except (ArtifactError, ProgramError, ReferenceError) as error:
        raise BadArtifactError(str(error)) from error
    except OSError as error:
        raise OutputError(f"{artifact} cannot be explained: {error.strerror or error}") from error
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BadArtifactError(f"{artifact}: not an artifact: {type(error).__name__}: {error}") from error
    explained = Explained(artifact.resolve().name, recipe.name, noise, program)
    if output:
        _write(output, explained)
    return explained


def _write(output: Path, explained: Explained) -> None:
    if output.suffix == ".json":
        write_json(output, json_numbers(asdict(explained)))
    elif output.suffix == ".svg":
        write_text(output, picture(noise_plots(json_numbers(asdict(explained.quantization)))))
    else:
        write_text(output, explain_page(explained))


def explain_page(explained: Explained) -> str:
    """As HTML."""
    noise = json_numbers(asdict(explained.quantization))
    return page(
        "explain.html.j2",
        explained=explained,
        cost=costliest(noise),
        plots=noise_plots(noise),
        tables=[(str(made.title), *_cells(made)) for made in _tables(explained)],
    )


def show(console: Console, explained: Explained) -> None:
    """Raises `ValidationError` after the tables if a layer of the program is wrong."""
    for made in _tables(explained):
        console.print(made)
    console.print(_verdict(explained), highlight=False, markup=False)
    if explained.program.message:
        raise ValidationError(f"{explained.artifact}: {explained.program.message}")


def _tables(explained: Explained) -> list[Table]:
    noise, program_layers = explained.quantization, explained.program
    kinds = [kind.removesuffix("_proj") for kind in KINDS]
    recipe = escape(explained.recipe)
    quality = table(f"{recipe} against float32, decibels", "", "stream", "alone", "share", *kinds)
    quality.add_row("embedding", _db(noise.embedding_db))
    for i, layer in enumerate(noise.layers):
        matrices = [_db(layer.matrices[kind]) for kind in KINDS]
        quality.add_row(
            f"layer {i}", _db(layer.stream_db), _db(layer.alone_db), f"{100 * layer.share:.0f} %", *matrices
        )
    quality.add_row("lm_head", "", _db(noise.lm_head_db))
    quality.add_row("logits", _db(noise.logits_db))
    program = table(f"model.pte against {recipe} in eager, decibels", "", "keys", "values", "output", "", "calls")
    program.add_row("embedding", "", "", _db(program_layers.embedding_db))
    for i, part in zip(program_layers.order, program_layers.layers, strict=True):
        verdict = "[bold red]WRONG[/]" if part.wrong else "[green]ok[/]"
        calls = "free of rounding ties" if part.is_exact else "all, none is free of rounding ties"
        program.add_row(f"layer {i}", _db(part.keys_db), _db(part.values_db), _db(part.output_db), verdict, calls)
    return [quality, program]


def _cells(made: Table) -> tuple[list[str], list[list[str]]]:
    """(column names, rows)"""
    columns = [[Text.from_markup(str(cell)).plain for cell in column.cells] for column in made.columns]
    return [str(column.header) for column in made.columns], [list(row) for row in zip(*columns, strict=True)]


def _verdict(explained: Explained) -> str:
    cost = costliest(json_numbers(asdict(explained.quantization)))
    return f"{cost}; {explained.program.message or 'the program is what was meant, layer by layer'}"


def _db(value: float) -> str:
    return "exact" if value >= IDENTICAL_DB else f"{value:.1f}"
