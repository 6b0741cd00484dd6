"""`verify`: whether an artifact is as it was packaged, to the byte, and who says so."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from evidence.integrity import ENVELOPE_FILE, as_it_stands, check_signatures, check_whole, signed_by
from evidence.signature import is_signed, key_id, public_key
from pipeline.schema import VerifyConfig
from runtime.errors import BadArtifactError


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
    console.print(f"{folder} is as it was packaged, {said}", highlight=False, markup=False, soft_wrap=True)
