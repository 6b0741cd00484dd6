"""Tables of a terminal, and sizes in words."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from validation.figures import Figure


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
