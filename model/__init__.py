"""What Dream is: the network, its static cache, its checkpoints.

Knows torch, nothing of quantization or export.
"""

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
