"""`validate baseline=DIR`: an artifact against another, say the last release. Worse by more than a margin fails."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.artifact import MANIFEST_FILE, MODEL_FILE, ArtifactError, read_manifest
from runtime.errors import BadArtifactError, UsageError
from validation.figure import Figure
from validation.progress import Report
from validation.speed import Settings, run_bench

QUALITY = ("top1_agreement", "kl_divergence", "sqnr_db", "cosine", "max_abs_diff", "solved_percent")
LENGTHS = (1, 32, 128)  # tokens of the calls that are timed; max_seq_len comes besides
ROUNDS = 2


@dataclass(frozen=True)
class Baseline:
    """figures: what was measured when it was made, by name."""

    pte: Path
    figures: dict[str, float]


def open_baseline(folder: Path, manifest: dict[str, Any]) -> Baseline:
    """manifest: of the artifact that is held against it.

    Raises `BadArtifactError`, and `UsageError` if the two were not validated on the same: their figures say nothing of
    each other then.
    """
    try:
        theirs = read_manifest(folder)
        for part in ("task", "validation"):
            for key in sorted(theirs[part].keys() & manifest[part].keys()):
                if theirs[part][key] != manifest[part][key]:
                    raise UsageError(
                        f"baseline {folder} was validated with {part}.{key}={theirs[part][key]!r}, the artifact with "
                        f"{manifest[part][key]!r}: their figures cannot be compared"
                    )
        figures = {str(figure["name"]): float(figure["value"]) for figure in theirs["figures"]}
        if missing := {*QUALITY, "planned_memory"} - {"solved_percent"} - figures.keys():
            raise ValueError(f"lacks the figures {', '.join(sorted(missing))}")
        return Baseline(folder / MODEL_FILE, figures)
    except ArtifactError as error:
        raise BadArtifactError(str(error)) from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BadArtifactError(f"{folder / MANIFEST_FILE}: not a manifest: {type(error).__name__}: {error}") from error


def against_baseline(
    figures: list[Figure],
    pte: Path,
    baseline: Baseline,
    margins: dict[str, float],
    report: Report,
    threads: int | None = None,
) -> list[Figure]:
    """figures: the artifact's, measured now. Both programs are timed here, in turn. Raises `BadArtifactError`."""
    found = {figure.name: figure for figure in figures}
    compared = []
    for name in QUALITY:
        if name in baseline.figures:
            at_least = name not in ("kl_divergence", "max_abs_diff")
            now = found[name].value if name in found else math.nan  # no longer measured is not as good
            compared.append(_figure(name, now, baseline.figures[name], margins[name], at_least))
    sizes = {
        "planned_memory": (found["planned_memory"].value, baseline.figures["planned_memory"]),
        "program_bytes": (pte.stat().st_size, baseline.pte.stat().st_size),
    }
    for name, (now, then) in sizes.items():
        compared.append(_figure(name, now, then, margins["size"] * then, at_least=False))
    for T, (now, then) in call_seconds(pte, baseline.pte, report, threads).items():
        compared.append(_figure(f"seconds_of_{T}_tokens", now, then, margins["seconds"] * then, at_least=False))
    return compared


def call_seconds(one: Path, other: Path, report: Report, threads: int | None = None) -> dict[int, tuple[float, float]]:
    """By length of the call, of both programs: the best median of several processes.

    They take turns, each first once: what else the machine does, it does to both.
    """
    settings = Settings(
        lengths=LENGTHS,
        kv_len=0,
        prompt_len=1,
        new_tokens=0,
        block_length=32,
        steps=None,
        threshold=1.0,
        repeats=3,
        seed=0,
        threads=threads,
    )
    best: dict[Path, dict[int, float]] = {one: {}, other: {}}
    for i in range(ROUNDS):
        for j, pte in enumerate((one, other) if i % 2 == 0 else (other, one)):
            report("processes that were timed", 2 * i + j, 2 * ROUNDS)
            for call in run_bench(pte, settings, lambda _: None)["calls"]:
                T = call["tokens"]
                best[pte][T] = min(call["seconds"]["median"], best[pte].get(T, math.inf))
    return {T: (best[one][T], best[other][T]) for T in best[one] if T in best[other]}


def _figure(name: str, now: float, then: float, margin: float, at_least: bool) -> Figure:
    bound = then - margin if at_least else then + margin
    return Figure("baseline", name, now, bound, at_least, f"the baseline's is {then:.6g}")
