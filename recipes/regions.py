"""Where the tensors of a safetensors file are, and whether they are what was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CHUNK = 2**23


@dataclass(frozen=True)
class Region:
    """Bytes of a file."""

    file: Path
    offset: int
    n_bytes: int
    sha256: str

    def chunks(self) -> Iterator[bytes]:
        with self.file.open("rb") as opened:
            opened.seek(self.offset)
            left = self.n_bytes
            while left:
                chunk = opened.read(min(CHUNK, left))
                if not chunk:
                    raise OSError(f"{self.file}: ends early")
                yield chunk
                left -= len(chunk)


def regions_of(file: Path) -> dict[str, Region]:
    """Where the tensors of a safetensors file are. Raises `OSError`, `ValueError`, `KeyError` for another file."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError(f"{file}: no safetensors file")
        header = json.loads(opened.read(length))
    sha256 = json.loads(header.pop("__metadata__")["noted"])["sha256"]
    start = 8 + length
    return {
        name: Region(
            file, start + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0], sha256[name]
        )
        for name, entry in header.items()
    }


def digest_of(region: Region) -> str:
    digest = hashlib.sha256()
    for chunk in region.chunks():
        digest.update(chunk)
    return digest.hexdigest()
