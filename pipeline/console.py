"""The two streams of a terminal: answers and tables go to stdout, all else to stderr."""

from __future__ import annotations

from rich.console import Console

err = Console(stderr=True, soft_wrap=True, highlight=False)


def out() -> Console:
    """As wide as the terminal; a log has no width of its own."""
    console = Console()
    return console if console.is_terminal else Console(width=120)
