"""`validate target=arm64`: the recorded calls on Arm cores that QEMU emulates, and what it needs for that."""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import road
from runtime.artifact import MANIFEST_FILE, out_of_bounds, read_manifest
from tests.checkpoints import GOLDEN, Build
from tests.resealing import reseal
from validation import arm
from validation.figure import Figure

Pipeline = Callable[..., tuple[int, str, str]]
Native = Callable[..., Path]
pytestmark = pytest.mark.skipif(platform.machine() == "aarch64", reason="this is Arm")
CORES = ["cortex-a53", "cortex-a76"]
SMALL = (f"checkpoint={GOLDEN / 'gqa2'}", "export.max_seq_len=64", "validation.n_prompts=8")


@pytest.mark.parametrize(
    ("checkpoint", "recipe", "bounds"),
    [
        ("gqa2", "int4_xnnpack", (30, 30)),
        ("dream_sudoku", "int4_xnnpack", (30, 30)),
        ("gqa2", "fp16_xnnpack", (50, 36)),
    ],
)
def test_an_artifact_is_right_on_each_core(
    build: Build,
    native: Native,
    pipeline: Pipeline,
    tmp_path: Path,
    checkpoint: str,
    recipe: str,
    bounds: tuple[int, int],
) -> None:
    """bounds: of the core without and of the one with FEAT_FP16, which adds in float16."""
    artifact, summary = build(checkpoint, recipe), tmp_path / "summary.md"
    keys = (f"artifact={artifact}", f"runner={native('aarch64')}", f"cores=[{','.join(CORES)}]")
    code, _, err = pipeline("validate", "target=arm64", *keys, f"summary={summary}")
    assert (code, err) == (0, "")
    rows = [line.split("|")[2:4] for line in summary.read_text().splitlines() if "| `" in line]
    found = [(group.strip(), name.strip(" `")) for group, name in rows]
    names = ("fidelity_db", "fidelity_exact_db", "wrong_metadata", "calls_that_differ", "other_bits")
    assert found == [(core, name) for core in CORES for name in names]
    held = [line.split("|")[5].strip() for line in summary.read_text().splitlines() if "`fidelity_db`" in line]
    assert held == [f"≥ {bound}" for bound in bounds]


def test_bounds_are_held_on_arm_too(build: Build, native: Native, pipeline: Pipeline) -> None:
    keys = (f"artifact={build('gqa2', 'int4_xnnpack')}", f"runner={native('aarch64')}", "cores=[cortex-a53]")
    code, _, err = pipeline("validate", "target=arm64", *keys, "bounds.fidelity_exact_db=190")
    assert (code, err.count("\n")) == (5, 1)
    assert "cortex-a53: fidelity_exact_db is " in err


def test_a_run_tries_its_artifact_on_arm_too(native: Native, pipeline: Pipeline, tmp_path: Path) -> None:
    """Figures and features of each core are in the manifest and on the page; out of bounds there is out of bounds."""
    settings = ("recipe=int8_xnnpack", *SMALL)
    where = ("targets=[host,arm64]", f"runner={native('aarch64')}", f"cores=[{','.join(CORES)}]")
    keys = (*settings, *where, f"output={tmp_path / 'made'}", f"cache={tmp_path / 'cache'}")
    code, out, err = pipeline("run", *keys)
    assert (code, err) == (0, "")
    manifest = read_manifest(tmp_path / "made")
    assert [core["core"] for core in manifest["cores"]] == CORES
    assert [core["features"] for core in manifest["cores"]] == [[], ["asimdhp", "asimddp"]]
    for core in manifest["cores"]:
        named = {figure["name"]: figure for figure in core["figures"]}
        assert named["fidelity_db"]["bound"] == manifest["recipe"]["bounds"]["fidelity_db"]
        assert all(figure["ok"] and figure["group"] == core["core"] for figure in named.values())
        assert re.search(rf"^ +{core['core']} +fidelity_exact_db ", out, flags=re.MULTILINE)
    assert list(json.loads((tmp_path / "made" / "report.json").read_text())["cores"]) == CORES
    page = (tmp_path / "made" / "report.html").read_text()
    assert "cortex-a76, an Arm core that QEMU emulates: asimdhp, asimddp" in page
    assert pipeline("validate", f"artifact={tmp_path / 'made'}")[0] == 0
    code, out, _ = pipeline("inspect", f"artifact={tmp_path / 'made'}", "--device")
    assert code == 0
    assert re.search(r"cortex-a76 +right; asimdhp, asimddp", out)


