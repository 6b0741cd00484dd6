"""`verify`: whether an artifact is as it was packaged, to the byte, and who says so."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evidence.signature import is_signed, key_id, open_envelope
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
from runtime.errors import BadArtifactError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

ENVELOPE_FILE = "provenance.dsse.json"


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


def check_signed(folder: Path, provenance: bytes, key: Ed25519PublicKey) -> None:
    """That one of its signatures is of this key. Raises `BadArtifactError`."""
    signatures = check_signatures(folder, provenance)
    if not signatures:
        raise BadArtifactError(f"{folder}: not signed: there is no {ENVELOPE_FILE}")
    if not any(is_signed(provenance, signature, key) for _, signature in signatures):
        raise BadArtifactError(f"{folder / ENVELOPE_FILE}: no signature of key {key_id(key)}")


def signed_by(signatures: list[tuple[str, bytes]]) -> str:
    if not signatures:
        return "not signed"
    # An envelope is anybody's: what it calls its key is shown where it is a key's id, or looks like one.
    named = [name if name.isalnum() and name.isascii() else "of another kind of name" for name, _ in signatures]
    return f"signed with key {', '.join(named)} (not checked: key=FILE does)"


def check_packaged(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact that is whole, and signed, if it is, as it stands. Raises `BadArtifactError`."""
    manifest, provenance = as_it_stands(folder)
    check_whole(folder, manifest, provenance)
    check_signatures(folder, provenance)
    return manifest


def files_of_artifact(manifest: dict[str, Any]) -> set[str]:
    """The names that an artifact may have files of."""
    return {*files_of(manifest), MANIFEST_FILE, PROVENANCE_FILE, ENVELOPE_FILE}


def _is_left_behind(name: str) -> bool:
    """By a process that was signing, and was killed."""
    return name.startswith(f".{ENVELOPE_FILE}.") and name.endswith(".partial")


def check_whole(folder: Path, manifest: dict[str, Any], provenance: bytes) -> None:
    """That every file is as the provenance says, and there is no other. Raises `BadArtifactError`."""
    try:
        check_files(folder, manifest, provenance)
        known = files_of_artifact(manifest)
        with os.scandir(folder) as entries:  # of a million files the first is enough
            for entry in entries:
                if _is_left_behind(entry.name):
                    continue
                if entry.name not in known:
                    raise BadArtifactError(f"{folder / entry.name}: no file of this artifact: it was added")
                if not entry.is_file(follow_symlinks=False):
                    raise BadArtifactError(f"{folder / entry.name}: a link or a folder, not a file")
    except ArtifactError as error:
        raise BadArtifactError(str(error)) from error
    except OSError as error:
        raise BadArtifactError(f"{folder}: cannot be read: {error.strerror or error}") from error
