"""The files of a checkpoint folder: which there are, where links lead, and what its configs say."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from model.config import ConfigError, DreamEdgeConfig

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON = 2**24  # bytes of a JSON file, and of a safetensors header; Python makes up to 25 times as many of them
_HUB_ID = re.compile(r"(?:https?:/+[^/]+/)?(\w[\w.-]*/\w[\w.-]*)/?")


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded. The message says what is wrong, and in which file."""


def read_config(folder: Path) -> DreamEdgeConfig:
    """The config of a checkpoint folder. Raises `CheckpointError` or `ConfigError`."""
    _check_link(folder)
    if not folder.is_dir():
        raise CheckpointError(_no_folder(folder) if not folder.exists() else f"{folder}: not a folder")
    with os.scandir(folder) as entries:
        links = sorted(entry.name for entry in entries if entry.is_symlink())
    for name in links:
        if Path(name).suffix in (".json", ".safetensors", ".txt", ".jinja"):
            _check_link(folder / name)
    file, generation = folder / CONFIG, folder / GENERATION_CONFIG
    if not file.is_file():
        snapshots = first_few(sorted(f"{folder}/snapshots/{found.name}" for found in folder.glob("snapshots/*")))
        hint = f": this is a place in the hub's cache, the folder is {snapshots}" if snapshots else ""
        raise CheckpointError(f"{folder}: no {CONFIG}; a checkpoint folder in Hugging Face layout is expected{hint}")
    config = read_json(file)
    try:
        return DreamEdgeConfig.from_hf(config, read_json(generation) if generation.is_file() else None)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _no_folder(folder: Path) -> str:
    hub_id = _HUB_ID.fullmatch(str(folder))
    # Beside folders that are there it is a slip of the pen.
    if hub_id is None or folder.parent.exists():
        return f"{folder}: no such folder"
    return (
        f"{folder}: no such folder; if it is a model of the hub, download it "
        f"(hf download {hub_id[1]} --local-dir DIR) and give checkpoint=DIR"
    )


def _check_link(file: Path) -> None:
    """Links are followed, wherever they lead: the hub's cache is links. Raises `CheckpointError` for a dead one."""
    if not file.is_symlink():
        return
    link = f"{file}: a link to {file.readlink()}"
    try:
        file.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CheckpointError(f"{link}, and from there in a circle: put the file there") from error
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise CheckpointError(f"{link}, which is not there: put the file there, or download it anew") from error
        raise CheckpointError(f"{link}, which cannot be followed: {error.strerror or error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, in order. Raises `CheckpointError`."""
    weight_map = read_weight_map(folder)
    return [folder / name for name in (sorted(set(weight_map.values())) if weight_map is not None else [WEIGHTS])]


def read_weight_map(folder: Path) -> dict[str, str] | None:
    """Which file each tensor is in, as the index says it; None where one file is all. Raises `CheckpointError`."""
    index = folder / INDEX
    with os.scandir(folder) as entries:
        present = {entry.name for entry in entries if entry.is_file()}
    if INDEX not in present:
        if WEIGHTS not in present:
            raise CheckpointError(f"{folder}: no {WEIGHTS} and no {INDEX}{_what_is_there(present)}")
        return None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to files")
    names = sorted(set(weight_map.values()))
    if WEIGHTS in present and WEIGHTS not in names:
        if not present.intersection(names):
            return None  # the index was left behind
        raise CheckpointError(
            f"{folder}: both {WEIGHTS} and {INDEX} with its {first_few(names)} are there, and either may be "
            "the checkpoint: take one of them away"
        )
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {name!r} is not a safetensors file of this folder")
        if name not in present:
            raise CheckpointError(f"{index} names {name}, which is not there")
    return weight_map


def _what_is_there(present: Iterable[str]) -> str:
    shards = sorted(name for name in present if name.endswith(".safetensors"))
    pickles = sorted(name for name in present if re.search(r"\.(bin|pt[^.]*)$", name))
    hint = ""
    if shards:
        hint += f"; there are {first_few(shards)}: the index is missing that says which tensors they hold"
    if pickles:
        hint += f"; {first_few(pickles)} may hold pickled code and is never opened: convert it"
    return hint


def read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > MAX_JSON:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes of JSON, more than {MAX_JSON}")
        content = json.loads(file.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: a JSON object is expected, found {type(content).__name__}")
    return content


def first_few(names: list[str], most: int = 3, what: str = "") -> str:
    """A long list as its beginning and a count."""
    more = [f"and {len(names) - most} more{what}"] if len(names) > most else []
    return ", ".join([*names[:most], *more])