def test_wrong_on_arm_is_out_of_bounds(
    native: Native, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(_: Path, cores: list[str], *__: object) -> list[arm.OnCore]:
        return [arm.OnCore(core, (), (Figure(core, "fidelity_db", 3.0, 30.0, True, "a call"),), 1.0) for core in cores]

    monkeypatch.setattr(road, "replay_on_cores", wrong)
    settings = ("recipe=fp32_xnnpack", *SMALL)
    where = ("targets=[host,arm64]", f"runner={native('aarch64')}", f"output={tmp_path / 'made'}")
    code, _, err = pipeline("run", *settings, *where, f"cache={tmp_path / 'cache'}")
    assert (code, err.count("\n")) == (5, 1)
    assert "cortex-a53: fidelity_db is 3, must be at least 30 (a call)" in err
    assert not (tmp_path / "made").exists()
    failed = tmp_path / "made.failed"
    assert out_of_bounds(read_manifest(failed)) == ["fidelity_db"] * 3
    assert not json.loads((failed / "report.json").read_text())["valid"]
    assert json.loads(pipeline("inspect", f"artifact={failed}", "--json")[1])["valid"] is False


def test_targets_are_checked_before_the_long_work(pipeline: Pipeline, tmp_path: Path) -> None:
    for keys, said in (
        (("targets=[arm64]",), "targets [arm64]: host, which the artifact is made on, and arm64 besides"),
        (("targets=[host,host]",), "targets [host, host]"),
        (("targets=[host,arm64]", "runner=nowhere"), "no native runner nowhere"),
        (("targets=[host,arm46]",), "arm64"),
    ):
        code, _, err = pipeline("run", *keys, f"output={tmp_path / 'made'}")
        assert (code, err.count("\n")) == (2, 1)
        assert said in err
    assert list(tmp_path.iterdir()) == []


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


def test_an_emulator_that_multiplies_wrong_is_found_out(
    artifact: Path, native: Native, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a known product of integers, where its core has SME; of others nothing is refused."""
    runner = native("aarch64")
    right = arm._on_core("max", runner, "--processor")["multiplies_right"]
    assert arm._on_core("max,sme=off", runner, "--processor")["multiplies_right"]
    keys = ("target=arm64", f"artifact={artifact}", f"runner={runner}", "cores=[max]")
    if right:  # QEMU 10 and later: as if it were not
        on_core = arm._on_core
        wrong = {"features": ["sme"], "multiplies_right": False}
        monkeypatch.setattr(arm, "_on_core", lambda *words: wrong if "--processor" in words else on_core(*words))
    code, _, err = pipeline("validate", *keys)
    assert (code, err.count("\n")) == (2, 1)
    assert "multiplies integers wrong on a core with SME, which max has: give 'max,sme=off'" in err
    monkeypatch.setattr(arm, "checked_tools", lambda *_: runner)  # the runner itself sees it too
    if not right:
        code, _, err = pipeline("validate", *keys)
        assert (code, err.count("\n")) == (6, 1)
        assert "max: this processor multiplies integers wrong with SME, as QEMU before 10 does" in err


def test_what_is_not_there_is_named(
    artifact: Path, native: Native, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*keys: str) -> str:
        code, _, err = pipeline("validate", "target=arm64", f"artifact={artifact}", *keys)
        assert (code, err.count("\n")) == (2, 1), err
        return err

    here = f"runner={native('aarch64')}"
    assert "did you mean 'cortex-a76'?" in said(here, "cores=[cortex-a77x]")
    assert "give one or more, each once" in said(here, "cores=[]")
    assert "baseline is for target=host" in said(here, f"baseline={artifact}")
    assert "`make runner ARCH=aarch64` builds it" in said("runner=nowhere")
    assert "did you mean" in said("targets=arm64")
    assert "model.pte does not run: cortex-a53: " in said(f"runner={artifact / 'model.pte'}")
    monkeypatch.setattr(arm, "LIBRARIES", Path("nowhere"))
    assert "Debian has it in g++-aarch64-linux-gnu" in said(here)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "Debian has it in qemu-user-static" in said(here)
