"""Two artifacts in detail, from what their manifests and reports hold. Nothing is run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from report.candidate import Candidate
from report.plots import PARTS, size

SAME = 0.01  # values nearer to each other are neither better nor worse
SAME_ONCE = 0.1  # times, and the memory of processes, were measured once
ELSEWHERE = ("recipe.description", "recipe.outside_ops")  # is said, and what comes of it is in the graph
# Calls that a comparison shows, by the beginning of their names.
KINDS = {"one token": "one-token", "a whole sequence": "whole", "the longest call": "max-length, call 0"}
MOST = 3  # shapes that a note names
Side = Literal["a", "b"]
Shape = tuple[int, int, int]  # of a call: tokens, kv_len, rows


Both = tuple[Candidate, Candidate]


@dataclass(frozen=True)
class Row:
    """a, b: what the artifacts have, None where one has none. better: which of them, where one is."""

    group: str
    name: str
    a: Any
    b: Any
    unit: str = ""
    better: Side | None = None

    @property
    def change(self) -> str:
        """From a to b: a factor of bytes and times, else a difference."""
        if self.group == "made of" or not _is_number(self.a) or not _is_number(self.b) or self.a == self.b:
            return ""
        if self.unit in ("bytes", "s") and self.a > 0:
            return f"{self.b / self.a:.2f}x"
        return f"{self.b - self.a:+.4g}"


@dataclass(frozen=True)
class Comparison:
    a: Candidate
    b: Candidate
    notes: list[str]
    rows: list[Row]

    @property
    def groups(self) -> list[str]:
        return list(dict.fromkeys(row.group for row in self.rows))


def compared(a: Candidate, b: Candidate) -> Comparison:
    """For use within `refusing`."""
    rows = [row for group in (_made_of, _sizes, _speed, _quality, _graph) for row in group((a, b))]
    return Comparison(a, b, [*_notes(a, b), *_left_out((a, b))], rows)


def _notes(a: Candidate, b: Candidate) -> list[str]:
    """What has to be known before figures are held against each other."""
    notes = []
    if a.manifest["files"]["model.pte"]["sha256"] == b.manifest["files"]["model.pte"]["sha256"]:
        notes.append("model.pte is the same, byte for byte")
    if a.manifest["checkpoint"]["sha256"] != b.manifest["checkpoint"]["sha256"]:
        notes.append("made of different checkpoints: quality is against another model each")
    if any(a.manifest[key] != b.manifest[key] for key in ("task", "validation", "export")):
        notes.append("validated on different inputs: see what differs in task, validation and export")
    if a.report["machine"] != b.report["machine"]:
        notes.append("measured on different machines or in other numbers of threads: times and memory say little")
    return notes


def _made_of(both: Both) -> Iterator[Row]:
    """Only what differs."""
    yield _row("made of", "verdict", ["valid" if one.report["valid"] else "out of bounds" for one in both])
    keys = ("checkpoint", "recipe", "task", "validation", "export", "versions")
    a, b = (dict(_flat({key: one.manifest[key] for key in keys})) for one in both)
    for key in dict.fromkeys([*a, *b]):
        if a.get(key) != b.get(key) and key not in ELSEWHERE:
            yield _row("made of", key, [a.get(key), b.get(key)])


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, ", ".join(map(str, value)) if isinstance(value, list) else value


def _sizes(both: Both) -> Iterator[Row]:
    sizes = [one.manifest["sizes"] for one in both]
    yield _row("size", "model.pte", [s["program"] for s in sizes], "bytes", at_least=False)
    for part, name in PARTS.items():
        yield _row("size", name, [s["parts"][part] for s in sizes], "bytes", at_least=False)
    yield _row("size", "of the recipe's ideal", [s["program"] / s["ideal_program"] for s in sizes])
    yield _row("size", "planned memory", [sum(one.manifest["memory_plan"]) for one in both], "bytes", at_least=False)


def _speed(both: Both) -> Iterator[Row]:
    """What was measured while they were made and validated; `bench` measures more closely."""

    def once(name: str, values: list[float], unit: str = "s") -> Row:
        return _row("speed", name, values, unit, at_least=False, same=SAME_ONCE)

    programs = [one.report["program"] for one in both]
    yield once("loads in", [program["load_seconds"] for program in programs])
    for name, kind in KINDS.items():
        seconds = [_seconds(one.report["calls"], kind) for one in both]
        shared = seconds[0].keys() & seconds[1].keys()
        if shared:
            yield once(f"{name}, median", [median(by_shape[shape] for shape in shared) for by_shape in seconds])
    yield once("peak memory of the program", [program["peak_rss"] for program in programs], "bytes")
    stages = [one.report["stages"] for one in both]
    yield once("made in", [sum(stage["seconds"] for stage in listed) for listed in stages])
    peaks = [max(stage["peak_rss"] for stage in listed) for listed in stages]
    yield once("peak memory of the making", peaks, "bytes")


def _seconds(calls: list[dict[str, Any]], kind: str) -> dict[Shape, float]:
    """The median of the calls of each shape: what they take is only compared with calls of the same."""
    seconds: dict[Shape, list[float]] = {}
    for call in calls:
        if call["where"].startswith(kind):
            seconds.setdefault((call["tokens"], call["kv_len"], call["rows"]), []).append(float(call["seconds"]))
    return {shape: median(values) for shape, values in seconds.items()}


def _left_out(both: Both) -> Iterator[str]:
    for name, kind in KINDS.items():
        a, b = (_seconds(one.report["calls"], kind).keys() for one in both)
        if a != b:
            sides = " and ".join(_shapes(side, only) for side, only in (("a", a - b), ("b", b - a)) if only)
            yield f"speed of {name}: left out are calls that the other has not: {sides}"


def _shapes(side: str, shapes: set[Shape]) -> str:
    listed = [f"{tokens} of {kv_len} with {rows} rows" for tokens, kv_len, rows in sorted(shapes)]
    more = f" and {len(listed) - MOST} more" if len(listed) > MOST else ""
    return f"{side}'s {', '.join(listed[:MOST])}{more}"


def _quality(both: Both) -> Iterator[Row]:
    """The figures; of counts only those that are not 0 in both, of sizes none."""
    figures = [{figure["name"]: figure for figure in one.manifest["figures"]} for one in both]
    for name in dict.fromkeys([*figures[0], *figures[1]]):
        found = [by_name[name] for by_name in figures if name in by_name]
        values = [by_name[name]["value"] if name in by_name else None for by_name in figures]
        is_shown = found[0]["group"] in ("fidelity", "quality") or any(values)
        if is_shown and name not in ("planned_memory", "bytes_per_weight"):
            yield _row("quality", name, values, _unit(name), at_least=found[0]["at_least"])


def _graph(both: Both) -> Iterator[Row]:
    """Totals, then the operators that differ."""
    graphs = [one.manifest["delegation"] for one in both]
    yield _row("graph", "delegates", [graph["delegates"] for graph in graphs])
    for where in ("inside", "outside"):
        yield _row("graph", f"operators {where} them", [sum(graph[where].values()) for graph in graphs])
    for where in ("inside", "outside"):
        for name in sorted({*graphs[0][where], *graphs[1][where]}):
            counts = [graph[where].get(name, 0) for graph in graphs]
            if counts[0] != counts[1]:
                yield _row("graph", f"{where}: {name}", counts)


def _row(
    group: str, name: str, values: list[Any], unit: str = "", at_least: bool | None = None, same: float = SAME
) -> Row:
    """at_least: whether more is better; None where neither is."""
    a, b = values
    better: Side | None = None
    if at_least is not None and _is_number(a) and _is_number(b) and abs(a - b) > same * max(abs(a), abs(b)):
        better = "a" if (a > b) == at_least else "b"
    return Row(group, name, a, b, unit, better)


def _unit(figure: str) -> str:
    return "dB" if figure.endswith("_db") else "%" if figure.endswith("_percent") else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def cell_text(value: Any, unit: str) -> str:
    if value is None:
        return "-"
    if not _is_number(value):
        return str(value)
    if unit == "bytes":
        return size(value)
    if unit == "s":
        return f"{value:,.1f} s" if value >= 1 else f"{1000 * value:.2f} ms"
    return f"{value:,.5g}{' ' * (unit == 'dB')}{unit}"
