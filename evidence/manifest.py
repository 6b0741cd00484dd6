"""`manifest.json`: what an artifact was made of, and every figure with its bound."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evidence.device import device_needs
from recipes.options import Recipe
from runtime.artifact import MANIFEST_FILE, MODEL_FILE, SCHEMA_VERSION, sha256
from runtime.processor import machine
from runtime.program import CONTRACT_VERSION
from validation.judge import Validated, figure_dict
from validation.settings import Budget, TaskConfig, ValidationConfig


@dataclass(frozen=True)
class MadeOf:
    """What a run was given. sha256: of the checkpoint's files by name. model: the network's config.json.

    calibration: the text that rounding went by, if any.
    ideal_program: bytes of the program, if it held its weights and nothing else. eager: the code that multiplied there.
    """

    checkpoint: str
    checkpoint_bytes: int
    sha256: dict[str, str]
    model: dict[str, Any]
    recipe: Recipe
    task: TaskConfig
    validation: ValidationConfig
    budget: Budget
    calibration: dict[str, Any] | None
    max_seq_len: int
    max_rows: int
    ideal_program: int
    eager: dict[str, str]


def manifest_of(folder: Path, made_of: MadeOf, validated: Validated, created: str) -> dict[str, Any]:
    """Of the files that are in `folder`: those that every build repeats."""
    program, task = (folder / MODEL_FILE).stat().st_size, made_of.task
    found = validated.measured.format
    files = {file.name: file_entry(file) for file in sorted(folder.iterdir()) if file.name != MANIFEST_FILE}
    return {
        "schema_version": SCHEMA_VERSION,
        "contract_version": CONTRACT_VERSION,
        "checkpoint": {"name": made_of.checkpoint, "bytes": made_of.checkpoint_bytes, "sha256": made_of.sha256},
        "model": made_of.model,
        "recipe": asdict(made_of.recipe),
        "task": asdict(task)
        | {
            "prompts": _name(task.prompts),
            "checker": _name(task.checker),
            "calibration": _name(task.calibration),
            "checkpoint": None,
        },
        "validation": asdict(made_of.validation) | {"prompts": _name(made_of.validation.prompts)},
        "budget": asdict(made_of.budget),
        "calibration": made_of.calibration,
        "verdict": asdict(validated.verdict),
        "export": {"max_seq_len": made_of.max_seq_len, "max_rows": made_of.max_rows},
        "versions": {name: version(name) for name in ("torch", "executorch", "torchao")}
        | {"python": platform.python_version(), "target": "XNNPACK, CPU"},
        "eager": made_of.eager,
        "sizes": {
            "checkpoint": made_of.checkpoint_bytes,
            "program": program,
            "ideal_program": made_of.ideal_program,
            "linear_weights": sum(w.n_bytes for w in found.linears),
            "parts": _parts(validated.expected_format.weights, found.constants, program),
        },
        "memory_plan": list(found.planned_memory),
        "delegation": {
            "delegates": len(found.delegates),
            "inside": found.delegated_ops,
            "outside": found.operators,
        },
        "expected_format": asdict(validated.expected_format),
        "figures": [figure_dict(figure) for figure in validated.figures],
        "solved": asdict(validated.solved) if validated.solved else None,
        "cores": [],
        "device": device_needs(folder / MODEL_FILE, found),
        "files": files,
        "run": {
            "created": created,
            "machine": machine() | {"threads": validated.measured.replay.threads},
            "program_memory": validated.measured.replay.grown,
            "files": {},
        },
    }


def file_entry(file: Path) -> dict[str, Any]:
    return {"sha256": sha256(file), "bytes": file.stat().st_size}


def _parts(weights: dict[str, list[str]], constants: dict[str, int], program: int) -> dict[str, int]:
    """Bytes of the program by the part of the network that they belong to; what two share is the first one's."""
    sizes = dict.fromkeys(("embedding", "attention", "mlp", "output", "norms", "rope"), 0)
    left = dict(constants)
    for name, digests in weights.items():
        found = next((digest for digest in digests if digest in left), None)
        if found is not None:
            sizes[_part(name)] += left.pop(found)
    return sizes | {"other": program - sum(sizes.values())}


def _part(name: str) -> str:
    named = {"embed_tokens": "embedding", "self_attn": "attention", "mlp": "mlp", "lm_head": "output", "rope": "rope"}
    return next((part for word, part in named.items() if word in name.split(".")), "norms")


def _name(file: str | None) -> str | None:
    """A manifest names no path of the machine that made it."""
    return file and Path(file).name
