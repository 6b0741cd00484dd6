"""`run`: build an artifact by the road, with what it is doing as it goes, and show what came of it."""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console

from pipeline import road
from pipeline.display import Display
from pipeline.schema import RunConfig
from report.summary import show_run


def run(config: RunConfig, console: Console) -> None:
    """Raises `PipelineError`."""
    display = Display(console)
    with display.live():
        packaged, validated = road.run(config, display)
    stages = [asdict(stage) for stage in display.stages]
    show_run(console, packaged.folder, packaged.manifest, packaged.figures, validated, stages)
