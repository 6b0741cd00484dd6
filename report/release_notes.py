"""The release notes: what ships, what changed since the last release, and why the others do not ship."""

from __future__ import annotations

from collections.abc import Iterator

from report.candidate import MEASURES, Candidate
from report.comparison import Comparison, cell_text
from report.markdown import code, row
from report.overview import cell, header, on_arm

CHANGED = ("made of", "size", "quality", "speed")  # groups of a comparison that notes show
MACHINE = ("speed",)  # of those, what only says something within a machine


def release_notes(
    shipped: Candidate | None,
    id_: str | None,
    signed: str | None,
    why: dict[str, str],
    refused: dict[str, str],
    asked: str,
    changed: Comparison | None,
    candidates: list[Candidate],
) -> str:
    """id_: in a registry. signed: the key's ID. why, refused: of those that may ship, and of the others, by name.

    asked: budgets and preference in words. changed: from the baseline (a) to what is shipped (b).
    """
    if shipped is None:
        lines = ["## ❌ None may ship", "", f"Asked for: {code(asked)}", ""]
    else:
        lines = [f"## ✅ {code(shipped.name)}", "", *_facts(shipped, id_, signed), f"- asked for: {code(asked)}"]
        lines += [f"- chosen: {code(why[shipped.name])}", "", *_figures(shipped, changed), ""]
        if changed is not None:
            lines += [*_changes(changed), ""]
    others = {name: reason for name, reason in (why | refused).items() if shipped is None or name != shipped.name}
    if others:
        lines += ["### Why not the others", "", row("artifact", "size", "KL, nats", "why not"), row(*["---"] * 4)]
        by_name = {one.name: one for one in candidates}
        for name, reason in others.items():
            cells = [cell(by_name[name], key) for key in ("bytes", "kl")] if name in by_name else ["-", "-"]
            lines.append(row(code(name), *cells, code(reason)))
        lines.append("")
    return "\n".join(lines)


def _facts(one: Candidate, id_: str | None, signed: str | None) -> Iterator[str]:
    manifest = one.manifest
    yield f"- verdict: {code(manifest['verdict']['words'])}"
    yield f"- recipe: {code(manifest['recipe']['name'])}, {code(manifest['recipe']['description'])}"
    yield f"- checkpoint: {code(manifest['checkpoint']['name'])}"
    for name, digest in sorted(manifest["checkpoint"]["sha256"].items()):
        yield f"  - {code(name)} {code(digest)}"
    versions = {name: manifest["versions"][name] for name in ("torch", "executorch", "torchao")}
    yield f"- made with: {code(', '.join(f'{name} {version}' for name, version in versions.items()))}"
    yield f"- model.pte: {code(manifest['files']['model.pte']['sha256'])}"
    yield f"- measured on: {code(one.machine)}"
    if one.manifest["cores"]:
        yield f"- on Arm: {code(on_arm(one))}"
    yield f"- signed: {code(f'with key {signed}') if signed else 'no'}"
    if id_ is not None:
        yield f"- in the registry: {code(id_)}"


def _figures(shipped: Candidate, changed: Comparison | None) -> Iterator[str]:
    """Those of the table of `compare`; with a baseline also its own, and the change where the two can be compared."""
    then = changed.a if changed is not None else None
    yield row("figure", "now", *(["before", "change"] if then else []))
    yield row("---", "---:", *(["---:", "---:"] if then else []))
    for name in MEASURES:
        cells = [header(name), cell(shipped, name)]
        if then is not None:
            cells += [cell(then, name), _change(then, shipped, name)]
        yield row(*cells)


def _change(then: Candidate, now: Candidate, name: str) -> str:
    if name not in then.values or name not in now.values:
        return ""
    if then.basis.get(name) != now.basis.get(name) or (name == "loss" and then.material != now.material):
        return "other machine" if MEASURES[name].same else "other inputs"
    a, b = then.values[name], now.values[name]
    if a == b:
        return "="
    return f"{b / a:.2f}x" if MEASURES[name].unit in ("bytes", "ms") and a else f"{b - a:+.3g}"


def _changes(changed: Comparison) -> Iterator[str]:
    yield f"### Since {code(changed.a.name)}"
    yield ""
    yield from (f"- {code(note)}" for note in changed.notes)
    is_elsewhere = changed.a.machine != changed.b.machine
    for group in CHANGED:
        rows = [one for one in changed.rows if one.group == group and one.a != one.b]
        if not rows or (is_elsewhere and group in MACHINE):
            continue
        yield ""
        yield row(group, "before", "now", "change", "")
        yield row("---", "---", "---", "---:", "---")
        for one in rows:
            better = {"a": "worse", "b": "better", None: ""}[one.better]
            yield row(
                code(one.name), code(cell_text(one.a, one.unit)), code(cell_text(one.b, one.unit)), one.change, better
            )
