"""`fetch`: an artifact out of a registry, or the list of what is there."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from evidence.integrity import as_it_stands, check_signed
from evidence.registry import Registry, copy_out, entries_of, find, open_registry
from evidence.signature import public_key
from pipeline.choice_schema import FetchConfig
from pipeline.staging import place, staging
from report.plots import size
from report.terminal import show, table
from runtime.errors import BadArtifactError, OutputError, UsageError, one_line


def fetch(config: FetchConfig, console: Console) -> None:
    """The folder takes its name when every file of it was compared. Raises `PipelineError`."""
    key = public_key(Path(config.key)) if config.key is not None else None
    registry = open_registry(config.registry)
    if not config.artifacts:
        _list(registry, console)
        return
    if len(config.artifacts) > 1:
        raise UsageError(f"fetch takes one ID or name, got {len(config.artifacts)}: {', '.join(config.artifacts)}")
    entry = find(registry, config.artifacts[0])
    if config.output is None and Path(entry.name).name != entry.name:
        raise UsageError(f"{entry.name!r} of the registry is no name of a folder: give output=DIR")
    output = Path(config.output) if config.output is not None else Path("artifacts") / entry.name
    with staging(output, config.overwrite) as folder:
        try:
            copy_out(registry, entry, folder)
            if key is not None:
                check_signed(folder, as_it_stands(folder)[1], key)
        except OSError as error:
            raise OutputError(f"output {output} cannot be written: {error.strerror or error}") from error
        except BadArtifactError as error:
            raise BadArtifactError(f"registry {registry.url}: {entry.name}: {error}") from error
        place(folder, output)
    console.print(one_line(f"{entry.id}: {output}"), highlight=False, markup=False, soft_wrap=True)


def _list(registry: Registry, console: Console) -> None:
    """The oldest first. Raises `BadArtifactError` after it for an entry that is damaged."""
    entries, wrong = entries_of(registry)
    listing = table(None, "published", "ID", "size", "name")
    for entry in entries:
        n_bytes = sum(n for _, n in entry.files.values())
        cells = (entry.published, entry.id[:12], size(n_bytes), entry.name)
        listing.add_row(*(Text(one_line(text, 100)) for text in cells))
    show(console, listing)
    if wrong:
        raise BadArtifactError(f"registry {registry.url}: {'; '.join(wrong)}")
