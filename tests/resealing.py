"""What somebody does who changes an artifact, and knows which digests there are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from runtime.artifact import MANIFEST_FILE, PROVENANCE_FILE, files_of, sha256


def reseal(artifact: Path) -> None:
    """Bring the digests of the manifest, and those of `provenance.json`, in line with the files."""
    manifest = json.loads((artifact / MANIFEST_FILE).read_text())
    there = {file.name for file in artifact.iterdir()}
    for entries in (manifest["files"], manifest["run"]["files"]):
        for name in entries:
            if name in there:
                entries[name] = {"sha256": sha256(artifact / name), "bytes": (artifact / name).stat().st_size}
    (artifact / MANIFEST_FILE).write_text(json.dumps(manifest))
    digests = {name: entry["sha256"] for name, entry in files_of(manifest).items()}
    digests[MANIFEST_FILE] = sha256(artifact / MANIFEST_FILE)
    statement = json.loads((artifact / PROVENANCE_FILE).read_text())
    statement["subject"] = [{"name": name, "digest": {"sha256": digest}} for name, digest in digests.items()]
    (artifact / PROVENANCE_FILE).write_text(json.dumps(statement))


def variant(
    source: Path,
    folder: Path,
    figures: dict[str, Any] | None = None,
    slower: float = 1.0,
    padding: int = 0,
    machine: dict[str, Any] | None = None,
    **manifest: Any,
) -> Path:
    """A copy of an artifact that says something else of itself, and is whole.

    figures: values by name. slower: a factor of all times. padding: bytes that its program is larger by.
    """
    shutil.copytree(source, folder)
    changed = json.loads((folder / MANIFEST_FILE).read_text()) | manifest
    for figure in changed["figures"]:
        figure["value"] = (figures or {}).get(figure["name"], figure["value"])
    report = json.loads((folder / "report.json").read_text())
    report["machine"] |= machine or {}
    for call in report["calls"]:
        call["seconds"] *= slower
    with (folder / "model.pte").open("ab") as file:
        file.write(bytes(padding))
    (folder / MANIFEST_FILE).write_text(json.dumps(changed))
    (folder / "report.json").write_text(json.dumps(report))
    reseal(folder)
    return folder
