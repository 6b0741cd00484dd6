"""The harness's option: pytest reads it before it looks for a package that `--pyargs` names, and for its conftest."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--artifact", type=Path, help="artifact folder for DreamEdge's harness, runtime_tests")
