"""What a search has found: the artifacts that no other beats, as a plot, and the best of them as a recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from pipeline.job import Record
from report.files import write_json, write_text
from report.front import Point, front_plots
from report.page import picture
from runtime.artifact import MANIFEST_FILE

FRONT_FILE, PLOT_FILE, RECIPE_FILE = "front.json", "front.svg", "best.yaml"


def write_found(folder: Path, records: Sequence[Record]) -> str:
    """Writes the three files into `folder`, if anything was made. Returns what to say of it. Raises `OutputError`."""
    points = [
        Point(Path(record.output).name, *record.objectives) for record in records if record.objectives is not None
    ]
    if not points:
        return "nothing was made, so there is no front"
    on_front = front_of(points)
    best = best_of(on_front)
    outputs = {Path(record.output).name: record for record in records}
    listed = [vars(one) | {"overrides": outputs[one.name].overrides, "front": one in on_front} for one in points]
    write_json(folder / FRONT_FILE, {"points": listed, "best": best.name})
    write_text(folder / PLOT_FILE, picture(front_plots(points, on_front, best)))
    recipe = json.loads(Path(outputs[best.name].output, MANIFEST_FILE).read_text(encoding="utf-8"))["recipe"]
    recipe["name"] += "-best"
    recipe["description"] += f"; the best of {len(points)} that a search tried"
    write_text(folder / RECIPE_FILE, OmegaConf.to_yaml(OmegaConf.create(recipe)))
    said = f"{len(on_front)} of {len(points)} are on the front, {folder / PLOT_FILE}"
    return f"{said}; the best as a recipe: recipe={folder / RECIPE_FILE}"


def front_of(points: Sequence[Point]) -> list[Point]:
    """Those of which none is at least as good in everything, and better in something."""

    def beats(one: Point, other: Point) -> bool:
        pairs = list(zip(one.objectives, other.objectives, strict=True))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    return [point for point in points if not any(beats(other, point) for other in points)]


def best_of(front: Sequence[Point]) -> Point:
    """The nearest to the best of all in everything, each objective as a share of its range on the front."""
    columns = list(zip(*(point.objectives for point in front), strict=True))
    least, ranges = [min(c) for c in columns], [max(c) - min(c) or 1.0 for c in columns]

    def distance(point: Point) -> float:
        return sum(((x - a) / r) ** 2 for x, a, r in zip(point.objectives, least, ranges, strict=True))

    return min(front, key=distance)
