"""What a person sees of a run: the stages as they go, what each is doing, and how long that may take still."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from pipeline.regularly import regularly
from report.terminal import mib
from runtime.memory import PeakAnonymous, peak_rss, reset_peak_rss
from validation.progress import Report as Report  # what a stage is given
from validation.progress import silent as silent

EVERY = 15.0  # seconds between two lines of a stage where there is no terminal
SOON = 1.0  # seconds of a phase that say nothing of its pace yet


@dataclass(frozen=True)
class StageStats:
    """peak_rss, peak_anonymous: bytes, of this process while the stage ran.

    What is not anonymous are pages of files, which the system drops when it is short of memory.
    """

    name: str
    seconds: float
    peak_rss: int
    peak_anonymous: int


@dataclass(frozen=True)
class Phase:
    """done, total: parts, total 0 where it is not known. share: 0..1, of the work. at: when that was reported.

    since, first: when the phase began, and with which share: what a cache held was not done in this time.
    """

    what: str
    done: int
    total: int
    share: float
    at: float
    since: float
    first: float

    def left(self, now: float) -> float | None:
        """Seconds at the pace so far; None while that is not known, and when they are over."""
        took, gained = self.at - self.since, self.share - self.first
        if took < SOON or gained <= 0:
            return None
        left = took * (1 - self.share) / gained - (now - self.at)
        return left if left > 0 else None

    def words(self, now: float) -> str:
        count = f" {self.done:,}/{self.total:,}" if self.total else ""
        left = self.left(now)
        return self.what + count + ("" if left is None else f", {_duration(left)} left")


class Doing:
    """The phase that a stage is in. `report` is called by the stage, `words` by whoever shows it, in any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase: Phase | None = None

    def report(self, what: str, done: int = 0, total: int = 0, share: float | None = None) -> None:
        now, before = self._clock(), self._phase
        share = share if share is not None else done / total if total else 0.0
        goes_on = before is not None and before.what == what and before.share <= share
        since, first = (before.since, before.first) if before is not None and goes_on else (now, share)
        self._phase = Phase(what, done, total, share, now, since, first)

    def words(self) -> str:
        phase = self._phase
        return "" if phase is None else phase.words(self._clock())


class _Memory(ProgressColumn):
    def render(self, task: Task) -> Text:
        done = task.fields.get("peak_rss")
        return Text(f"peak {mib(done)}" if done else f"now {_rss()}")


class _Doing(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.finished else task.fields["doing"].words())


class Display:
    """Live on a terminal. Elsewhere plain lines: one at the end of a stage, and one `every` so many seconds in it.

    Collects time and peak memory of the stages.
    """

    def __init__(self, console: Console, every: float = EVERY) -> None:
        self.console = console
        self.stages: list[StageStats] = []
        self._every = every
        columns = (
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description:<9}"),
            TimeElapsedColumn(),
            _Memory(),
        )
        self._progress = Progress(*columns, _Doing(Column(no_wrap=True)), console=console)

    @contextmanager
    def live(self) -> Iterator[None]:
        if not self.console.is_terminal:
            yield
            return
        with self._progress:
            yield

    @contextmanager
    def stage(self, name: str) -> Iterator[Report]:
        """Yields a function that says what the stage is doing."""
        reset_peak_rss()
        started = time.perf_counter()
        doing = Doing()
        task = self._progress.add_task(name, total=1, doing=doing, peak_rss=None)
        with PeakAnonymous() as anonymous, self._lines(name, doing, started):
            yield doing.report
        stats = StageStats(name, time.perf_counter() - started, peak_rss(), anonymous.bytes)
        self.stages.append(stats)
        self._progress.update(task, completed=1, peak_rss=stats.peak_rss)
        if not self.console.is_terminal:
            self._line(name, stats.seconds, f"peak {mib(stats.peak_rss)}")

    @contextmanager
    def _lines(self, name: str, doing: Doing, started: float) -> Iterator[None]:
        """While inside, where there is no terminal, a line now and then: a long stage is never silent."""
        if self.console.is_terminal:
            yield
            return

        def tell() -> None:
            self._line(name, time.perf_counter() - started, f"now {_rss()}   {doing.words()}".rstrip())

        with regularly(self._every, tell):
            yield

    def _line(self, name: str, seconds: float, rest: str) -> None:
        self.console.print(f"{name:<9} {seconds:6.1f} s   {rest}", highlight=False, markup=False, soft_wrap=True)


def _rss() -> str:
    return mib(psutil.Process().memory_info().rss)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
