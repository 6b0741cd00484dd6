"""`compare`: any number of artifacts, from what their manifests and reports hold. Nothing is run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.choice_schema import CompareConfig
from report.candidate import MEASURES, refusing
from report.choice_page import compare_markdown, compare_page
from report.comparison import Comparison, cell_text
from report.files import check_output, check_outside, write_text
from report.overview import Overview, as_json, cell, header, on_arm, overview_of
from report.terminal import show, table
from runtime.errors import BadArtifactError, UsageError, one_line


def compare(config: CompareConfig, console: Console) -> None:
    """Shows tables or JSON, and writes the pages that are asked for. Raises `PipelineError`.

    A folder that cannot be read is named in all of them, and ends it with `BadArtifactError` once they are written.
    """
    html, summary = (None if file is None else Path(file) for file in (config.html, config.summary))
    for file in filter(None, (html, summary)):
        check_output(file)
    folders = folders_of("compare", config.artifacts)
    for file in filter(None, (html, summary)):
        check_outside(file, folders)
    overview = overview_of(folders)
    with refusing(*folders):
        page = compare_page(overview) if html is not None else ""
        markdown = compare_markdown(overview) if summary is not None else ""
        listing = json.dumps(as_json(overview), indent=2, allow_nan=False) if config.json else ""
        tables = [] if config.json else list(_tables(overview))
    if html is not None:
        write_text(html, page)
    if summary is not None:
        write_text(summary, markdown)
    if config.json:
        sys.stdout.write(listing + "\n")
    else:
        _show(console, overview, tables)
    if overview.unusable:
        raise BadArtifactError("; ".join(one.why for one in overview.unusable))


def folders_of(command: str, given: list[str]) -> list[Path]:
    """As a shell's `artifacts/*` gives them: what is a file there is none of them. Raises `UsageError` for none."""
    folders = [Path(path) for path in given if not Path(path).is_file()]
    if not folders:
        raise UsageError(f"no artifact folder is given: {command} DIR DIR ...")
    return folders


def _show(console: Console, overview: Overview, tables: list[Table]) -> None:
    show(console, *tables)
    notes = overview.details[0].notes if len(overview.details) == 1 else []
    for note in [*overview.notes, *notes]:
        console.print(one_line(f"note: {note}"), highlight=False, markup=False, soft_wrap=True)


def _tables(overview: Overview) -> Iterator[Table]:
    for title, group in overview.groups.items():
        listing = table(None, "artifact", *map(header, MEASURES), "Arm", "")
        listing.title = Text(one_line(title))
        for column in listing.columns[1 : 1 + len(MEASURES)]:
            column.justify = "right"
        for one in group:
            cells = (one.name, *(cell(one, name) for name in MEASURES), on_arm(one), overview.place(one))
            listing.add_row(*(Text(one_line(text, 300)) for text in cells))
        yield listing
    if len(overview.details) == 1:
        yield from detail_tables(overview.details[0])


def detail_tables(compared: Comparison) -> Iterator[Table]:
    for group in compared.groups:
        names = (one_line(f"{side}: {one.name}") for side, one in (("a", compared.a), ("b", compared.b)))
        listing = table(group, "", "", "", "b to a", "better")
        for column, name in zip(listing.columns[1:3], names, strict=True):
            column.header, column.no_wrap, column.overflow = Text(name), False, "fold"
        for row in compared.rows:
            if row.group == group:
                cells = (row.name, cell_text(row.a, row.unit), cell_text(row.b, row.unit), row.change, row.better or "")
                listing.add_row(*(Text(one_line(text, 300)) for text in cells))
        yield listing
