"""Stage 2: the float model to the recipe's, on disk, a slice of one weight at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
from safetensors import SafetensorError
from torch import Tensor

from model import dream
from pipeline import calibrate
from pipeline.calibrate import Calibration, Stream, input_rms, rounds_by_text
from pipeline.display import Report
from pipeline.kept import KEY_FILE, LOCK_FILE
from pipeline.load import Loaded
from pipeline.lock import in_turn
from recipes import factors, gptq, packing, quantization, rescaling, rotation, stored, threads
from recipes.options import Recipe, Rounding, Scales
from recipes.quantization import QuantizationError
from recipes.rotation import check_rotation
from recipes.stored import Weights, open_stored, parts, store, transformed_floats, untie
from runtime.artifact import sha256
from runtime.errors import OutputError, RecipeError
from validation import activations, eager, output_layer, products, stream, texts
from validation.products import kernels
from validation.progress import within

# The code that decides the bytes.
MAKERS = (factors, gptq, packing, quantization, rescaling, rotation, stored)
# And what it goes by, where that is text.
READERS = (activations, calibrate, dream, eager, output_layer, products, stream, texts, threads)


@dataclass(frozen=True)
class Quantized:
    """weights: as the program shall have them on the device.

    plain: the same format with weights rounded to the nearest, where the recipe chooses them otherwise.
    floats: the network before it was rounded, where the recipe folds or rotates it; else it is the checkpoint's.
    """

    weights: Weights
    recipe: Recipe
    plain: Weights | None = None
    floats: Weights | None = None


def cache_folder(loaded: Loaded, recipe: Recipe, cache: Path, calibration: Calibration | None = None) -> Path:
    """Where the weights are kept, by a hash of all that decides their bytes."""
    return cache / hashlib.sha256(_made_of(loaded, done(recipe, calibration), calibration).encode()).hexdigest()[:16]


def quantize(
    loaded: Loaded, recipe: Recipe, cache: Path, report: Report, calibration: Calibration | None = None
) -> Quantized:
    """As the recipe says, and beside it plainly, where that is something else: what quality is held against.

    A recipe that rounds by calibration text and is given none rounds to the nearest; factors then go by weights.
    Raises as `_kept` does.
    """
    simple, asked = plain(recipe), done(recipe, calibration)
    if simple == asked:
        return Quantized(_kept(loaded, simple, cache, report, None), recipe)
    try:
        check_rotation(loaded.config, asked.rotate)  # before anything is made
    except QuantizationError as error:
        raise _refused(loaded, recipe, error) from error
    beside = _kept(loaded, simple, cache, within("plainly", report), None)
    inputs = None
    if asked.fold and calibration is not None:
        inputs = input_rms(loaded.model, calibration, within("inputs", report))
    weights = _kept(loaded, asked, cache, report, calibration, inputs)
    floats = transformed_floats(loaded.model, asked, inputs) if asked.fold or asked.rotate else None
    return Quantized(weights, recipe, beside, floats)


def done(recipe: Recipe, calibration: Calibration | None) -> Recipe:
    """What is done of a recipe where there is this calibration text, or none."""
    return _to_the_nearest(recipe) if rounds_by_text(recipe) and calibration is None else recipe


def plain(recipe: Recipe) -> Recipe:
    """The same formats, each weight of the network as it is rounded to the nearest."""
    return replace(_to_the_nearest(recipe), fold=[], rotate=[])


def _to_the_nearest(recipe: Recipe) -> Recipe:
    if recipe.linear is None:
        return recipe
    return replace(recipe, linear=replace(recipe.linear, rounding=Rounding.nearest, scales=Scales.absmax))


def _kept(
    loaded: Loaded,
    recipe: Recipe,
    cache: Path,
    report: Report,
    calibration: Calibration | None,
    inputs: Mapping[str, Tensor] | None = None,
) -> Weights:
    """What is in `cache` already is taken from there. inputs: as `store` takes them.

    Raises `RecipeError` that names the layers whose sizes do not fit, and `OutputError` if `cache` cannot be written.
    """
    made_of, folder = _made_of(loaded, recipe, calibration), cache_folder(loaded, recipe, cache, calibration)
    inputs_of = None
    if calibration is not None and rounds_by_text(recipe):
        inputs_of = Stream(calibration, loaded.model, recipe, folder).inputs_of
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Whoever needs the same weights waits until they are there.
        with in_turn(folder / LOCK_FILE, lambda holder: report(f"waits for {holder}")):
            (folder / KEY_FILE).write_text(made_of, encoding="utf-8")
            _remove_left_behind(folder)
            untie(loaded.model, recipe)  # first, so that the parts are those that will be stored
            sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts(loaded.model).items()}
            report("parts", 0, len(sizes))
            gone = 0
            for i, (name, was_there) in enumerate(store(loaded.model, recipe, folder, inputs_of, inputs), start=1):
                gone += sizes[name]
                report("parts from the cache" if was_there else "parts", i, len(sizes), gone / sum(sizes.values()))
            return open_stored(folder, loaded.model, recipe)
    except QuantizationError as error:
        raise _refused(loaded, recipe, error) from error
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cache {folder} cannot be written: {error}") from error


def _refused(loaded: Loaded, recipe: Recipe, error: QuantizationError) -> RecipeError:
    return RecipeError(f"recipe {recipe.name} on {loaded.folder}: {error}")


def _made_of(loaded: Loaded, recipe: Recipe, calibration: Calibration | None) -> str:
    """Whatever decides the bytes of quantized weights."""
    content: dict[str, Any] = {
        "code": _digests(MAKERS),
        "checkpoint": loaded.digests,
        "backend": recipe.backend.value,
        "dtype": recipe.dtype.value,
        "fold": recipe.fold,
        "rotate": recipe.rotate,
        "linear": recipe.linear and asdict(recipe.linear),
        "embedding": recipe.embedding and asdict(recipe.embedding),
        "versions": {name: version(name) for name in ("torch", "torchao")},
    }
    if calibration is not None:  # its sums are those of the processor's kernels
        content["calibration"] = calibration.noted | {"kernels": kernels(), "code": _digests(READERS)}
    return json.dumps(content, indent=2, sort_keys=True, default=lambda enum: enum.value) + "\n"


def _digests(modules: Iterable[ModuleType]) -> dict[str, str]:
    return {module.__name__: sha256(Path(str(module.__file__))) for module in modules}


def _remove_left_behind(folder: Path) -> None:
    """Files that a killed process was writing. Their names hold its number."""
    for file in folder.glob("*.partial"):
        process = file.stem.rpartition(".")[2]
        if not (process.isdecimal() and psutil.pid_exists(int(process))):
            file.unlink(missing_ok=True)
