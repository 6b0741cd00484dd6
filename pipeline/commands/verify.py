"""`verify`: whether an artifact, or all of a registry, is as it was packaged, to the byte, and who says so."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from evidence.integrity import ENVELOPE_FILE, as_it_stands, check_signatures, check_signed, check_whole, signed_by
from evidence.registry import Entry, Registry, blob_bytes, open_registry, verify_all
from evidence.signature import key_id, public_key
from pipeline.schema import VerifyConfig
from runtime.artifact import PROVENANCE_FILE
from runtime.errors import BadArtifactError, UsageError, one_line

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


def verify(config: VerifyConfig, console: Console) -> None:
    """Nothing is run. Raises `BadArtifactError`; with a key also where its signature is missing or is another's."""
    if (config.artifact is None) == (config.registry is None):
        raise UsageError("give one of artifact=DIR and registry=DIR|URL")
    key = public_key(Path(config.key)) if config.key is not None else None
    if config.registry is not None:
        said = _registry(open_registry(config.registry), key, console)
    else:
        said = _artifact(Path(str(config.artifact)), key)
    console.print(one_line(said), highlight=False, markup=False, soft_wrap=True)


def _artifact(folder: Path, key: Ed25519PublicKey | None) -> str:
    if not folder.is_dir():
        raise BadArtifactError(f"{folder}: no such artifact folder")
    manifest, provenance = as_it_stands(folder)
    signatures = check_signatures(folder, provenance)
    if key is not None:
        check_signed(folder, provenance, key)
    check_whole(folder, manifest, provenance)
    said = f"signed with key {key_id(key)}" if key is not None else signed_by(signatures)
    return f"{folder} is as it was packaged, {said}"


def _registry(registry: Registry, key: Ed25519PublicKey | None, console: Console) -> str:
    """All that is wrong is named, a line each, and counted in the error."""
    found = verify_all(registry)
    wrong = list(found.wrong)
    if key is not None and not wrong:
        wrong += [reason for entry in found.entries if (reason := _why_not_signed(registry, entry, key))]
    for line in [*(f"left over: {file}, which no artifact needs" for file in found.left), *wrong]:
        console.print(one_line(line), highlight=False, markup=False, soft_wrap=True)
    if wrong:
        raise BadArtifactError(f"registry {registry.url}: {len(wrong)} wrong, the first: {wrong[0]}")
    n = len(found.entries)
    said = f"signed with key {key_id(key)}" if key is not None else "signatures not checked: key=FILE does"
    return f"{registry.url}: {n} artifact{'s' * (n != 1)} as they were published, {said}"


def _why_not_signed(registry: Registry, entry: Entry, key: Ed25519PublicKey) -> str:
    """Empty where it is."""
    names = [name for name in (PROVENANCE_FILE, ENVELOPE_FILE) if name in entry.files]
    with tempfile.TemporaryDirectory() as aside:
        for name in names:
            Path(aside, name).write_bytes(blob_bytes(registry, entry, name))
        try:
            check_signed(Path(aside), Path(aside, PROVENANCE_FILE).read_bytes(), key)
        except BadArtifactError as error:
            return f"{entry.name} {entry.id[:12]}: {str(error).replace(f'{aside}/', '').replace(aside, entry.name)}"
    return ""
