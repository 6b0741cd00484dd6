"""executorch's exporter, imported before anything of it: a third of its import is one table that it reads slowly."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import yaml
from ruamel.yaml import YAML


def _read(_: YAML, text: str) -> object:
    """The same with libyaml, a dozen times faster."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


with patch.object(YAML, "load", _read):
    import executorch.exir.dialects.edge._ops  # noqa: F401


@contextmanager
def garbage_of_now_only() -> Iterator[None]:
    """What is there already is left out of garbage collections, and those are few.

    Tracing makes so many objects that Python looks through the million of the imports again and again: a tenth of the
    time of exporting and lowering.
    """
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
