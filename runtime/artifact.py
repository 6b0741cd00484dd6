"""An artifact folder: its manifest, its hashes, and the check that needs nothing else."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

MODEL_FILE = "model.pte"
MANIFEST_FILE = "manifest.json"
PROVENANCE_FILE = "provenance.json"
REFERENCE_FILE = "reference.safetensors"
SCHEMA_VERSION = 10
MAX_JSON = 2**24  # bytes; Python makes up to 25 times as many of them


class ArtifactError(RuntimeError):
    """An artifact folder that is incomplete, was changed, or has a manifest of another version."""


def load_manifest(folder: Path) -> dict[str, Any]:
    """The manifest as it stands; what it says of the files is not looked at. Raises `ArtifactError`."""
    file = folder / MANIFEST_FILE
    try:
        is_folder, is_file = folder.is_dir(), file.is_file()
        links = _links(folder) if is_folder else []
        size = file.stat().st_size if is_file else 0
    except OSError as error:
        raise ArtifactError(f"{folder}: cannot be read: {error.strerror}") from error
    if not is_folder:
        raise ArtifactError(f"{folder}: no such artifact folder")
    if not is_file:
        raise ArtifactError(f"{folder}: no {MANIFEST_FILE}: not an artifact, or not a whole one")
    if links:
        raise ArtifactError(f"{folder / links[0]}: a link; an artifact holds all its files itself")
    if size > MAX_JSON:
        raise ArtifactError(f"{file}: not a manifest: {size} bytes, more than {MAX_JSON}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["schema_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{file}: not a manifest: {type(error).__name__}: {error}") from error
    if version != SCHEMA_VERSION:
        raise ArtifactError(f"{file}: schema version {version!r}, this program reads version {SCHEMA_VERSION}")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, once it and every file that it names are as `provenance.json` says. Raises `ArtifactError`."""
    manifest = load_manifest(folder)
    check_files(folder, manifest, read_provenance(folder))
    return manifest


def check_files(folder: Path, manifest: dict[str, Any], provenance: bytes) -> None:
    """That the manifest and every file that it names are as the provenance says. Raises `ArtifactError`."""
    file = folder / MANIFEST_FILE
    subjects = _subjects(folder / PROVENANCE_FILE, provenance)
    if sha256(file) != subjects.get(MANIFEST_FILE):
        raise ArtifactError(f"{file}: its sha256 is not the one in {PROVENANCE_FILE}: the file was changed")
    try:
        entries = files_of(manifest)
        expected = {name: (entry["sha256"], entry["bytes"]) for name, entry in entries.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{file}: not a manifest: {type(error).__name__}: {error}") from error
    missing = {MODEL_FILE, REFERENCE_FILE} - set(expected)
    if missing:
        raise ArtifactError(f"{file}: names no {', '.join(sorted(missing))}")
    for name, (digest, size) in expected.items():
        path = folder / name
        if Path(name).name != name:
            raise ArtifactError(f"{file}: {name!r} is no file of this folder")
        try:
            if not path.is_file():
                raise ArtifactError(f"{path}: missing, the manifest names it")
            if path.stat().st_size != size:
                raise ArtifactError(f"{path}: {path.stat().st_size} bytes, the manifest says {size}")
            if sha256(path) != digest:
                raise ArtifactError(f"{path}: its sha256 is not the manifest's: the file was changed")
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read: {error.strerror or error}") from error
    if {name: digest for name, (digest, _) in expected.items()} | {MANIFEST_FILE: subjects[MANIFEST_FILE]} != subjects:
        raise ArtifactError(f"{folder / PROVENANCE_FILE}: names other files than {MANIFEST_FILE}: the file was changed")


def _links(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:  # asks for no more of a million files than their names
        return sorted(entry.name for entry in entries if entry.is_symlink())


def files_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """sha256 and bytes of each file, by name: of those that every build repeats, and of those of this one run."""
    return {**manifest["files"], **manifest["run"]["files"]}


def figures_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the machine that made it, then of each core that it was tried on."""
    return [*manifest["figures"], *(figure for core in manifest["cores"] for figure in core["figures"])]


def out_of_bounds(manifest: dict[str, Any]) -> list[str]:
    """The figures that were, when it was made. Raises `KeyError`, `TypeError` for what is no manifest."""
    return [str(figure["name"]) for figure in figures_of(manifest) if not figure["ok"]]


def read_provenance(folder: Path) -> bytes:
    """`provenance.json` as it stands. Raises `ArtifactError`."""
    file = folder / PROVENANCE_FILE
    try:
        if not file.is_file():
            raise ArtifactError(f"{file}: missing: nothing says what the other files are")
        return read_small(file)
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read: {error.strerror or error}") from error


def _subjects(file: Path, provenance: bytes) -> dict[str, str]:
    """sha256 by name of the files that a provenance speaks of, all others of the folder. Raises `ArtifactError`."""
    try:
        subjects = json.loads(provenance)["subject"]
        return {str(subject["name"]): str(subject["digest"]["sha256"]) for subject in subjects}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{file}: not a provenance statement: {type(error).__name__}: {error}") from error


def read_small(file: Path) -> bytes:
    """Raises `ArtifactError` for what is no file, or larger than any of its kind; `OSError`."""
    if file.exists() and not file.is_file():
        raise ArtifactError(f"{file}: not a file")  # a pipe would never end
    with file.open("rb") as opened:
        content = opened.read(MAX_JSON + 1)
    if len(content) > MAX_JSON:
        raise ArtifactError(f"{file}: larger than {MAX_JSON} bytes")
    return content


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
