"""The native runner's units, in GoogleTest and under sanitizers: runner/tests/units.cpp."""

from __future__ import annotations

import subprocess
from pathlib import Path


def test_units(check: Path) -> None:
    ended = subprocess.run([check.parent / "dreamedge-units"], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout + ended.stderr
    assert "[  PASSED  ] 10 tests." in ended.stdout
