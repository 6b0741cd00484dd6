"""The two streams of a terminal: answers and tables go to stdout, all else to stderr."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from rich.console import Console

from runtime.errors import one_line

err = Console(stderr=True, soft_wrap=True, highlight=False)


def out() -> Console:
    """As wide as the terminal; a log has no width of its own."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def warn_out_of_bounds(console: Console, folder: Path, manifest: dict[str, Any]) -> None:
    """In one line, of an artifact that is only kept for a look. What is no list of figures is for others to refuse."""
    from runtime.artifact import out_of_bounds  # torch comes with it

    with contextlib.suppress(KeyError, TypeError):
        if wrong := out_of_bounds(manifest):
            said = one_line(f"warning: {folder} was out of bounds when it was made: {', '.join(wrong)}")
            console.print(said, style="yellow", markup=False)
