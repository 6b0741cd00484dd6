"""`compare`: two artifacts side by side, from what their manifests and reports hold. Nothing is run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pipeline.schema import CompareConfig
from report.comparison import Comparison, as_json, cell_text, compare_page, compared_artifacts, refusing
from report.files import check_output, write_text
from report.terminal import table


def compare(config: CompareConfig, console: Console) -> None:
    """Shows tables or JSON, and writes the page if asked for. Raises `PipelineError`."""
    if config.html is not None:
        check_output(Path(config.html))
    a, b = Path(config.a), Path(config.b)
    compared = compared_artifacts(a, b)
    with refusing(a, b):
        html = compare_page(compared) if config.html is not None else ""
        listing = json.dumps(as_json(compared), indent=2, allow_nan=False) if config.json else ""
        tables = [] if config.json else list(_tables(compared))
    if config.html is not None:
        write_text(Path(config.html), html)
    if config.json:
        sys.stdout.write(listing + "\n")
        return
    console.print(*tables)
    for note in compared.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def _tables(compared: Comparison) -> Iterator[Table]:
    for group in dict.fromkeys(row.group for row in compared.rows):
        names = (escape(f"{side}: {one.name}") for side, one in (("a", compared.a), ("b", compared.b)))
        listing = table(group, "", *names, "b to a", "better")
        for column in listing.columns[1:3]:
            column.no_wrap, column.overflow = False, "fold"
        for row in compared.rows:
            if row.group == group:
                cells = (row.name, cell_text(row.a, row.unit), cell_text(row.b, row.unit), row.change, row.better or "")
                listing.add_row(*map(Text, cells))
        yield listing
