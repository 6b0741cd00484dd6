"""`sign`: a signature over `provenance.json`, which names every other file of an artifact."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from evidence.integrity import ENVELOPE_FILE, as_it_stands, check_whole
from evidence.signature import key_id, private_key, seal
from pipeline.schema import SignConfig
from report.files import write_json
from runtime.artifact import out_of_bounds
from runtime.errors import ValidationError


def sign(config: SignConfig, console: Console) -> None:
    """A signature that is there already is replaced.

    Raises `BadArtifactError` for an artifact that is not whole, `ValidationError` for one that is out of bounds,
    `UsageError` for a key that is none, `OutputError`.
    """
    folder, key = Path(config.artifact), private_key(Path(config.key))
    manifest, provenance = as_it_stands(folder)
    check_whole(folder, manifest, provenance)
    wrong = out_of_bounds(manifest)
    if wrong:
        raise ValidationError(f"{folder} is not signed: out of bounds when it was made: {', '.join(wrong)}")
    write_json(folder / ENVELOPE_FILE, seal(provenance, key))
    console.print(f"signed {folder} with key {key_id(key.public_key())}", highlight=False, markup=False, soft_wrap=True)
