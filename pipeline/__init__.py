"""The road from a Dream checkpoint to an artifact: load, quantize, export, lower, validate, package.

Each stage a file of its name, `road.py` their order; `cli.py` and `commands/` the command line over them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import export_model

__all__ = ["export_model"]

if not TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        # torch is only imported by those who export: `python -m pipeline --help` must answer at once.
        if name == "export_model":
            from pipeline.api import export_model

            return export_model
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
