"""The closing tables of a run and of a validation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from report.page import PAGE_FILE
from report.terminal import bound_text, mib, show, table, verdict_text
from runtime.errors import ValidationError, one_line
from validation.figure import Figure
from validation.judge import Validated


def show_run(
    console: Console,
    folder: Path,
    manifest: dict[str, Any],
    figures: list[Figure],
    validated: Validated,
    stages: list[dict[str, Any]],
) -> None:
    """figures: all that were measured. stages: name, seconds and peak_rss of each."""
    show_figures(console, figures)
    sizes, delegation = manifest["sizes"], manifest["delegation"]
    stored, program = sizes["checkpoint"], sizes["program"]
    facts = table("the program", "what", "value")
    facts.add_row("size", f"{mib(program)}, {program / stored:.2f} of the checkpoint's {mib(stored)}")
    facts.add_row("", f"{program / sizes['ideal_program']:.3f} of the recipe's ideal {mib(sizes['ideal_program'])}")
    per_weight = [f for f in validated.figures if f.name == "bytes_per_weight"]
    facts.add_row(
        "linear weights", ", ".join(f"{f.value:.4f} bytes each, {f.where}" for f in per_weight) or "in plain float32"
    )
    outside = sum(delegation["outside"].values())
    inside = sum(delegation["inside"].values())
    facts.add_row("delegation", f"{delegation['delegates']} delegates with {inside} operators, {outside} outside")
    facts.add_row("memory plan", f"{mib(sum(manifest['memory_plan']))}, caches included")
    replay = validated.measured.replay
    facts.add_row("in the runtime", f"loads in {replay.load_seconds:.2f} s, peak {mib(replay.peak_rss)} with Python")
    show(console, facts)
    costs = table("the stages", "stage", "seconds", "peak memory of the process")
    for stage in stages:
        costs.add_row(stage["name"], f"{stage['seconds']:.1f}", mib(stage["peak_rss"]))
    show(console, costs)
    console.print(f"verdict: {validated.verdict.words}", highlight=False, markup=False, soft_wrap=True)
    said = f"artifact: {os.path.relpath(folder)}, to look at: {PAGE_FILE}"
    console.print(said, highlight=False, markup=False, soft_wrap=True)


def show_again(console: Console, figures: list[Figure]) -> None:
    """What `validate` found. Raises `ValidationError` as `show_figures` does."""
    show_figures(console, figures)
    reported = sum(figure.bound is None for figure in figures)
    words = f"verdict: right, {len(figures) - reported} figures are within bounds, {reported} are reported"
    console.print(words, highlight=False, soft_wrap=True)


def show_figures(console: Console, figures: list[Figure]) -> None:
    """Raises `ValidationError` after the table if a figure is out of bounds."""
    listing = table("validation", "", "figure", "value", "bound", "", "where")
    groups = list(dict.fromkeys(figure.group for figure in figures))
    for figure in sorted(figures, key=lambda figure: groups.index(figure.group)):
        listing.add_row(
            figure.group,
            figure.name,
            f"{figure.value:.6g}",
            bound_text(figure),
            verdict_text(figure),
            Text(one_line(figure.where, 300)),  # an artifact's words, no markup
        )
    show(console, listing)
    wrong = [str(figure) for figure in figures if not figure.ok]
    if wrong:
        raise ValidationError("out of bounds: " + "; ".join(wrong))
