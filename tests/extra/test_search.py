"""A search by Hydra's Optuna sweeper, for real."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.artifact import read_manifest
from tests.checkpoints import GOLDEN


def test_a_search(
    tmp_path: Path, pipeline: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that cannot be made fails alone; the same command repeats nothing; the best is a recipe that builds."""
    monkeypatch.chdir(tmp_path)
    kinds = [f"recipe.linear.rules.{kind}=choice(int4,int8)" for kind in ("q_proj", "down_proj")]
    trials = ["hydra/sweeper=search", "hydra.sweeper.n_trials=6", "recipe.linear.group_size=choice(32,64,48)"]
    fixed = [
        f"checkpoint={GOLDEN / 'gqa2'}",
        "recipe=int4_xnnpack",
        "export.max_seq_len=64",
        "task=none",
        "cache=cache",
    ]
    code, out, err = pipeline("run", "-m", *trials, *kinds, *fixed)
    folder = tmp_path / "artifacts" / ".sweep"
    assert code in (0, 4), err  # of groups of 48
    assert "are on the front" in out, out + err
    found = json.loads((folder / "front.json").read_text())
    assert any(point["front"] for point in found["points"])
    best = read_manifest(tmp_path / "artifacts" / found["best"])["recipe"]
    again, out, err = pipeline("run", "-m", *trials, *kinds, *fixed)
    assert again == code
    assert " 0 done, " in out
    built, _, err = pipeline(
        "run", f"recipe={folder / 'best.yaml'}", "output=best", *(f for f in fixed if "recipe" not in f)
    )
    assert built == 0, err
    made = read_manifest(tmp_path / "best")["recipe"]
    assert made["linear"] == best["linear"]
    assert made["name"] == "int4_xnnpack-best"
