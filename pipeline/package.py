"""Stage 6: the artifact folder, written aside and renamed into place when it is whole and valid.

What differs between two builds of the same is in `report.json`, `provenance.json`, and under `run` in the manifest.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline import detail
from pipeline.bundle import write_bundle
from pipeline.config import RunConfig
from pipeline.display import StageStats
from pipeline.errors import OutputError
from pipeline.estimate import Estimate
from pipeline.load import Loaded
from pipeline.lower import Lowered
from pipeline.output import machine
from pipeline.provenance import statement
from pipeline.report import PAGE_FILE, REPORT_FILE, render_report
from pipeline.tokenizer import TOKENIZER_FILE
from pipeline.validate import Validated
from recipes.static_program import CONTRACT_VERSION
from runtime.artifact import MANIFEST_FILE, PROVENANCE_FILE, SCHEMA_VERSION, figure_dict, sha256

RUN_FILES = (REPORT_FILE, PAGE_FILE)  # that hold times and memory, and so differ from run to run


@dataclass(frozen=True)
class Packaged:
    folder: Path
    manifest: dict[str, Any]


@contextmanager
def staging(output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `output` to write into; gone at the end, unless `place` renamed it. Raises `OutputError`."""
    try:
        if _old(output).exists() and not output.exists():  # a run was killed between the two renames of `place`
            _old(output).rename(output)
        is_there = output.exists()
    except OSError as error:  # a name too long, a folder that may not be looked into
        raise OutputError(f"output {output} cannot be written: {error.strerror or error}") from error
    if is_there and not overwrite:
        raise OutputError(f"output {output} is already there: choose another, or give overwrite=true")
    if is_there and not (output / MANIFEST_FILE).is_file():
        raise OutputError(f"output {output} is there and is no artifact: it is not overwritten")
    folder = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    except OSError as error:
        raise OutputError(f"output {output} cannot be written: {error.strerror or error}") from error
    try:
        yield folder
    except OSError as error:
        raise OutputError(f"output {output} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def package(
    folder: Path,
    config: RunConfig,
    loaded: Loaded,
    lowered: Lowered,
    validated: Validated,
    noise: dict[str, Any] | None,
    stages: list[StageStats],
    needs: Estimate,
) -> dict[str, Any]:
    """Complete the staging folder: tokenizer files, `model.bpte`, the reports, the manifest, and what made it all.

    noise: `detail.noise`. Whatever tokenizer files the checkpoint has, an artifact has a tokenizer.json.
    """
    for file in loaded.tokenizer_files:
        shutil.copyfile(file, folder / file.name)
    if loaded.tokenizer is not None and not (folder / TOKENIZER_FILE).is_file():
        loaded.tokenizer.save(str(folder / TOKENIZER_FILE), pretty=False)
    write_bundle(lowered.pte, validated.measured.reference, loaded.config.vocab_size)
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    report = _report(config, loaded, validated, stages, needs, created) | {"noise": noise}
    (folder / REPORT_FILE).write_text(_json(report), encoding="utf-8")
    # As JSON keeps it, and as anybody reads it.
    manifest = json.loads(_json(_manifest(folder, config, loaded, lowered, validated, needs, created)))
    (folder / PAGE_FILE).write_text(render_report(manifest, report), encoding="utf-8")
    manifest["run"]["files"][PAGE_FILE] = _entry(folder / PAGE_FILE)
    (folder / MANIFEST_FILE).write_text(_json(manifest), encoding="utf-8")
    inputs = {f"checkpoint/{file.name}": file for file in loaded.tokenizer_files}
    inputs |= {f"task/{Path(file).name}": Path(file) for file in (config.task.prompts, config.task.checker) if file}
    (folder / PROVENANCE_FILE).write_text(_json(statement(folder, manifest, inputs)), encoding="utf-8")
    return manifest


def place(folder: Path, output: Path) -> Path:
    """Rename the staging folder to `output`; what was there goes only once the new one is in place."""
    if not output.exists():
        folder.rename(output)
    elif not _exchange(folder, output):
        old = _old(output)
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
        folder.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    return output


def _exchange(one: Path, other: Path) -> bool:
    """Two folders take each other's name in one step, so that at no moment one is missing. False where none can."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "renameat2"):  # not Linux
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE: see renameat2(2)
    return bool(libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _old(output: Path) -> Path:
    return output.with_name(f".{output.name}.old")


def place_failed(folder: Path, output: Path) -> Path:
    """Keep what is out of bounds under another name, that nobody takes for an artifact."""
    failed = output.with_name(f"{output.name}.failed")
    shutil.rmtree(failed, ignore_errors=True)
    folder.rename(failed)
    return failed


def _report(
    config: RunConfig, loaded: Loaded, validated: Validated, stages: list[StageStats], needs: Estimate, created: str
) -> dict[str, Any]:
    measured, replay = validated.measured, validated.measured.replay
    examples = None
    if measured.reference.task and validated.float32_answers and replay.answers and loaded.tokenizer:
        assert config.task.checker is not None
        answers = (validated.float32_answers, replay.answers)
        examples = detail.examples(loaded.tokenizer, measured.reference.task, Path(config.task.checker), *answers)
    return {
        "valid": validated.ok,
        "created": created,
        "machine": machine(),
        "stages": [asdict(stage) for stage in stages],
        "estimate": asdict(needs),
        "program": {
            "load_seconds": replay.load_seconds,
            "run_seconds": replay.run_seconds,
            "peak_rss": replay.peak_rss,
            "anonymous": replay.anonymous,
        },
        "figures": [figure_dict(figure) for figure in validated.figures],
        "solved": asdict(validated.solved) if validated.solved else None,
        "calls": detail.calls(measured),
        "differences": detail.differences(measured),
        "agreement": detail.agreement(measured),
        "examples": examples,
    }


def _manifest(
    folder: Path,
    config: RunConfig,
    loaded: Loaded,
    lowered: Lowered,
    validated: Validated,
    needs: Estimate,
    created: str,
) -> dict[str, Any]:
    found = validated.measured.format
    files = {file.name: _entry(file) for file in sorted(folder.iterdir()) if file.name != MANIFEST_FILE}
    return {
        "schema_version": SCHEMA_VERSION,
        "contract_version": CONTRACT_VERSION,
        "checkpoint": {"name": loaded.folder.resolve().name, "bytes": loaded.weights, "sha256": loaded.digests},
        "model": loaded.config.to_hf(),
        "recipe": asdict(config.recipe),
        "task": asdict(config.task) | {"prompts": _name(config.task.prompts), "checker": _name(config.task.checker)},
        "validation": asdict(config.validation),
        "export": {"max_seq_len": lowered.max_seq_len, "max_rows": lowered.max_rows},
        "versions": {name: version(name) for name in ("torch", "executorch", "torchao")}
        | {"python": platform.python_version(), "target": "XNNPACK, CPU"},
        "sizes": {
            "checkpoint": loaded.weights,
            "program": lowered.pte.stat().st_size,
            "ideal_program": needs.output,
            "linear_weights": sum(w.n_bytes for w in found.linears),
            "parts": _parts(validated.expected_format.weights, found.constants, lowered.pte.stat().st_size),
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
        "files": {name: entry for name, entry in files.items() if name not in RUN_FILES},
        "run": {
            "created": created,
            "machine": machine(),
            "files": {name: entry for name, entry in files.items() if name in RUN_FILES},
        },
    }


def _entry(file: Path) -> dict[str, Any]:
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


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, default=_plain, allow_nan=False) + "\n"


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"{type(value).__name__} in a manifest")
