"""Stage 6: the artifact folder, written aside and renamed into place when it is whole and valid.

What differs between two builds of the same is in `report.json`, `provenance.json`, and under `run` in the manifest.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from evidence.bundle import write_bundle
from evidence.manifest import MadeOf, file_entry, manifest_of
from evidence.provenance import statement
from pipeline.calibrate import Calibration
from pipeline.config import source_files
from pipeline.display import StageStats
from pipeline.estimate import Estimate
from pipeline.load import Loaded
from pipeline.lower import Lowered
from pipeline.schema import RunConfig
from report.page import PAGE_FILE, REPORT_FILE, render_report
from report.report_json import report_data
from runtime.artifact import MANIFEST_FILE, PROVENANCE_FILE
from runtime.defaults import GENERATION_CONFIG
from runtime.tokenizer import TOKENIZER_FILE
from runtime.tokenizer_files import read_object
from validation.arm import OnCore
from validation.figure import Figure
from validation.judge import Validated, figure_dict
from validation.products import kernels

RUN_FILES = (REPORT_FILE, PAGE_FILE)  # that hold times and memory, and so differ from run to run


@dataclass(frozen=True)
class Packaged:
    """figures: all that were measured, on this machine and on others."""

    folder: Path
    manifest: dict[str, Any]
    figures: list[Figure]


@dataclass(frozen=True)
class Sealed:
    """What a complete staging folder says of itself. inputs: files by the name that provenance gives them."""

    manifest: dict[str, Any]
    report: dict[str, Any]
    inputs: dict[str, Path]


def package(
    folder: Path,
    config: RunConfig,
    loaded: Loaded,
    calibration: Calibration | None,
    lowered: Lowered,
    validated: Validated,
    noise: dict[str, Any] | None,
    stages: list[StageStats],
    needs: Estimate,
) -> Sealed:
    """Complete the staging folder: tokenizer files, `model.bpte`, the reports, the manifest, and what made it all.

    noise: `report.report_json.noise_of`. Whatever tokenizer files the checkpoint has, an artifact has a tokenizer.json.
    """
    for file in loaded.tokenizer_files:
        shutil.copyfile(file, folder / file.name)
    if loaded.is_d2f:
        own = folder / GENERATION_CONFIG
        own.write_text(_json(read_object(own) | {"cache": "d2f"}), encoding="utf-8")
    if loaded.tokenizer is not None and not (folder / TOKENIZER_FILE).is_file():
        loaded.tokenizer.save(str(folder / TOKENIZER_FILE), pretty=False)
    write_bundle(lowered.pte, validated.measured.reference, loaded.config.vocab_size)
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    checker = Path(config.task.checker) if config.task.checker else None
    costs = ([asdict(stage) for stage in stages], asdict(needs))
    report = report_data(validated, noise, loaded.tokenizer, checker, *costs, created)
    made_of = MadeOf(
        checkpoint=loaded.folder.resolve().name,
        checkpoint_bytes=loaded.weights,
        sha256=loaded.digests,
        model=loaded.config.to_hf(),
        recipe=config.recipe,
        task=config.task,
        validation=config.validation,
        budget=config.budget,
        calibration=calibration.noted if calibration is not None else None,
        max_seq_len=lowered.max_seq_len,
        max_rows=lowered.max_rows,
        ideal_program=needs.output,
        eager=kernels(),
    )
    inputs = {f"checkpoint/{file.name}": file for file in loaded.tokenizer_files}
    inputs |= {f"task/{Path(file).name}": Path(file) for file in (config.task.prompts, config.task.checker) if file}
    texts = config.validation.prompts
    inputs |= {f"text/{Path(file).name}": Path(file) for file in (texts, config.calibration) if file}
    # As JSON keeps it, and as anybody reads it.
    manifest = json.loads(_json(manifest_of(folder, made_of, validated, created)))
    return _seal(folder, Sealed(manifest, report, inputs))


def with_cores(folder: Path, sealed: Sealed, cores: list[OnCore], stages: list[StageStats]) -> Sealed:
    """With what the program did on other processors: the runner reads a whole artifact, so that comes last."""
    listed = [
        {"core": one.core, "features": one.features, "figures": [figure_dict(figure) for figure in one.figures]}
        for one in cores
    ]
    seconds = {one.core: one.seconds for one in cores}
    valid = sealed.report["valid"] and all(figure.ok for one in cores for figure in one.figures)
    report = {**sealed.report, "valid": valid, "stages": [asdict(stage) for stage in stages], "cores": seconds}
    manifest = {**sealed.manifest, "cores": json.loads(_json(listed))}
    return _seal(folder, Sealed(manifest, report, sealed.inputs))


def _seal(folder: Path, sealed: Sealed) -> Sealed:
    """Write what differs between two builds, the manifest that names all files, and what says of which inputs."""
    manifest, report = sealed.manifest, sealed.report
    (folder / REPORT_FILE).write_text(_json(report), encoding="utf-8")
    (folder / PAGE_FILE).write_text(render_report(manifest, report), encoding="utf-8")
    manifest["run"]["files"] = {name: file_entry(folder / name) for name in RUN_FILES}
    (folder / MANIFEST_FILE).write_text(_json(manifest), encoding="utf-8")
    said = statement(folder, manifest, sealed.inputs, source_files())
    (folder / PROVENANCE_FILE).write_text(_json(said), encoding="utf-8")
    return sealed


def _json(content: object) -> str:
    return json.dumps(content, indent=2, default=_plain, allow_nan=False) + "\n"


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"{type(value).__name__} in a manifest")
