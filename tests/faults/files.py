"""Faults of an artifact's files: each changes a copy of a folder, and no digest."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from runtime.artifact import MANIFEST_FILE, MODEL_FILE, REFERENCE_FILE
from validation.format import _decoded

Damage = Callable[[Path], None]


def bit_flipped(i: int) -> Damage:
    """One bit of `model.pte`: in its flatbuffer, then in each of its segments, in turn."""

    def damage(artifact: Path) -> None:
        pte = artifact / MODEL_FILE
        content = bytearray(pte.read_bytes())
        segments = segments_of(pte)
        places = [(0, segments[0][0]), *segments]
        offset, size = places[i % len(places)]
        chance = random.Random(i)
        content[offset + chance.randrange(size)] ^= 1 << chance.randrange(8)
        pte.write_bytes(content)

    return damage


def truncated(artifact: Path) -> None:
    pte = artifact / MODEL_FILE
    pte.write_bytes(pte.read_bytes()[:-1])


def section_of_another(artifact: Path, other: Path) -> None:
    """The last segment of another program of the same sizes, `other`."""
    pte = artifact / MODEL_FILE
    content, theirs = bytearray(pte.read_bytes()), other.read_bytes()
    (offset, size), (from_, _) = segments_of(pte)[-1], segments_of(other)[-1]
    content[offset : offset + size] = theirs[from_ : from_ + size]
    pte.write_bytes(content)


def segments_of(pte: Path) -> list[tuple[int, int]]:
    """(offset, size) of those that hold anything."""
    _, segments, _ = _decoded(pte)
    return [(offset, size) for offset, size in segments if size]


def manifest_edited(artifact: Path) -> None:
    manifest = json.loads((artifact / MANIFEST_FILE).read_text())
    manifest["recipe"]["bounds"]["fidelity_db"] = 0
    (artifact / MANIFEST_FILE).write_text(json.dumps(manifest))


def reference_edited(artifact: Path) -> None:
    file = artifact / REFERENCE_FILE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def report_edited(artifact: Path) -> None:
    file = artifact / "report.json"
    file.write_text(file.read_text().replace('"valid": true', '"valid": false'))
