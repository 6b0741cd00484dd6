"""`recipes`: the recipes by name, and what each makes."""

from __future__ import annotations

from rich.console import Console

from pipeline.config import load_recipe, names_of
from report.terminal import show, table


def recipes(console: Console) -> None:
    """Raises `UsageError` where there is none."""
    listing = table(None, "recipe", "what it makes")
    for name in names_of("recipe"):
        listing.add_row(name, load_recipe(name).description)
    show(console, listing)
