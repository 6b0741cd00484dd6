"""The judge: a program, its recorded calls and its recipe in, figures with their bounds out."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.bounds import Bounds
from recipes.options import Recipe
from runtime.artifact import MANIFEST_FILE, MODEL_FILE, REFERENCE_FILE, ArtifactError, read_manifest
from runtime.processor import native_float16
from validation.figure import Figure
from validation.figures import fidelity, metadata, program_format, quality, repeatability
from validation.format import ExpectedFormat, ProgramFormat, read_format
from validation.progress import Report, silent, within
from validation.reference import Reference, load_reference
from validation.replay import Answers, Replay, replay
from validation.solved import Solved

if TYPE_CHECKING:  # a harness has no omegaconf, which settings take
    from validation.settings import Budget
    from validation.verdict import Verdict

# The bounds of a recipe that decide without a task.
BOUNDS = ("fidelity_db", "fidelity_exact_db", "kl_slack")


# Bytes of the program times tokens of its second run: 538 tokens of Dream-7B in int4, in sequences of every kind but
# the longest.
REPEATED = 2**41


@dataclass(frozen=True)
class Measured:
    """figures: with their bounds. replay: the first of two runs."""

    reference: Reference
    figures: list[Figure]
    replay: Replay
    format: ProgramFormat

    def judged_by(self, reference: Reference, bounds: dict[str, float]) -> Measured:
        """The same answers, held against what is known now of how far ties may lead."""
        others = [figure for figure in self.figures if figure.group != "fidelity"]
        return replace(self, reference=reference, figures=[*fidelity(reference, self.replay, bounds), *others])


@dataclass(frozen=True)
class Validated:
    """float32_answers: the float32 model's, to the task that the program solved, if any."""

    figures: list[Figure]
    measured: Measured
    expected_format: ExpectedFormat
    solved: Solved | None
    float32_answers: Answers | None
    verdict: Verdict

    @property
    def ok(self) -> bool:
        return all(figure.ok for figure in self.figures)


def check_artifact(folder: Path, threads: int | None = None, report: Report = silent) -> Measured:
    """Everything that an artifact can show by itself. threads: as for `measure`.

    Raises `ArtifactError`, `ProgramError`, `ReferenceError`.
    """
    manifest = read_manifest(folder)
    reference_file = folder / REFERENCE_FILE
    bounds, expected = expectations(folder, manifest)
    reference = load_reference(reference_file)
    return measure(folder / MODEL_FILE, reference_file, reference, bounds, expected, threads, report)


def expectations(folder: Path, manifest: dict[str, Any]) -> tuple[dict[str, float], ExpectedFormat]:
    """What the manifest demands of the program."""
    try:
        given = manifest["recipe"]["bounds"]
        native = given["native_float16_db"]
        of_recipe = Bounds(
            **{name: checked_number(given[name]) for name in BOUNDS},
            native_float16_db=None if native is None else checked_number(native),
        )
        here = of_recipe.on(native_float16())
        bounds = {name: float(getattr(here, name)) for name in BOUNDS}
        budget = {name: bound for name, bound in manifest["budget"].items() if bound is not None}
        bounds |= {f"budget.{name}": checked_number(bound) for name, bound in budget.items()}
        expected = manifest["expected_format"]
        shapes = {
            key: tuple((int(rows), int(columns)) for rows, columns in expected[key])
            for key in ("linear_shapes", "helper_shapes")
        }
        return bounds, ExpectedFormat(
            weight_types=tuple(map(str, expected["weight_types"])),
            outside_ops=tuple(map(str, expected["outside_ops"])),
            linear_shapes=shapes["linear_shapes"],
            helper_shapes=shapes["helper_shapes"],
            weights={str(name): [str(d) for d in digests] for name, digests in expected["weights"].items()},
            bytes_per_weight=checked_number(expected["bytes_per_weight"]),
            planned_memory=checked_number(expected["planned_memory"]),
            metadata=dict(expected["metadata"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ArtifactError(f"{folder / MANIFEST_FILE}: not a manifest: {type(error).__name__}: {error}") from error


def checked_number(value: Any) -> float:
    """Raises `ValueError` for what is no number to compare with."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"a bound of {value!r}")
    return float(value)


def measure(
    pte: Path,
    reference_file: Path,
    reference: Reference,
    bounds: dict[str, float],
    expected: ExpectedFormat,
    threads: int | None = None,
    report: Report = silent,
) -> Measured:
    """Run the program twice over the recorded calls, each time in a new process, and take it apart.

    The second time over as many calls as `REPEATED` allows. threads: as for `runtime.threads.use_threads`.
    """
    report(f"{pte.name} taken apart")
    found = read_format(pte)
    run = partial(replay, pte, reference_file, planned_memory=expected.planned_memory, threads=threads)
    first = run(report=within(pte.name, report))
    repeated, again = REPEATED // max(1, pte.stat().st_size), within(f"{pte.name} again", report)
    second = run(solve=False, tokens=repeated, report=again)
    figures = [
        *fidelity(reference, first, bounds),
        *quality(reference, first, bounds),
        *program_format(found, expected),
        metadata(first, expected),
        repeatability(first, second),
    ]
    return Measured(reference, figures, first, found)


def figure_dict(figure: Figure) -> dict[str, Any]:
    """As the manifest keeps it; JSON has no infinity and no NaN."""
    entry = asdict(figure) | {"ok": figure.ok}
    if not math.isfinite(figure.value):
        entry["value"] = str(figure.value)
    return entry


def bounds_of(recipe: Recipe, budget: Budget) -> dict[str, float]:
    """The recipe's on this processor, and what the owner of the checkpoint allows, as `budget.NAME`."""
    allowed = {f"budget.{name}": bound for name, bound in vars(budget).items()}
    given = vars(recipe.bounds.on(native_float16())) | allowed
    return {name: float(bound) for name, bound in given.items() if bound is not None}
