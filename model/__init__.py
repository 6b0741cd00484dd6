"""What Dream is: the network, its static cache, its checkpoints.

Knows torch, nothing of quantization or export.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.cache import StaticKVCache
    from model.checkpoint import load_hf_model
    from model.checkpoint_files import CheckpointError
    from model.config import ConfigError, DreamEdgeConfig
    from model.dream import DreamEdge

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DreamEdge",
    "DreamEdgeConfig",
    "StaticKVCache",
    "load_hf_model",
]

if not TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        # torch is only imported by those who ask for the network: an artifact is looked at without.
        if name not in __all__:
            raise AttributeError(f"module 'model' has no attribute {name!r}")
        from model import cache, checkpoint, checkpoint_files, config, dream

        modules = (cache, checkpoint, checkpoint_files, config, dream)
        return next(getattr(module, name) for module in modules if hasattr(module, name))
