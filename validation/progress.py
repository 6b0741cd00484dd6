"""What long work says of itself while it runs: which phase it is in, and how much of it is done."""

from __future__ import annotations

from typing import Protocol


class Report(Protocol):
    def __call__(self, what: str, done: int = 0, total: int = 0, share: float | None = None) -> None:
        """Of the phase `what`, so many parts of `total` are done; 0 where that is not known.

        share: how much of the phase's work that is, 0..1, where its parts are not alike.
        """


def silent(what: str, done: int = 0, total: int = 0, share: float | None = None) -> None:
    """A `Report` that nobody listens to."""


def within(name: str, report: Report) -> Report:
    """The phases of a part of the work, under its name."""

    def named(what: str, done: int = 0, total: int = 0, share: float | None = None) -> None:
        report(f"{name}, {what}", done, total, share)

    return named
