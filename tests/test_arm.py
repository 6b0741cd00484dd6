"""`validate target=arm64`: the recorded calls on Arm cores that QEMU emulates, and what it needs for that."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.artifact import MANIFEST_FILE
from tests.checkpoints import Build
from tests.resealing import reseal
from validation import arm

Pipeline = Callable[..., tuple[int, str, str]]
Native = Callable[..., Path]
pytestmark = pytest.mark.skipif(platform.machine() == "aarch64", reason="this is Arm")
CORES = ["cortex-a53", "cortex-a76"]


def test_an_artifact_is_right_on_each_core(build: Build, native: Native, pipeline: Pipeline, tmp_path: Path) -> None:
    artifact, summary = build("gqa2", "int4_xnnpack"), tmp_path / "summary.md"
    keys = (f"artifact={artifact}", f"runner={native('aarch64')}", f"cores=[{','.join(CORES)}]")
    code, _, err = pipeline("validate", "target=arm64", *keys, f"summary={summary}")
    assert (code, err) == (0, "")
    rows = [line.split("|")[2:4] for line in summary.read_text().splitlines() if "| `" in line]
    found = [(group.strip(), name.strip(" `")) for group, name in rows]
    names = ("fidelity_db", "fidelity_exact_db", "wrong_metadata", "calls_that_differ", "other_bits")
    assert found == [(core, name) for core in CORES for name in names]
    code, _, err = pipeline("validate", "target=arm64", *keys, "bounds.fidelity_exact_db=190")
    assert (code, err.count("\n")) == (5, 1)
    assert "cortex-a53: fidelity_exact_db is " in err


def test_the_runners_own_words_are_passed_on(artifact: Path, native: Native, pipeline: Pipeline) -> None:
    manifest = json.loads((artifact / MANIFEST_FILE).read_text())
    manifest["recipe"]["bounds"] = {}
    (artifact / MANIFEST_FILE).write_text(json.dumps(manifest))
    reseal(artifact)
    keys = (f"artifact={artifact}", f"runner={native('aarch64')}", "cores=[cortex-a53]")
    code, _, err = pipeline("validate", "target=arm64", *keys)
    assert (code, err.count("\n")) == (6, 1)
    assert "cortex-a53: " in err
    assert "not a manifest" in err


def test_what_is_not_there_is_named(artifact: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*keys: str) -> str:
        code, _, err = pipeline("validate", "target=arm64", f"artifact={artifact}", *keys)
        assert (code, err.count("\n")) == (2, 1), err
        return err

    here = f"runner={artifact / 'model.pte'}"  # any file: it does not come to running it
    assert "did you mean 'cortex-a76'?" in said(here, "cores=[cortex-a77x]")
    assert "give one or more, each once" in said(here, "cores=[]")
    assert "baseline is for target=host" in said(here, f"baseline={artifact}")
    assert "`make runner ARCH=aarch64` builds it" in said("runner=nowhere")
    assert "did you mean" in said("targets=arm64")
    monkeypatch.setattr(arm, "qemu_version", lambda: (7, 2))
    assert "QEMU 7.2 multiplies integers wrong on a core with SME, which max has" in said(here, "cores=[max]")
    monkeypatch.setattr(arm, "LIBRARIES", Path("nowhere"))
    assert "Debian has it in g++-aarch64-linux-gnu" in said(here)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "Debian has it in qemu-user-static" in said(here)
