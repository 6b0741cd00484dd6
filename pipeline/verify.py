"""`verify`: whether an artifact is as it was packaged, to the byte, and who says so."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.config import VerifyConfig
from pipeline.dsse import is_signed, key_id, open_envelope, public_key
from pipeline.errors import BadArtifactError
from runtime.artifact import (
    MANIFEST_FILE,
    PROVENANCE_FILE,
    ArtifactError,
    check_files,
    files_of,
    load_manifest,
    read_provenance,
    read_small,
)

ENVELOPE_FILE = "provenance.dsse.json"


def verify(config: VerifyConfig, console: Console) -> None:
    """Nothing is run. Raises `BadArtifactError`; with a key also where its signature is missing or is another's."""
    folder = Path(config.artifact)
    key = public_key(Path(config.key)) if config.key is not None else None
    if not folder.is_dir():
        raise BadArtifactError(f"{folder}: no such artifact folder")
    manifest, provenance = as_it_stands(folder)
    signatures = check_signatures(folder, provenance)
    if key is not None:
        if not signatures:
            raise BadArtifactError(f"{folder}: not signed: there is no {ENVELOPE_FILE}")
        if not any(is_signed(provenance, signature, key) for _, signature in signatures):
            raise BadArtifactError(f"{folder / ENVELOPE_FILE}: no signature of key {key_id(key)}")
    check_whole(folder, manifest, provenance)
    said = f"signed with key {key_id(key)}" if key is not None else signed_by(signatures)
    console.print(f"{folder} is as it was packaged, {said}", highlight=False, soft_wrap=True)


def as_it_stands(folder: Path) -> tuple[dict[str, Any], bytes]:
    """(the manifest, `provenance.json`), each read once, nothing of them checked. Raises `BadArtifactError`."""
    try:
        return load_manifest(folder), read_provenance(folder)
    except ArtifactError as error:
        raise BadArtifactError(str(error)) from error


def check_signatures(folder: Path, provenance: bytes) -> list[tuple[str, bytes]]:
    """The signatures, each with the key id that it names, not checked against any key; none without an envelope.

    Raises `BadArtifactError` for an envelope that holds another statement than `provenance.json`.
    """
    file = folder / ENVELOPE_FILE
    if not file.exists():
        return []
    try:
        payload, signatures = open_envelope(file, read_small(file))
    except ArtifactError as error:
        raise BadArtifactError(str(error)) from error
    except OSError as error:
        raise BadArtifactError(f"{error.filename}: cannot be read: {error.strerror or error}") from error
    if payload != provenance:
        raise BadArtifactError(f"{folder / PROVENANCE_FILE}: is not what {ENVELOPE_FILE} signs: the file was changed")
    return signatures


def signed_by(signatures: list[tuple[str, bytes]]) -> str:
    if not signatures:
        return "not signed"
    # An envelope is anybody's: what it calls its key is shown where it is a key's id, or looks like one.
    named = [name if name.isalnum() and name.isascii() else "of another kind of name" for name, _ in signatures]
    return f"signed with key {', '.join(named)} (not checked: key=FILE does)"


def check_whole(folder: Path, manifest: dict[str, Any], provenance: bytes) -> None:
    """That every file is as the provenance says, and there is no other. Raises `BadArtifactError`."""
    try:
        check_files(folder, manifest, provenance)
        known = {*files_of(manifest), MANIFEST_FILE, PROVENANCE_FILE, ENVELOPE_FILE}
        with os.scandir(folder) as entries:  # of a million files the first is enough
            for entry in entries:
                if entry.name not in known:
                    raise BadArtifactError(f"{folder / entry.name}: no file of this artifact: it was added")
                if not entry.is_file(follow_symlinks=False):
                    raise BadArtifactError(f"{folder / entry.name}: a link or a folder, not a file")
    except ArtifactError as error:
        raise BadArtifactError(str(error)) from error
    except OSError as error:
        raise BadArtifactError(f"{folder}: cannot be read: {error.strerror or error}") from error
