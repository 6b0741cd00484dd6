"""Where the checkpoints of the tests are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "assets" / "dream_sudoku"
INFILL = ROOT / "assets" / "dream_infill"
GOLDEN = Path(__file__).parent / "golden"
GOLDEN_NAMES = ("gqa2", "mha-tied", "mqa4-sharded")
RECIPES = ("fp32_xnnpack", "fp16_xnnpack", "int8_xnnpack", "int4_xnnpack", "int4_fast_xnnpack", "fp32_portable")

Build = Callable[[str, str], Path]  # (checkpoint name, recipe) -> artifact folder


def arguments(checkpoint: str, recipe: str) -> list[str]:
    """Of `python -m pipeline run`, for the bundled checkpoint or a golden one."""
    if checkpoint == BUNDLED.name:
        # The main job exactly as a user runs it; the others solve fewer puzzles.
        return [] if recipe == "int4_xnnpack" else ["task.n_solve=40"]
    if checkpoint == INFILL.name:
        return [f"checkpoint={INFILL}"]
    # The golden checkpoints know 131,072 positions: 256 keep the tests short.
    return [f"checkpoint={GOLDEN / checkpoint}", "export.max_seq_len=256"]
