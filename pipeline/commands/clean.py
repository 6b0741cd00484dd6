"""`clean`: remove what runs have kept: quantized weights, and what float32 gives."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console

from pipeline.kept import FLOAT32, LOCK_FILE, is_kept
from pipeline.lock import locked
from pipeline.schema import CleanConfig
from report.terminal import mib
from runtime.errors import OutputError


def clean(config: CleanConfig, console: Console) -> None:
    """Only what runs made is removed. Raises `OutputError`."""
    cache = Path(config.cache)
    try:
        folders = [folder for folder in cache.glob("*") if is_kept(folder)] if cache.is_dir() else []
        freed = sum(file.stat().st_size for folder in folders for file in folder.iterdir())
        for folder in folders:
            with locked(folder / LOCK_FILE, f"cache {folder}"):
                shutil.rmtree(folder)
        if folders and not any(cache.iterdir()):
            cache.rmdir()
    except OSError as error:
        raise OutputError(f"cache {cache} cannot be removed: {error.strerror or error}") from error
    of_float32 = sum(folder.name.startswith(FLOAT32) for folder in folders)
    of_others = f" and {of_float32} of float32's results" if of_float32 else ""
    said = f"removed {len(folders) - of_float32} quantized model(s){of_others} from {cache}, {mib(freed)}"
    console.print(said, highlight=False, markup=False, soft_wrap=True)
