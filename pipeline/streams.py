"""The standard streams of a command: what one cannot show is replaced, and what it cannot take is said in one line."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from runtime.errors import OutputError

# What tables and answers are drawn with, for a stream that has other characters only.
PLAIN = {"≥": ">=", "≤": "<=", "─": "-", "…": "...", "░": "#", "✓": "+", "\N{REPLACEMENT CHARACTER}": "?"}
REPLACING = "dreamedge.replacing"


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    unknown = error.object[error.start : error.end]
    return "".join(PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in unknown), error.end


codecs.register_error(REPLACING, _replaced)


class _Stream:
    """Raises `OutputError` where `stream` raises `OSError`: that no file was damaged, nor could not be read.

    name: None for a stream that nothing depends on; then nothing is raised.
    """

    def __init__(self, stream: TextIO, name: str | None) -> None:
        self._stream, self._name = stream, name
        self._failed: OutputError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if self._failed is not None:  # it may have been another thread's, which has nobody to tell
            raise self._failed
        with self._telling():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._telling():
            self._stream.flush()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # What is held back goes nowhere; else the interpreter would try again at its end, and complain.
            with contextlib.suppress(OSError), open(os.devnull, "wb") as null:  # noqa: PTH123
                os.dup2(null.fileno(), self._stream.fileno())
            if self._name is not None:
                self._failed = OutputError(f"{self._name} cannot be written: {error.strerror or error}")
                raise self._failed from error


@contextmanager
def standard_streams() -> Iterator[None]:
    """stdout and stderr replace what they cannot show; stdout raises `OutputError` where it cannot be written.

    What goes to a closed one is gone; it does not get into a file that would take its number.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stdin is not None:
        _set_errors(sys.stdin, "surrogateescape")  # who needs text says of which bytes it is not
    kept = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as null:  # noqa: PTH123
        sys.stdout, sys.stderr = _wrapped(sys.stdout or null, "stdout"), _wrapped(sys.stderr or null, None)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = kept


def shows_all(stream: TextIO) -> bool:
    """Whether it has every character."""
    return (stream.encoding or "utf-8").lower().startswith("utf")


def _wrapped(stream: TextIO, name: str | None) -> TextIO:
    _set_errors(stream, REPLACING)
    return cast(TextIO, _Stream(stream, name))


def _set_errors(stream: TextIO, errors: str) -> None:
    if isinstance(stream, io.TextIOWrapper):  # a test or a notebook may have put another in its place
        stream.reconfigure(errors=errors)
