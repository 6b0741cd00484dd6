"""`publish`: artifacts into a registry."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from evidence.registry import open_registry, publish
from pipeline.choice_schema import PublishConfig
from pipeline.commands.compare import folders_of


def publish_all(config: PublishConfig, console: Console) -> None:
    """One after another; the first that cannot be published ends it. Raises `PipelineError`."""
    folders, registry = folders_of("publish", config.artifacts), open_registry(config.registry)
    for folder in folders:
        say_published(console, folder, *publish(registry, folder))


def say_published(console: Console, folder: Path, id_: str, is_new: bool) -> None:
    said = f"published {folder} as {id_}" if is_new else f"{folder} was there already: {id_}"
    console.print(said, highlight=False, markup=False, soft_wrap=True)
