"""executorch's exporter, imported before anything of it: a third of its import is one table that it reads slowly."""

from __future__ import annotations

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
