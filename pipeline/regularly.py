"""Something that is done now and then, beside whatever else is done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from runtime.errors import OutputError


@contextmanager
def regularly(seconds: float, work: Callable[[], object]) -> Iterator[None]:
    """While inside, `work` is called every so many seconds, in a thread. After an `OutputError` no more: whoever writes
    next says so.
    """
    ended = threading.Event()

    def go() -> None:
        try:
            while not ended.wait(seconds):
                work()
        except OutputError:
            pass

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
