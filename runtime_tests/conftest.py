"""The artifact under test: opened once, measured once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runtime import Program
from runtime.artifact import read_manifest
from validation.judge import Measured, check_artifact

pytest_plugins = ["runtime_tests.plugin"]  # which an installed package brings to pytest itself


@pytest.fixture(scope="session")
def artifact(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--artifact")
    if folder is None:
        raise pytest.UsageError("say which artifact: pytest runtime_tests --artifact DIR")
    assert isinstance(folder, Path)
    return folder


@pytest.fixture(scope="session")
def manifest(artifact: Path) -> dict[str, Any]:
    return read_manifest(artifact)


@pytest.fixture(scope="session")
def measured(artifact: Path) -> Measured:
    return check_artifact(artifact)


@pytest.fixture(scope="session")
def program(artifact: Path, measured: Measured) -> Program:
    """Opened in this process, once it has run in another: there a crash is a verdict."""
    assert measured
    return Program.open(artifact)
