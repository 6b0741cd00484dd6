"""One model, many who ask: requests wait in turn, and who hangs up frees the place."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class FullError(RuntimeError):
    """As many wait as may."""


class ClosedError(RuntimeError):
    """The server is ending."""


class GoneError(RuntimeError):
    """Who asked has hung up."""


class LateError(RuntimeError):
    """The time that a request may take is over."""


@dataclass(eq=False)
class Job:
    """work: done in the thread of the model. deadline: by `time.monotonic`. events: what it says, as it says it."""

    work: Callable[[Job], None]
    deadline: float
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    gone: threading.Event = field(default_factory=threading.Event)

    def say(self, event: Any) -> None:
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    def check(self) -> None:
        """Between two steps. Raises `GoneError`, `LateError`."""
        if self.gone.is_set():
            raise GoneError
        if time.monotonic() > self.deadline:
            raise LateError


class Turns:
    """most: how many may wait."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    def put(self, job: Job) -> None:
        """Raises `FullError`, `ClosedError`."""
        with self._changed:
            if self._is_closed:
                raise ClosedError
            if len(self._waiting) >= self.most:
                raise FullError
            self._waiting.append(job)
            self._changed.notify()

    def leave(self, job: Job) -> None:
        """Its place is free at once, or after the step that is being computed."""
        job.gone.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def close(self) -> None:
        """Who waits is told; the one whose turn it is may end."""
        with self._changed:
            self._is_closed = True
            for job in self._waiting:
                job.say(ClosedError())
            self._waiting.clear()
            self._changed.notify()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                job.check()
                job.work(job)
            except GoneError:
                continue
            except Exception as error:  # noqa: BLE001 (whose request it was is told)
                job.say(error)

    def _next(self) -> Job | None:
        with self._changed:
            while not self._waiting and not self._is_closed:
                self._changed.wait()
            return self._waiting.popleft() if self._waiting else None
