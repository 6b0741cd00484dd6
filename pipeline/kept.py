"""What runs keep in `cache`, a folder for each quantized model and for what float32 gives."""

from __future__ import annotations

from pathlib import Path

KEY_FILE, LOCK_FILE = "made_of.json", ".lock"
FLOAT32 = "float32-"  # that the names of float32's folders begin with


def is_kept(folder: Path) -> bool:
    """Whether a folder is one of these, whole or not."""
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    ours = (KEY_FILE, LOCK_FILE, ".safetensors", ".partial")
    return KEY_FILE in names and all(name.endswith(ours) for name in names)
