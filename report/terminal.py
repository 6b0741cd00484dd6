"""Tables of a terminal, and sizes in words."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from validation.figure import Figure

LONGEST = 60  # characters of a word that may not be broken


def mib(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB" if n_bytes >= 10 * 2**20 else f"{n_bytes / 2**20:,.2f} MiB"


def table(title: str | None, *columns: str) -> Table:
    """The last column takes what width is left; the others are never broken."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=SIMPLE_HEAD)
    for column in columns[:-1]:
        made.add_column(column, no_wrap=True)
    made.add_column(columns[-1], overflow="fold")
    return made


def bound_text(figure: Figure, digits: int = 6) -> str:
    """Empty for a figure that is reported and not judged."""
    return "" if figure.bound is None else f"{'≥' if figure.at_least else '≤'} {figure.bound:.{digits}g}"


def verdict_text(figure: Figure) -> str:
    """In rich's markup."""
    if not figure.ok:
        return "[bold red]FAILED[/]"
    return "[dim]reported[/]" if figure.bound is None else "[green]ok[/]"


def least_width(console: Console, listing: Table) -> int:
    """Characters that it takes to break no word of it, and to cut no name."""
    roomy = console.options.update(max_width=10_000)
    total = 3 * len(listing.columns) + 1  # of the box and its padding
    for column in listing.columns:
        cells = [Measurement.get(console, roomy, cell) for cell in (column.header, *column.cells)]
        total += max(cell.maximum if column.no_wrap else min(cell.minimum, LONGEST) for cell in cells)
    return total


def show(console: Console, *listings: Table) -> None:
    """Where a terminal is too narrow it is the terminal that breaks the lines: nothing is left out."""
    for listing in listings:
        least = least_width(console, listing)
        if least > console.width:
            listing.width = least
        console.print(listing, crop=False)
