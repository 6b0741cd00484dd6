"""Markdown in which an artifact's words stay text: no link, no HTML and no image of it gets into a page."""

from __future__ import annotations

from runtime.errors import one_line

LONGEST = 300  # characters of a text that an artifact or an error brings


def code(text: str) -> str:
    return "`" + one_line(text, LONGEST).replace("`", "'").replace("|", "\\|") + "`" if text else ""


def row(*cells: str) -> str:
    """Of a table; the cells are Markdown already."""
    return f"| {' | '.join(cells)} |"
