"""What the float32 model gives, kept beside the quantized weights: it is the same for all recipes of a checkpoint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from pipeline.config import source_files
from pipeline.kept import FLOAT32, KEY_FILE, LOCK_FILE
from pipeline.load import Loaded
from pipeline.lock import in_turn
from recipes.stored import Weights
from runtime.artifact import sha256
from runtime.errors import OutputError
from validation.float32 import Float32, Request, enough, load_float32, run_float32, save_float32
from validation.products import kernels
from validation.progress import Report

FILE = "float32.safetensors"
ROOMS = ("model", "recipes", "runtime", "validation")  # whose code decides what float32 gives


def float32_of(loaded: Loaded, cache: Path, request: Request, report: Report) -> Float32:
    """From `cache`, if it is there and whole, to the bit; else it is computed and kept. While another process computes
    it, this one waits. Raises `OutputError` if `cache` cannot be written.
    """
    request = enough(request)
    made_of = _made_of(loaded, request)
    folder = cache / f"{FLOAT32}{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with in_turn(folder / LOCK_FILE, lambda holder: report(f"waits for {holder}")):
            if (found := load_float32(folder / FILE)) is None:
                (folder / KEY_FILE).write_text(made_of, encoding="utf-8")
                found = run_float32(Weights(loaded.model, {}), request, report)
                save_float32(found, folder / FILE)
            return found
    except OSError as error:
        raise OutputError(f"cache {folder} cannot be written: {error}") from error


def _made_of(loaded: Loaded, request: Request) -> str:
    task = request.task
    content = {
        "code": {name: sha256(file) for name, file in source_files().items() if name.partition("/")[0] in ROOMS},
        "checkpoint": loaded.digests,
        "model": loaded.config.to_hf(),
        "prompts": _digest(request.material.prompts),
        "texts": _digest(request.material.texts),
        "task": None if task is None else [_digest(list(task.prompts)), task.n_new, task.threshold],
        "validation": asdict(request.settings) | {"prompts": None},  # a name; the texts are above
        "lengths": [request.n_new, request.max_seq_len, request.max_rows],
        "versions": {name: version(name) for name in ("torch", "numpy")},
        "kernels": kernels(),
    }
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _digest(tokens: list[Tensor]) -> str:
    return hashlib.sha256(json.dumps([one.tolist() for one in tokens]).encode()).hexdigest()
