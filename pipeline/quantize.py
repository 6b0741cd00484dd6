"""Stage 2: the float model to the recipe's, on disk, a slice of one weight at a time."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

from pipeline.display import Report
from pipeline.load import Loaded
from recipes import packing, quantization, stored
from recipes.options import Recipe
from recipes.quantization import QuantizationError
from recipes.stored import Weights, open_stored, parts, store, untie
from runtime.artifact import sha256
from runtime.errors import OutputError, RecipeError

KEY_FILE = "made_of.json"
MAKERS = (packing, quantization, stored)  # the code that decides the bytes


@dataclass(frozen=True)
class Quantized:
    """weights: as the program shall have them on the device.

    plain: the same format with weights rounded to the nearest, where the recipe chooses them otherwise.
    """

    weights: Weights
    recipe: Recipe
    plain: Weights | None = None


def cache_folder(loaded: Loaded, recipe: Recipe, cache: Path) -> Path:
    """Where the weights are kept, by a hash of all that decides their bytes."""
    return cache / hashlib.sha256(_made_of(loaded, recipe).encode()).hexdigest()[:16]


def quantize(loaded: Loaded, recipe: Recipe, cache: Path, report: Report) -> Quantized:
    """What is in `cache` already is taken from there.

    Raises `RecipeError` that names the layers whose sizes do not fit, and `OutputError` if `cache` cannot be written.
    """
    made_of, folder = _made_of(loaded, recipe), cache_folder(loaded, recipe, cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / KEY_FILE).write_text(made_of, encoding="utf-8")
        _remove_left_behind(folder)
        untie(loaded.model, recipe)  # first, so that the parts are those that will be stored
        sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts(loaded.model).items()}
        report("parts", 0, len(sizes))
        gone = 0
        for i, (name, was_there) in enumerate(store(loaded.model, recipe, folder), start=1):
            gone += sizes[name]
            report("parts from the cache" if was_there else "parts", i, len(sizes), gone / sum(sizes.values()))
        return Quantized(open_stored(folder, loaded.model, recipe), recipe)
    except QuantizationError as error:
        raise RecipeError(f"recipe {recipe.name} on {loaded.folder}: {error}") from error
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cache {folder} cannot be written: {error}") from error


def _made_of(loaded: Loaded, recipe: Recipe) -> str:
    """Whatever decides the bytes of quantized weights."""
    content: dict[str, Any] = {
        "code": {module.__name__: sha256(Path(str(module.__file__))) for module in MAKERS},
        "checkpoint": loaded.digests,
        "backend": recipe.backend.value,
        "dtype": recipe.dtype.value,
        "linear": recipe.linear and asdict(recipe.linear),
        "embedding": recipe.embedding and asdict(recipe.embedding),
        "versions": {name: version(name) for name in ("torch", "torchao")},
    }
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _remove_left_behind(folder: Path) -> None:
    """Files that a killed process was writing. Their names hold its number."""
    for file in folder.glob("*.partial"):
        process = file.stem.rpartition(".")[2]
        if not (process.isdecimal() and psutil.pid_exists(int(process))):
            file.unlink(missing_ok=True)


def is_kept(folder: Path) -> bool:
    """Whether a folder is one of this stage's, whole or not."""
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    ours = (KEY_FILE, ".safetensors", ".partial")
    return KEY_FILE in names and all(name.endswith(ours) for name in names)
