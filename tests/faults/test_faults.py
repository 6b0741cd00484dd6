"""Faults are caught, by the check that must catch them. `scripts/faults.py` tries all of them: docs/faults.md."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.faults import faults_table, is_caught, rates
from tests.checkpoints import GOLDEN, RECIPES, ROOT, Build
from tests.faults.judge import RUNTIME, Verdict, export_with, judge_folder, judge_on_arm, judge_program, right
from tests.faults.table import FAULTS, Fault

Native = Callable[..., Path]
# One of each way to be caught. The others take half a minute each: what the script found is in docs/faults.json.
CHOSEN = ("causal mask", "kv_len ignored", "NaN in one row", "room for fewer rows", "an operator outside the delegate")
# Of these, what the calls themselves show, on any processor; the runner's own kernel has no causal attention at all.
ON_ARM = {"causal mask": RUNTIME, "kv_len ignored": "fidelity_db", "NaN in one row": "fidelity_db"}
QUICK = [fault for fault in FAULTS if fault.group == "file" and fault.name != "a section of another program"]


def check(fault: Fault, build: Build, pte: Path) -> None:
    made = right(build(fault.checkpoint, fault.recipe), GOLDEN / fault.checkpoint)
    verdict = fault.inject(made, pte)
    assert fault.check in verdict.checks
    assert re.search(fault.says, verdict.says), verdict.says


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.name in CHOSEN], ids=lambda fault: fault.name)
def test_a_fault_is_caught(build: Build, native: Native, tmp_path: Path, fault: Fault) -> None:
    pte = tmp_path / "model.pte"
    check(fault, build, pte)
    if fault.name in ON_ARM and platform.machine() != "aarch64":
        made = right(build(fault.checkpoint, fault.recipe), GOLDEN / fault.checkpoint)
        assert ON_ARM[fault.name] in judge_on_arm(made, pte, tmp_path / "artifact", native("aarch64")).checks


def test_a_changed_file_is_caught(build: Build, tmp_path: Path) -> None:
    assert sum(fault.is_flip for fault in QUICK) == 100
    for i, fault in enumerate(QUICK):
        check(fault, build, tmp_path / f"{i}.pte")


def test_nothing_is_raised_without_a_fault(build: Build, tmp_path: Path) -> None:
    """The way in which faults are put in does no harm by itself."""
    made = right(build("gqa2", "int4_xnnpack"), GOLDEN / "gqa2")
    export_with(made, tmp_path / "model.pte")
    assert judge_program(made, tmp_path / "model.pte") == Verdict((), "")
    assert judge_folder(made.artifact) == Verdict((), "")


def test_the_page_shows_what_was_measured() -> None:
    caught = json.loads((ROOT / "docs" / "faults.json").read_text())
    found = caught["golden"]
    runs = json.loads((ROOT / "docs" / "alarms.json").read_text())["runs"]
    page = (ROOT / "docs" / "faults.md").read_text()
    assert list(found) == [fault.name for fault in FAULTS]
    assert [fault.name for fault in FAULTS if not is_caught(fault, found[fault.name])] == []
    for on in ("text", "outliers"):
        assert list(caught[on]) == [fault.name for fault in FAULTS if fault.group != "file"]
        tried = [fault for fault in FAULTS if fault.name in caught[on]]
        assert [fault.name for fault in tried if not is_caught(fault, caught[on][fault.name])] == []
    assert {run["recipe"] for run in runs} == set(RECIPES)
    assert len(runs) == len({run["seed"] for run in runs}) * len(RECIPES) >= 200
    assert len({run["checkpoint"] for run in runs}) > 10
    assert len({json.dumps(run["eager"]) for run in runs}) == 3  # of this processor, and of two older ones
    assert not any(run["exit_code"] for run in runs)
    assert sum("loss" in run["figures"] for run in runs) > 60
    assert rates(caught, runs) in page
    assert faults_table(found) in page
    says = [line.removeprefix("> ") for line in page.splitlines() if line.startswith("> ")]
    assert says
    for words in says:
        assert any(words in one["says"] for one in found.values()), words
