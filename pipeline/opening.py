"""An artifact that is written with: opened, and what its user should know of it said."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from pipeline.console import warn_out_of_bounds
from pipeline.decoding import decoding_options
from pipeline.schema import ChatConfig, GenerateConfig, ServeConfig
from runtime.answers import said_of_own
from runtime.text import TextArtifact, open_text_artifact


def opened(config: GenerateConfig | ChatConfig | ServeConfig, err: Console) -> TextArtifact:
    """Figures that were out of bounds, and options that are the checkpoint's own, are lines. Raises `PipelineError`."""
    artifact = open_text_artifact(Path(config.artifact), config.packed_cache, config.threads)
    warn_out_of_bounds(err, artifact.folder, artifact.manifest)
    if said := said_of_own(artifact, decoding_options(config, config.cache)):
        err.print(said, style="dim", markup=False)
    return artifact
