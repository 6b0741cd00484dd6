"""The road, end to end: every recipe on the bundled checkpoint and on each golden one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import load_recipe, names_of
from runtime import Program
from runtime.artifact import read_manifest
from tests.checkpoints import RECIPES, ROOT, Build
from tests.resealing import reseal
from validation import judge
from validation.settings import Budget

# Every recipe on the trained checkpoint and on a golden one; on the others what tied weights and shards meet.
BUILT = [
    *((checkpoint, recipe) for checkpoint in ("dream_sudoku", "gqa2") for recipe in RECIPES),
    *(("mha-tied", recipe) for recipe in ("fp32_xnnpack", "fp32_portable", "int4_xnnpack")),
    *(("mqa4-sharded", recipe) for recipe in ("fp32_xnnpack", "int8_xnnpack")),
]


def test_the_recipes_are_those_tested() -> None:
    assert names_of("recipe") == sorted(RECIPES)
    assert all(load_recipe(name).name == name for name in RECIPES)


@pytest.mark.parametrize(("native", "db"), [(True, 36), (False, 50)])
def test_float16_is_held_to_the_processor_that_runs_it(
    build: Build, native: bool, db: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to the one that made the artifact."""
    artifact, recipe = build("gqa2", "fp16_xnnpack"), load_recipe("fp16_xnnpack")
    here = recipe.bounds.on(native)
    assert (here.fidelity_db, here.fidelity_exact_db) == (db, db)
    monkeypatch.setattr(judge, "native_float16", lambda: native)
    for bounds in (judge.bounds_of(recipe, Budget()), judge.expectations(artifact, read_manifest(artifact))[0]):
        assert (bounds["fidelity_db"], bounds["fidelity_exact_db"]) == (db, db)
    for name in RECIPES:  # other recipes multiply no float16
        given = load_recipe(name).bounds
        assert (given.on(native) == given) == (not native or name != "fp16_xnnpack")


@pytest.mark.parametrize(("checkpoint", "recipe"), BUILT)
def test_recipe_builds_a_valid_artifact(build: Build, checkpoint: str, recipe: str) -> None:
    artifact = build(checkpoint, recipe)
    manifest = read_manifest(artifact)  # compares every hash
    assert manifest["recipe"]["name"] == recipe
    assert manifest["checkpoint"]["name"] == checkpoint
    figures = {figure["name"]: figure for figure in manifest["figures"]}
    assert all(figure["ok"] for figure in figures.values())
    expected = {"fidelity_db", "fidelity_exact_db", "top1_agreement", "planned_memory", "calls_that_differ"}
    if recipe != "fp32_portable":
        expected |= {"wrong_linear_weights", "bytes_per_weight", "unexpected_operators"}
    if checkpoint == "dream_sudoku":
        expected |= {"solved_percent"}
        assert (artifact / "tokenizer.json").is_file()
    assert expected <= set(figures)
    report = json.loads((artifact / "report.json").read_text())
    assert report["valid"]
    assert [stage["name"] for stage in report["stages"]][:5] == ["load", "quantize", "export", "lower", "validate"]
    assert all(stage["peak_rss"] > 0 for stage in report["stages"])
    assert "✓ Valid" in (artifact / "report.html").read_text(encoding="utf-8")
    assert len({file.stat().st_mode for file in artifact.iterdir()}) == 1  # who can read one can read all
    parts = manifest["sizes"]["parts"]
    assert sum(parts.values()) == manifest["sizes"]["program"]
    assert all(parts[part] > 0 for part in ("embedding", "attention", "mlp", "norms", "other"))
    assert Program.open(artifact).metadata.get_max_seq_len == manifest["export"]["max_seq_len"]


def test_int4_is_int4(build: Build) -> None:
    """Read from the bytes of the program: weights are 4 bits with bfloat16 scales, and nothing else."""
    manifest = read_manifest(build("dream_sudoku", "int4_xnnpack"))
    sizes, model = manifest["sizes"], manifest["model"]
    figures = {figure["name"]: figure["value"] for figure in manifest["figures"]}
    assert figures["bytes_per_weight"] == pytest.approx(4.5 / 8)
    # One delegate before each attention, and one after the last.
    assert manifest["delegation"]["delegates"] == model["num_hidden_layers"] + 1
    assert sizes["program"] < sizes["checkpoint"] / 2


def test_same_export_in_another_process_gives_the_same_bytes(build: Build) -> None:
    """`validate checkpoint=` exports again: here in a process with another hash seed, thread count and time zone."""
    artifact = build("dream_sudoku", "fp32_xnnpack")
    environment = {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1", "TZ": "Asia/Tokyo", "PATH": "/usr/bin:/bin"}
    checkpoint = ROOT / "assets" / "dream_sudoku"
    command = [sys.executable, "-m", "pipeline", "validate", f"artifact={artifact}", f"checkpoint={checkpoint}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "exports_that_differ" in done.stdout
    assert done.stderr == ""


def test_validate_by_itself_and_with_another_checkpoint(
    build: Build, pipeline: Callable[..., tuple[int, str, str]]
) -> None:
    artifact = build("gqa2", "int8_xnnpack")
    code, out, err = pipeline("validate", f"artifact={artifact}")
    assert (code, err) == (0, "")
    assert "fidelity_exact_db" in out
    code, _, err = pipeline("validate", f"artifact={artifact}", f"checkpoint={ROOT / 'tests/golden/mha-tied'}")
    assert code == 3
    assert "is not the checkpoint" in err


def test_harness_needs_only_the_runtime(build: Build, tmp_path: Path) -> None:
    """`pytest runtime_tests` where Hydra, rich, transformers, psutil and tokenizers cannot be imported."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in (
        "hydra",
        "omegaconf",
        "rich",
        "transformers",
        "psutil",
        "tokenizers",
        "hypothesis",
        "pipeline",
        "recipes",
    ):
        (blocked / f"{name}.py").write_text(f"raise ImportError('{name} is not a dependency of the runtime')\n")
    report = tmp_path / "junit.xml"
    artifact = build("gqa2", "int8_xnnpack")
    code = (
        f"import sys; sys.path.insert(0, {str(blocked)!r}); import pytest; "
        f"sys.exit(pytest.main(['runtime_tests', '--artifact', {str(artifact)!r}, '--junitxml', {str(report)!r}, "
        "'-q', '-p', 'no:cacheprovider']))"
    )
    # Hydra registers a plugin with pytest: without Hydra there is none.
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'failures="0"' in report.read_text()


def test_harness_fails_on_a_changed_artifact(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["expected_format"]["planned_memory"] = 1000  # bytes, less than its caches take
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    reseal(artifact)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "runtime_tests",
        "--artifact",
        str(artifact),
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "planned_memory is" in done.stdout
    assert "must be at most 1000" in done.stdout
