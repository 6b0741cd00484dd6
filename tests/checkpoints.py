"""Where the checkpoints of the tests are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "assets" / "dream_sudoku"
GOLDEN = Path(__file__).parent / "golden"
GOLDEN_NAMES = ("gqa2", "mha-tied", "mqa4-sharded")
RECIPES = ("fp32_xnnpack", "fp16_xnnpack", "int8_xnnpack", "int4_xnnpack", "int4_fast_xnnpack", "fp32_portable")

Build = Callable[[str, str], Path]  # (checkpoint name, recipe) -> artifact folder

# Random weights give nearly flat logits, which quantization reorders: what is lost there says nothing of a recipe. The
# recipes' own quality bounds are for trained checkpoints; fidelity, format and repeatability hold for any.
QUALITY_OF_RANDOM_WEIGHTS = {
    "int8_xnnpack": ["top1_agreement=0.9", "kl_divergence=0.01", "sqnr_db=25", "cosine=0.98"],
    "int4_fast_xnnpack": ["top1_agreement=0.25", "kl_divergence=2", "sqnr_db=4", "cosine=0.3", "max_abs_diff=20"],
    "int4_xnnpack": ["top1_agreement=0.35", "kl_divergence=1", "sqnr_db=7", "cosine=0.6", "max_abs_diff=10"],
}


def arguments(checkpoint: str, recipe: str) -> list[str]:
    """Of `python -m pipeline run`, for the bundled checkpoint or a golden one."""
    if checkpoint == BUNDLED.name:
        # The main job exactly as a user runs it; the others solve fewer puzzles.
        return [] if recipe == "int4_xnnpack" else ["task.n_solve=40"]
    # The golden checkpoints know 131,072 positions: 256 keep the tests short.
    return [f"checkpoint={GOLDEN / checkpoint}", "export.max_seq_len=256", *quality_of_random_weights(recipe)]


def quality_of_random_weights(recipe: str) -> list[str]:
    return [f"recipe.bounds.{bound}" for bound in QUALITY_OF_RANDOM_WEIGHTS.get(recipe, [])]
