"""A result as a file: whole or not at all."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from runtime.errors import OutputError


def json_numbers(value: Any) -> Any:
    """The same with None for each number that JSON has not, also inside lists and dictionaries."""
    if isinstance(value, dict):
        return {key: json_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_numbers(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_output(file: Path) -> None:
    """Before the long work. Raises `OutputError` if the file cannot be made there."""
    if not file.resolve().parent.is_dir():
        raise OutputError(f"output {file} cannot be written: there is no folder {file.parent}")
    if file.is_dir():
        raise OutputError(f"output {file} cannot be written: it is a folder")
    aside = _aside(file)
    try:
        aside.touch()
        aside.unlink()
    except OSError as error:
        raise OutputError(f"output {file} cannot be written: {error.strerror or error}") from error


def check_outside(file: Path, folders: list[Path]) -> None:
    """Of artifacts, which are as they were made. Raises `OutputError`."""
    if file.resolve().parent in [folder.resolve() for folder in folders]:
        raise OutputError(f"output {file} cannot be written: it would be a file of the artifact {file.parent}")


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Whole or not at all. Raises `OutputError`."""
    write_text(file, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """UTF-8. Whole or not at all. Raises `OutputError`."""
    aside = _aside(file)
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(file)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OutputError(f"output {file} cannot be written: {error.strerror or error}") from error


def _aside(file: Path) -> Path:
    return file.with_name(f".{file.name}.{os.getpid()}.partial")  # of each process that writes it at once its own
