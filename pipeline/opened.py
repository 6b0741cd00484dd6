"""An artifact opened for use: its program, its tokenizer, and what its manifest says of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import BadArtifactError, InputError, UsageError
from pipeline.tokenizer import TOKENIZER_FILE, load_tokenizer
from runtime.artifact import ArtifactError, load_manifest
from runtime.program import Program, ProgramError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Opened:
    folder: Path
    program: Program
    tokenizer: Tokenizer
    manifest: dict[str, Any]


def open_artifact(folder: Path) -> Opened:
    """Raises `BadArtifactError`; `UsageError` for an artifact without a tokenizer."""
    try:
        manifest = load_manifest(folder)
        tokenizer = load_tokenizer(folder)
        if tokenizer is None:
            raise UsageError(f"{folder} has no {TOKENIZER_FILE}: its checkpoint had no tokenizer, so it takes no text")
        return Opened(folder, Program.open(folder), tokenizer, manifest)
    except (ArtifactError, ProgramError, InputError, FileNotFoundError) as error:
        raise BadArtifactError(str(error)) from error
