"""What a person sees of a run: the stages as they go, and the figures at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from report.tables import mib
from runtime.memory import PeakAnonymous, peak_rss, reset_peak_rss

Report = Callable[[str], None]


@dataclass(frozen=True)
class StageStats:
    """peak_rss, peak_anonymous: bytes, of this process while the stage ran.

    What is not anonymous are pages of files, which the system drops when it is short of memory.
    """

    name: str
    seconds: float
    peak_rss: int
    peak_anonymous: int


class _Memory(ProgressColumn):
    def render(self, task: Task) -> Text:
        done = task.fields.get("peak_rss")
        return Text(f"peak {mib(done)}" if done else f"now {mib(psutil.Process().memory_info().rss)}")


class Display:
    """Live on a terminal, one plain line a stage elsewhere. Collects time and peak memory of the stages."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stages: list[StageStats] = []
        columns = (
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description:<9}"),
            TimeElapsedColumn(),
            _Memory(),
        )
        self._progress = Progress(*columns, TextColumn("{task.fields[detail]}"), console=console)

    @contextmanager
    def live(self) -> Iterator[None]:
        if not self.console.is_terminal:
            yield
            return
        with self._progress:
            yield

    @contextmanager
    def stage(self, name: str) -> Iterator[Report]:
        """Yields a function that shows what the stage is doing."""
        reset_peak_rss()
        started = time.perf_counter()
        task = self._progress.add_task(name, total=1, detail="", peak_rss=None)
        with PeakAnonymous() as anonymous:
            yield lambda detail: self._progress.update(task, detail=detail)
        stats = StageStats(name, time.perf_counter() - started, peak_rss(), anonymous.bytes)
        self.stages.append(stats)
        self._progress.update(task, completed=1, detail="", peak_rss=stats.peak_rss)
        if not self.console.is_terminal:
            self.console.print(f"{name:<9} {stats.seconds:6.1f} s   peak {mib(stats.peak_rss)}", highlight=False)
