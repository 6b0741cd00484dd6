"""One artifact of several: the figures that a choice looks at, and what each may be compared on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import TemplateError

from report.page import REPORT_FILE
from runtime.artifact import (
    MODEL_FILE,
    ArtifactError,
    files_of,
    out_of_bounds,
    read_manifest,
    read_provenance,
    read_small,
)
from runtime.errors import BadArtifactError
from runtime.tokenizer import TOKENIZER_FILE

STEP = "whole"  # calls that are a step of generation without a cache, by the beginning of their names


@dataclass(frozen=True)
class Measure:
    """at_least: whether more is better; None for what is shown, and decides nothing. same: the share by which two may
    differ and still count as equal, for what was measured once."""

    title: str
    unit: str
    at_least: bool | None
    same: float = 0.0


MEASURES = {
    "bytes": Measure("size", "bytes", at_least=False),
    "kl": Measure("KL", "nats", at_least=False),
    "loss": Measure("loss", "nats", at_least=None),
    "solved": Measure("solved", "%", at_least=True),
    "ms": Measure("step", "ms", at_least=False, same=0.1),
    "memory": Measure("memory", "bytes", at_least=False, same=0.1),
    "length": Measure("length", "tokens", at_least=True),
}


@dataclass(frozen=True)
class Candidate:
    """Every file is what the manifest says. wrong: its figures that are out of bounds.

    values: by the names of `MEASURES`; missing: why one has none. basis: what a value was measured on: only with the
    same it is compared. material: the checkpoint and the inputs; artifacts of another one are another choice.
    """

    name: str
    folder: Path
    manifest: dict[str, Any]
    report: dict[str, Any]
    wrong: list[str]
    values: dict[str, float]
    missing: dict[str, str]
    basis: dict[str, str]
    material: str
    machine: str


@dataclass(frozen=True)
class Unusable:
    """A folder that holds no whole artifact of this version."""

    name: str
    folder: Path
    why: str


def open_candidate(folder: Path) -> Candidate:
    """Nothing is run. Raises `BadArtifactError`."""
    try:
        manifest = read_manifest(folder)
        if REPORT_FILE not in files_of(manifest):
            raise ArtifactError(f"{folder}: its manifest names no {REPORT_FILE}")
        report = json.loads(read_small(folder / REPORT_FILE))
        provenance = json.loads(read_provenance(folder))
    except (OSError, ValueError, RecursionError) as error:
        raise BadArtifactError(f"{folder / REPORT_FILE}: not a report: {type(error).__name__}: {error}") from error
    except ArtifactError as error:
        raise BadArtifactError(str(error)) from error
    with refusing(folder):
        values, missing = _values(manifest, report)
        machine = _machine(report["machine"])
        material = _material(manifest, report, provenance)
        task = manifest["solved"] and json.dumps([manifest["solved"]["task"], manifest["solved"]["n"]])
        basis = {"kl": material, "solved": f"{task} {material}", "ms": machine, "memory": machine}
        name, wrong = folder.resolve().name, out_of_bounds(manifest)
        return Candidate(name, folder, manifest, report, wrong, values, missing, basis, material, machine)


@contextmanager
def refusing(*folders: Path) -> Iterator[None]:
    """What a changed manifest or report can make go wrong anywhere."""
    try:
        yield
    except (
        LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, TemplateError,
    ) as error:  # fmt: skip
        raise BadArtifactError(
            f"{', '.join(map(str, folders))}: cannot be compared: {type(error).__name__}: {error}; "
            f"{'was it' if len(folders) == 1 else 'were they'} made by this version?"
        ) from error


def _values(manifest: dict[str, Any], report: dict[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """(what was measured, why the rest was not)."""
    figures = {figure["name"]: figure["value"] for figure in manifest["figures"]}
    steps = [float(call["seconds"]) for call in report["calls"] if call["where"].startswith(STEP)]
    found: dict[str, Any] = {
        "bytes": manifest["files"][MODEL_FILE]["bytes"],
        "kl": None if _is_random(manifest, figures) else figures.get("kl_divergence"),
        "loss": figures.get("loss_increase"),
        "solved": figures.get("solved_percent"),
        "ms": 1000 * median(steps) if steps else None,
        "memory": manifest["run"]["program_memory"],
        "length": manifest["export"]["max_seq_len"],
    }
    words = {
        "kl": "validated on random tokens, of which no quality can be told",
        "loss": "validated on no text",
        "solved": "solves no task",
    }
    values, missing = {}, {}
    for name, value in found.items():
        if value is None:
            missing[name] = words.get(name, "not measured")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            missing[name] = "not a number"
        else:
            values[name] = value
    return values, missing


def _is_random(manifest: dict[str, Any], figures: dict[str, Any]) -> bool:
    """Whether it was validated on neither a text nor the prompts of a task."""
    has_task = manifest["task"]["prompts"] is not None and TOKENIZER_FILE in manifest["files"]
    return "loss" not in figures and not has_task


def _material(manifest: dict[str, Any], report: dict[str, Any], provenance: dict[str, Any]) -> str:
    """The checkpoint, the settings, the files that were read by their digests, and the calls that came of it."""
    task, validation = manifest["task"], manifest["validation"]
    names = {f"task/{task['prompts']}", f"task/{task['checker']}", f"text/{validation['prompts']}"}
    listed = provenance["predicate"]["buildDefinition"]["resolvedDependencies"]
    digests = {entry["name"]: entry["digest"]["sha256"] for entry in listed if entry["name"] in names}
    asked = {key: task[key] for key in ("name", "new_tokens", "threshold")}
    calls = [
        [call["tokens"], call["kv_len"], call["rows"]] for call in report["calls"] if call["where"].startswith(STEP)
    ]
    return json.dumps([manifest["checkpoint"]["sha256"], asked, validation, digests, calls], sort_keys=True)


def _machine(machine: dict[str, Any]) -> str:
    counts = f"{machine['available']} of {machine['cpus']} processors, {machine['threads']} threads"
    return f"{machine['system']}, {counts}"


def checkpoint_of(candidate: Candidate) -> str:
    """Its name and the beginning of its digests, for people."""
    digests = candidate.manifest["checkpoint"]["sha256"]
    weights = [digest for name, digest in sorted(digests.items()) if name.endswith(".safetensors")]
    return f"{candidate.manifest['checkpoint']['name']} {weights[0][:8] if weights else ''}".strip()


def measured_on(candidate: Candidate) -> str:
    """The inputs, for people."""
    texts, task = candidate.manifest["validation"]["prompts"], candidate.manifest["task"]
    if texts is not None:
        return str(texts)
    if "loss" in candidate.values:
        return "the bundled text"
    return "random tokens" if "kl" not in candidate.values else f"the task {task['name']}"
