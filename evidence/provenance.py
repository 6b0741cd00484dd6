"""`provenance.json`: an in-toto statement with SLSA's predicate, what made the files of an artifact."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from runtime.artifact import MANIFEST_FILE, files_of, sha256

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:dreamedge:run:v1"  # docs/provenance.md says what its parameters are
BUILDER = "urn:dreamedge:pipeline"


def statement(
    folder: Path, manifest: dict[str, Any], inputs: dict[str, Path], sources: dict[str, Path]
) -> dict[str, Any]:
    """Of the files of `folder`, `manifest.json` among them.

    inputs: files by name that had a part in it and that the manifest does not name. sources: of DreamEdge, by name.
    """
    files = {name: entry["sha256"] for name, entry in files_of(manifest).items()}
    files[MANIFEST_FILE] = sha256(folder / MANIFEST_FILE)
    digests = {f"checkpoint/{name}": digest for name, digest in manifest["checkpoint"]["sha256"].items()}
    digests |= {name: sha256(file) for name, file in inputs.items()}
    versions = manifest["versions"]
    own = {"name": "dreamedge", "uri": f"pkg:generic/dreamedge@{version('dreamedge')}"}
    return {
        "_type": STATEMENT_TYPE,
        "subject": [_described(name, digest) for name, digest in sorted(files.items())],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "checkpoint": manifest["checkpoint"]["name"],
                    **{part: manifest[part] for part in ("recipe", "task", "validation", "export")},
                },
                "resolvedDependencies": [
                    *(_described(name, digest) for name, digest in sorted(digests.items())),
                    own | {"digest": {"sha256": source_digest(sources)}},
                    *(
                        {"name": name, "uri": f"pkg:pypi/{name}@{quote(versions[name])}"}
                        for name in ("torch", "executorch", "torchao")
                    ),
                ],
            },
            "runDetails": {
                "builder": {
                    "id": BUILDER,
                    "version": {"dreamedge": version("dreamedge"), "python": versions["python"]},
                },
                "metadata": {"finishedOn": manifest["run"]["created"]},
            },
        },
    }


def source_digest(sources: dict[str, Path]) -> str:
    """Of code and configuration: sha256 of what `sha256sum` says of the files, sorted by name."""
    lines = (f"{sha256(file)}  {name}\n" for name, file in sorted(sources.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _described(name: str, digest: str) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": digest}}
