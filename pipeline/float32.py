"""What the float32 model gives, kept beside the quantized weights: it is the same for all recipes of a checkpoint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from pipeline.config import source_files
from pipeline.load import Loaded
from pipeline.lock import in_turn
from pipeline.quantize import KEY_FILE, LOCK_FILE
from recipes.stored import Weights
from runtime.artifact import sha256
from runtime.errors import OutputError
from validation.float32 import Float32, enough, load_float32, run_float32, save_float32
from validation.material import Material
from validation.products import kernels
from validation.progress import Report
from validation.reference import Task
from validation.settings import ValidationConfig

FILE = "float32.safetensors"
FLOAT32 = "float32-"  # that the names of its folders begin with
ROOMS = ("model", "recipes", "runtime", "validation")  # whose code decides what float32 gives


def float32_of(
    loaded: Loaded,
    cache: Path,
    material: Material,
    task: Task | None,
    n_new: int,
    settings: ValidationConfig,
    max_seq_len: int,
    max_rows: int,
    report: Report,
) -> Float32:
    """From `cache`, if it is there and whole, to the bit; else it is computed and kept. While another process computes
    it, this one waits. Raises `OutputError` if `cache` cannot be written.
    """
    max_seq_len, max_rows = enough(material, n_new, max_seq_len, max_rows)
    asked = (n_new, settings, max_seq_len, max_rows)
    made_of = _made_of(loaded, material, task, *asked)
    folder = cache / f"{FLOAT32}{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with in_turn(folder / LOCK_FILE, lambda holder: report(f"waits for {holder}")):
            if (found := load_float32(folder / FILE)) is None:
                (folder / KEY_FILE).write_text(made_of, encoding="utf-8")
                found = run_float32(Weights(loaded.model, {}), material, task, *asked, report)
                save_float32(found, folder / FILE)
            return found
    except OSError as error:
        raise OutputError(f"cache {folder} cannot be written: {error}") from error


def _made_of(
    loaded: Loaded,
    material: Material,
    task: Task | None,
    n_new: int,
    settings: ValidationConfig,
    max_seq_len: int,
    max_rows: int,
) -> str:
    content = {
        "code": {name: sha256(file) for name, file in source_files().items() if name.partition("/")[0] in ROOMS},
        "checkpoint": loaded.digests,
        "model": loaded.config.to_hf(),
        "prompts": _digest(material.prompts),
        "texts": _digest(material.texts),
        "task": None if task is None else [_digest(list(task.prompts)), task.n_new, task.threshold],
        "validation": asdict(settings) | {"prompts": None},  # a name; the texts are above
        "lengths": [n_new, max_seq_len, max_rows],
        "versions": {name: version(name) for name in ("torch", "numpy")},
        "kernels": kernels(),
    }
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _digest(tokens: list[Tensor]) -> str:
    return hashlib.sha256(json.dumps([one.tolist() for one in tokens]).encode()).hexdigest()
