"""Run an artifact's recorded calls in other versions of executorch's runtime: do they give the bits of the one here?

    python -m scripts.compare_runtimes artifacts/dream_sudoku-* --versions 1.4.1 1.5.0 1.5.1 > docs/runtimes.json

The wheels are downloaded for this Python and unpacked beside; torch stays as it is. Prints JSON: by version and
artifact, how many calls there are and how many differ, or why it did not run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import safe_open

from runtime.artifact import MODEL_FILE, REFERENCE_FILE, read_manifest
from runtime.processor import machine
from tests.checkpoints import ROOT


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--versions", nargs="+", required=True)
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        here = {artifact: digests(artifact, None) for artifact in args.artifacts}
        for one in args.versions:
            unpacked = wheel(one, Path(folder))
            found[one] = {named(artifact): compared(artifact, unpacked, here[artifact]) for artifact in args.artifacts}
    said = {"here": version("executorch"), "torch": version("torch"), "runtimes": found} | machine()
    sys.stdout.write(json.dumps(said, indent=2) + "\n")


def named(artifact: Path) -> str:
    return str(read_manifest(artifact)["recipe"]["name"])


def wheel(number: str, folder: Path) -> Path:
    """Its folder, which is put before the installed packages."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*download, "--dest", str(folder / "wheels"), f"executorch=={number}"], check=True)
    (file,) = (folder / "wheels").glob(f"executorch-{number}-*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / number)
    return folder / number


def compared(artifact: Path, unpacked: Path, here: dict[str, list[str]]) -> dict[str, Any]:
    try:
        there = digests(artifact, unpacked)
    except subprocess.CalledProcessError as error:
        return {"failed": str(error.stderr).strip().splitlines()[-1]}
    pairs = [(one, other) for name, calls in here.items() for one, other in zip(calls, there[name], strict=True)]
    return {"calls": len(pairs), "differ": sum(one != other for one, other in pairs)}


def digests(artifact: Path, unpacked: Path | None) -> dict[str, list[str]]:
    """Of the logits of each recorded call, by sequence; unpacked: an executorch in place of the installed one."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.safetensors"
        command = [sys.executable, "-m", "validation.replay", str((artifact / MODEL_FILE).resolve())]
        command += [str((artifact / REFERENCE_FILE).resolve()), str(output), "0"]
        environment = os.environ | ({} if unpacked is None else {"PYTHONPATH": str(unpacked)})
        subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment)
        with safe_open(output, framework="pt") as opened:
            kept: dict[str, list[str]] = json.loads(opened.metadata()["replay"])["digests"]
            return kept


if __name__ == "__main__":
    main()
