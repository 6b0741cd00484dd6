"""What the tests share: checkpoints, and artifacts that are built once in a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "assets" / "dream_sudoku"
GOLDEN = Path(__file__).parent / "golden"
GOLDEN_NAMES = ("gqa2", "mha-tied", "mqa4-sharded")
RECIPES = ("fp32_xnnpack", "fp16_xnnpack", "int8_xnnpack", "int4_xnnpack", "fp32_portable")

Build = Callable[..., Path]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build(checkpoint name, recipe): an artifact by `python -m pipeline run`, made once. Do not change it."""
    folder = tmp_path_factory.mktemp("artifacts")
    built: dict[tuple[str, str], Path] = {}

    def make(checkpoint: str, recipe: str) -> Path:
        if (checkpoint, recipe) not in built:
            source = BUNDLED if checkpoint == "dream_sudoku" else GOLDEN / checkpoint
            output = folder / f"{checkpoint}-{recipe}"
            # The golden checkpoints know 131,072 positions: 256 keep the tests short.
            arguments = [f"checkpoint={source}", f"recipe={recipe}", f"output={output}", "export.max_seq_len=256"]
            exit_code = main(["run", *arguments])
            assert exit_code == 0
            built[checkpoint, recipe] = output
        return built[checkpoint, recipe]

    return make


@pytest.fixture
def artifact(build: Build, tmp_path: Path) -> Path:
    """A copy of a float32 artifact of gqa2, to be damaged."""
    folder = tmp_path / "artifact"
    shutil.copytree(build("gqa2", "fp32_xnnpack"), folder)
    return folder


@pytest.fixture
def pipeline(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `python -m pipeline` in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        exit_code = main(list(arguments))
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return exit_code, captured.out, captured.err

    return run
