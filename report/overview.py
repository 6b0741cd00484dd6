"""Any number of artifacts on one page: what each costs and loses, and which of them nothing here beats."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from report.candidate import (
    MEASURES,
    Candidate,
    Unusable,
    checkpoint_of,
    measured_on,
    open_candidate,
    refusing,
)
from report.comparison import Comparison, cell_text, compared
from report.plots import size
from runtime.artifact import files_of
from runtime.errors import BadArtifactError

MOST = 3  # names that a line lists


@dataclass(frozen=True)
class Overview:
    """groups: candidates of the same checkpoint and inputs, by their names for people; each has a front of its own.

    beaten: by the name of a candidate, those of its group that are at least as good in all that can be compared, and
    better in something. details: each against the first.
    """

    groups: dict[str, list[Candidate]]
    unusable: list[Unusable]
    beaten: dict[str, list[str]]
    notes: list[str]
    details: list[Comparison]

    @property
    def candidates(self) -> list[Candidate]:
        return [one for group in self.groups.values() for one in group]

    def place(self, one: Candidate) -> str:
        """What it has come to, in words."""
        if one.wrong:
            return f"out of bounds: {', '.join(one.wrong)}"
        by = self.beaten[one.name]
        return f"beaten by {listed(by)}" if by else "front"


def overview_of(folders: list[Path]) -> Overview:
    """Nothing is run. Raises `BadArtifactError` where no folder holds an artifact that can be read."""
    opened, unusable = open_all(folders)
    if not opened:
        raise BadArtifactError("; ".join(one.why for one in unusable))
    with refusing(*folders):
        groups = _grouped(opened)
        beaten = {
            one.name: [] if one.wrong else [other.name for other in group if beats(other, one)]
            for group in groups.values()
            for one in group
        }
        first, *others = opened
        details = [compared(first, other) for other in others]
        return Overview(groups, unusable, beaten, list(_notes(groups)), details)


def open_all(folders: list[Path]) -> tuple[list[Candidate], list[Unusable]]:
    """Each with a name of its own. A candidate can also be held against any other, and shown."""
    opened: list[Candidate] = []
    unusable = []
    for folder, name in zip(folders, names_of(folders), strict=True):
        try:
            one = open_candidate(folder)
            with refusing(folder):
                for row in compared(one, one).rows:
                    cell_text(row.a, row.unit)
                opened.append(Candidate(**vars(one) | {"name": name}))
        except BadArtifactError as error:
            unusable.append(Unusable(name, folder, str(error)))
    return opened, unusable


def names_of(folders: list[Path]) -> list[str]:
    """The folders' names; where two have the same, the paths as they were given, and a number for one given twice."""
    short = [folder.resolve().name for folder in folders]
    names = [str(f) if short.count(name) > 1 else name for f, name in zip(folders, short, strict=True)]
    return [f"{name} ({names[:i].count(name) + 1})" if name in names[:i] else name for i, name in enumerate(names)]


def beats(one: Candidate, other: Candidate) -> bool:
    """At least as good in all that can be compared, and better in something. What was not measured is the worst.

    Nothing beats another whose own loss nobody knows.
    """
    if one.wrong or "kl" not in one.values or one.material != other.material:
        return False
    is_better = bool(other.wrong)
    for name, measure in MEASURES.items():
        if measure.at_least is None or one.basis.get(name) != other.basis.get(name):
            continue
        sign = -1 if measure.at_least else 1
        mine, theirs = (sign * side.values[name] if name in side.values else math.inf for side in (one, other))
        if mine == theirs or (math.isfinite(mine + theirs) and abs(mine - theirs) <= measure.same * abs(theirs)):
            continue
        if mine > theirs:
            return False
        is_better = True
    return is_better


def _grouped(opened: list[Candidate]) -> dict[str, list[Candidate]]:
    materials: dict[str, list[Candidate]] = {}
    for one in opened:
        materials.setdefault(one.material, []).append(one)
    groups: dict[str, list[Candidate]] = {}
    for group in materials.values():
        title = f"{checkpoint_of(group[0])}, on {measured_on(group[0])}"
        same = sum(name == title or name.startswith(f"{title}, ") for name in groups)
        groups[f"{title}, otherwise ({same + 1})" if same else title] = group
    return groups


