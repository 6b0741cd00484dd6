"""`generate prefix=TEXT suffix=TEXT`: what stands between them, whatever its length."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from pipeline.commands.generate import say, what_it_took
from pipeline.console import warn_out_of_bounds
from pipeline.decoding import Cache
from pipeline.schema import GenerateConfig
from pipeline.view import View
from runtime.errors import UsageError
from runtime.infill import DRAWN_BY
from runtime.text import fill_in, open_text_artifact
from runtime.tokenizer import decode

GAP_KEYS = ("prefix", "suffix", "masks", "max_masks")
KEYS = {*GAP_KEYS, *DRAWN_BY, "cache", "artifact", "packed_cache", "threads"}


def is_gap(config: GenerateConfig) -> bool:
    """Whether a gap is to be filled. Raises `UsageError` for keys that do not go together."""
    plain = GenerateConfig(artifact=config.artifact)
    given = [f.name for f in fields(config) if getattr(config, f.name) != getattr(plain, f.name)]
    if config.prefix is None and config.suffix is None:
        surplus = [name for name in given if name in GAP_KEYS]
        if surplus:
            raise UsageError(f"{', '.join(surplus)}: of a gap, so prefix or suffix must be given")
        return False
    surplus = [name for name in given if name not in KEYS]
    if surplus:
        raise UsageError(f"{', '.join(surplus)}: not with prefix or suffix, which leave a gap of unknown length")
    return True


def fill_gap(config: GenerateConfig, err: Console) -> None:
    """The middle on stdout, a live view and what it took on stderr. Raises `PipelineError`."""
    artifact = open_text_artifact(Path(config.artifact), config.packed_cache, config.threads)
    warn_out_of_bounds(err, artifact.folder, artifact.manifest)
    view = View(artifact, err)

    def show(step: int, canvas_L: Tensor, middle: slice) -> None:
        view.show(step, canvas_L[middle].tolist())

    try:
        with view.live():
            filled = fill_in(artifact, config.prefix or "", config.suffix or "", _options(config), show)
    except KeyboardInterrupt:
        say(view.plain() + "\n")
        raise
    say(decode(artifact.tokenizer, filled.tokens.tolist()) + "\n")
    err.print(what_it_took(filled, len(filled.tokens)), style="dim")


def _options(config: GenerateConfig) -> dict[str, Any]:
    """For `runtime.infill`, whose own are DreamOn's."""
    options = {"n_masks": config.masks} | {name: getattr(config, name) for name in ("max_masks", *DRAWN_BY)}
    options["alg"] = None if config.alg is None else config.alg.value
    options["cache"] = None if config.cache in (None, Cache.none) else config.cache.value
    return {name: value for name, value in options.items() if value is not None}
