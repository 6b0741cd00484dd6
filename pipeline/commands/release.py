"""`release`: the artifact to ship, why the others are not, and the notes that say so. Nothing is run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from evidence.integrity import as_it_stands, check_signatures, signed_by
from evidence.registry import Registry, open_registry, publish
from evidence.signature import key_id, private_key
from pipeline.choice_schema import Preference, ReleaseBudget, ReleaseConfig
from pipeline.choosing import Choice, check_budget, choose, exactly, preference_of
from pipeline.commands.compare import folders_of
from pipeline.commands.publish import say_published
from pipeline.commands.sign import sign
from pipeline.schema import SignConfig
from report.candidate import Candidate, open_candidate, refusing
from report.comparison import Comparison, compared
from report.files import check_output, check_outside, write_text
from report.overview import candidate_json, cell, open_all
from report.release_notes import release_notes
from report.terminal import show, table
from runtime.errors import BadArtifactError, ValidationError, one_line


def release(config: ReleaseConfig, console: Console) -> None:
    """Signs, then publishes, then writes the notes: what they say has happened. Raises `ValidationError` where none may
    ship, after the notes that say why; `PipelineError`.
    """
    folders, notes = folders_of("release", config.artifacts), Path(config.notes)
    check_budget(config.budget)
    prefer = preference_of(config.prefer, config.budget)
    check_output(notes)
    check_outside(notes, folders)
    if absent := [folder for folder in folders if not folder.is_dir()]:
        raise BadArtifactError(f"{absent[0]}: no such folder; nothing is released")
    signed = None if config.key is None else key_id(private_key(Path(config.key)).public_key())
    registry = None if config.registry is None else open_registry(config.registry)
    baseline = None if config.baseline is None else open_candidate(Path(config.baseline))
    opened, unusable = open_all(folders)
    with refusing(*folders):
        choice = choose(opened, unusable, config.budget, prefer)
        shipped = choice.ranked[0] if choice.ranked else None
        changed = compared(baseline, shipped) if baseline is not None and shipped is not None else None
        asked = _asked(config.budget, prefer)
        signed = signed or (_signed_before(shipped) if shipped is not None else None)
        # Before anything is signed: what cannot be made is no release.
        release_notes(shipped, None, signed, choice.why, choice.refused, asked, changed, opened)
    said = Console(stderr=True) if config.json else console
    if not config.json:
        _show(console, choice, opened)
    id_ = None
    if shipped is not None:
        if config.key is not None:
            sign(SignConfig(str(shipped.folder), config.key), said)
        if registry is not None:
            id_ = _published(registry, shipped, said)
    text = release_notes(shipped, id_, signed, choice.why, choice.refused, asked, changed, opened)
    write_text(notes, text)
    if config.json:
        listing = _as_json(choice, shipped, id_, signed, asked, changed, opened)
        sys.stdout.write(json.dumps(listing, indent=2, allow_nan=False) + "\n")
    if shipped is None:
        raise ValidationError(f"none of {len(folders)} may ship: {_reasons(choice)}")
    if not config.json:
        words = f"ship {shipped.folder}: {choice.why[shipped.name]}; notes: {notes}"
        console.print(one_line(words), highlight=False, markup=False, soft_wrap=True)


def _signed_before(shipped: Candidate) -> str | None:
    """What its envelope calls the keys, which nobody has checked."""
    signatures = check_signatures(shipped.folder, as_it_stands(shipped.folder)[1])
    return signed_by(signatures).removeprefix("signed with key ") if signatures else None


def _published(registry: Registry, shipped: Candidate, console: Console) -> str:
    id_, is_new = publish(registry, shipped.folder)
    say_published(console, shipped.folder, id_, is_new)
    return id_


def _asked(budget: ReleaseBudget, prefer: list[Preference]) -> str:
    given = [f"budget.{name}={exactly(bound)}" for name, bound in vars(budget).items() if bound is not None]
    return " ".join([*given, f"prefer=[{','.join(one.value for one in prefer)}]"])


def _reasons(choice: Choice) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in choice.refused.items())


def _show(console: Console, choice: Choice, opened: list[Candidate]) -> None:
    listing = table(None, "artifact", "size", "KL, nats", "", "why")
    by_name = {one.name: one for one in opened}
    best = choice.ranked[0].name if choice.ranked else None
    for name in [*(one.name for one in choice.ranked), *choice.refused]:
        figures = [cell(by_name[name], key) if name in by_name else "-" for key in ("bytes", "kl")]
        verdict = "ships" if name == best else "may ship" if name in choice.why else "may not"
        cells = (name, *figures, verdict, choice.why.get(name, choice.refused.get(name, "")))
        listing.add_row(*(Text(one_line(text, 500)) for text in cells))
    show(console, listing)


def _as_json(
    choice: Choice,
    shipped: Candidate | None,
    id_: str | None,
    signed: str | None,
    asked: str,
    changed: Comparison | None,
    opened: list[Candidate],
) -> dict[str, Any]:
    return {
        "ships": shipped and shipped.name,
        "folder": shipped and str(shipped.folder),
        "id": id_,
        "key": signed if shipped is not None else None,
        "asked": asked,
        "why": choice.why,
        "refused": choice.refused,
        "artifacts": [candidate_json(one) for one in opened],
        "baseline": changed
        and {
            "name": changed.a.name,
            "notes": changed.notes,
            "rows": [vars(row) for row in changed.rows],
        },
    }