def _notes(groups: dict[str, list[Candidate]]) -> Iterator[str]:
    if len(groups) > 1:
        yield "of different checkpoints or inputs: what they lose is not compared, each group has a front of its own"
    for title, group in groups.items():
        machines = list(dict.fromkeys(one.machine for one in group))
        of = f"{title}: " if len(groups) > 1 else ""
        if len(machines) > 1:
            by = "; ".join(f"{m}: {', '.join(one.name for one in group if one.machine == m)}" for m in machines)
            yield f"{of}times and memory are compared within a machine only: {by}"
        if len({one.basis["solved"] for one in group}) > 1:
            yield f"{of}they solved different numbers of prompts, of which the shares are not compared"
    lacking: dict[str, list[str]] = {}
    for one in (one for group in groups.values() for one in group):
        for name in ("kl", "ms"):
            if name in one.missing:
                lacking.setdefault(f"no {MEASURES[name].title}, {one.missing[name]}", []).append(one.name)
    for said, names in lacking.items():
        yield f"{said}: {listed(names)}"


def listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return f"{', '.join(names[:MOST])}{more}"


def cell(one: Candidate, name: str) -> str:
    """A figure as a table shows it, "-" for none."""
    value = one.values.get(name)
    if value is None:
        return "-"
    if name == "length":
        return f"{value:,.0f}"
    shown = size(value) if MEASURES[name].unit == "bytes" else f"{value:{'+' if name == 'loss' else ''}.3g}"
    return f"{value:.1f}%" if name == "solved" else shown


def on_arm(one: Candidate) -> str:
    """The worst fidelity on the cores that it was tried on, and those where something is out of bounds."""
    cores = one.manifest["cores"]
    if not cores:
        return "-"
    wrong = [core["core"] for core in cores if not all(figure["ok"] for figure in core["figures"])]
    if wrong:
        return f"wrong on {', '.join(map(str, wrong))}"
    found = [f["value"] for core in cores for f in core["figures"] if f["name"] == "fidelity_db"]
    return f"{min(map(float, found)):.3g} dB on {len(cores)}" if found else f"right on {len(cores)}"


def header(name: str) -> str:
    measure = MEASURES[name]
    return f"{measure.title}, {measure.unit}" if measure.unit in ("nats", "ms") else measure.title


def as_json(overview: Overview) -> dict[str, Any]:
    """artifacts: in the order of the groups. details: each against the first that can be read."""
    artifacts: list[dict[str, Any]] = []
    for title, group in overview.groups.items():
        artifacts += (candidate_json(one) | {"group": title, **_standing(overview, one)} for one in group)
    return {
        "artifacts": artifacts,
        "unusable": [{"name": one.name, "folder": str(one.folder), "why": one.why} for one in overview.unusable],
        "notes": overview.notes,
        "details": [
            {
                "a": one.a.name,
                "b": one.b.name,
                "notes": one.notes,
                "rows": [asdict(row) for row in one.rows],
            }
            for one in overview.details
        ],
    }


def _standing(overview: Overview, one: Candidate) -> dict[str, Any]:
    by = overview.beaten[one.name]
    return {"front": not one.wrong and not by, "beaten_by": by}


def candidate_json(one: Candidate) -> dict[str, Any]:
    cores = [core | {"seconds": one.report.get("cores", {}).get(core["core"])} for core in one.manifest["cores"]]
    return {
        "name": one.name,
        "folder": str(one.folder),
        "valid": not one.wrong,
        "out_of_bounds": one.wrong,
        "verdict": one.manifest["verdict"]["words"],
        "checkpoint": one.manifest["checkpoint"]["name"],
        "recipe": one.manifest["recipe"]["name"],
        "figures": {name: one.values.get(name) for name in MEASURES},
        "missing": one.missing,
        "cores": cores,
        "machine": one.manifest["run"]["machine"],
        "files": files_of(one.manifest),
    }
