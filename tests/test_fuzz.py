"""A short run of what `scripts/fuzz.py` does for long; and hostile files that no random damage makes."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.fuzz import WHAT, table
from scripts.kill import table as kill_table
from tests.checkpoints import ROOT, Build
from tests.fuzz import BAD, REFUSED, TAKEN, Judge, targets

EXAMPLES = {"program": 30, "verify": 15, "envelope": 15, "inspect": 15, "inspect resealed": 20, "validate": 8}
LONG = "validate resealed"  # only in scripts/fuzz.py


@pytest.mark.parametrize("name", [name for name in WHAT if name != LONG])
def test_damaged_files_are_refused_or_read(build: Build, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    target = targets(build("gqa2", "fp32_xnnpack"), folder)[name]
    seen = set()
    judge = Judge(target, folder / "scratch")
    assert name == "validate" or judge.undamaged() == TAKEN

    @settings(
        max_examples=EXAMPLES.get(name, 40), deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.sampled_from(target.files), st.integers(0, 2**63 - 1))
    def check(file: str, seed: int) -> None:
        word = judge.verdict(file, seed)
        assert word in (REFUSED, TAKEN), f"{file}, seed {seed}: {word}"
        seen.add(word)

    with judge:
        check()
    assert REFUSED in seen


def test_the_page_shows_what_was_measured() -> None:
    fuzzed = json.loads((ROOT / "docs" / "fuzz.json").read_text())
    killed = json.loads((ROOT / "docs" / "kill.json").read_text())
    page = (ROOT / "docs" / "hostile.md").read_text()
    assert table(fuzzed) in page
    assert not any(counted["verdicts"].get(word) for counted in fuzzed["targets"].values() for word in BAD)
    found = killed["found"]
    assert f"{killed['kills']} random moments" in page
    assert kill_table(killed) in page
    assert (
        f"{found['the earlier one']} times the earlier artifact was there, {found['the new one']} times the new" in page
    )
    assert found["the earlier one"] + found["the new one"] == killed["kills"]
    assert found["other folders left"] == 0
