"""What a CI is given: a summary, JUnit XML, bounds of its own, and the comparison with the last release."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from evidence import baseline
from evidence.baseline import Baseline, against_baseline, open_baseline
from pipeline.commands.validate import pinned
from pipeline.config import names_of_keys
from pipeline.schema import Margins, PinnedBounds
from report.ci import junit, markdown
from runtime.artifact import MANIFEST_FILE, load_manifest
from runtime.errors import BadArtifactError, UsageError
from tests.checkpoints import ROOT, Build
from tests.resealing import reseal
from validation.figure import Figure
from validation.progress import silent

Pipeline = Callable[..., tuple[int, str, str]]
PAGE = (ROOT / "docs" / "ci.md").read_text()
GOOD = Figure("quality", "sqnr_db", 26.25, 20, True)
BAD = Figure("fidelity", "fidelity_db", 3, 30, True, "whole-000, call 0")
HOSTILE = 'x`</td><script>alert(1)</script>\n\n# [ship it](http://evil) | \x1b[2J\x00 "&'


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    loaded = yaml.safe_load(example)
    assert isinstance(loaded, dict)
    return loaded


def steps(workflow: dict[str, Any]) -> dict[str, str]:
    (job,) = workflow["jobs"].values()
    return {step["name"]: step["run"] for step in job["steps"] if "run" in step}


@pytest.fixture
def artifacts(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """artifacts/new and artifacts/last, as the workflow has them."""
    monkeypatch.chdir(tmp_path)
    made = build("gqa2", "fp32_xnnpack")
    (tmp_path / "artifacts").mkdir()
    shutil.copytree(made, tmp_path / "artifacts" / "new")
    (tmp_path / "artifacts" / "last").symlink_to(made)
    return tmp_path / "artifacts"


def test_the_example_workflow_is_one(workflow: dict[str, Any]) -> None:
    run = steps(workflow)
    assert set(run) == {"Install", "Fetch the artifacts", "Validate", "Harness", "Show the verdict"}
    (job,) = workflow["jobs"].values()
    assert all(("uses" in step) != ("run" in step) for step in job["steps"])
    validate, harness = shlex.split(run["Validate"]), shlex.split(run["Harness"])
    assert validate[:4] == ["python", "-m", "pipeline", "validate"]
    assert {word.partition("=")[0] for word in validate[4:]} <= set(names_of_keys("validate"))
    assert harness[:4] == ["python", "-m", "pytest", "runtime_tests"]
    assert '"--artifact"' in (ROOT / "runtime_tests" / "conftest.py").read_text()
    assert (ROOT / "constraints.txt").is_file()
    assert "--constraint constraints.txt" in run["Install"]


def test_the_example_validates(
    workflow: dict[str, Any], artifacts: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As written, but for the speed: another test may have the other core."""
    monkeypatch.setattr(baseline, "ROUNDS", 1)
    command = shlex.split(steps(workflow)["Validate"])[3:]
    code, out, err = pipeline(*command, "margins.seconds=50")
    assert (code, err) == (0, "")
    summary = Path("summary.md").read_text()
    suite = ElementTree.parse("validate.xml").getroot()[0]
    figures = {figure["name"] for figure in load_manifest(artifacts / "new")["figures"]}
    compared = {"program_bytes", "planned_memory", "sqnr_db", *(f"seconds_of_{T}_tokens" for T in (1, 32, 128, 256))}
    cases = [(case.get("classname"), case.get("name")) for case in suite]
    assert {name for group, name in cases if group == "validate.baseline"} >= compared
    assert {name for group, name in cases if group != "validate.baseline"} == figures
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == (str(len(cases)), "0", "0")
    assert summary.startswith("## ✅ `new` is valid\n")
    reported = {
        "top1_agreement",
        "sqnr_db",
        "cosine",
        "max_abs_diff",
        "order_agreement",
    }  # and judged only if somebody pins them
    pinned = {"top1_agreement"}  # by the workflow
    judged = len(cases) - sum(group == "validate.quality" and name in reported - pinned for group, name in cases)
    assert f"{judged} of {judged} figures are within bounds, {len(cases) - judged} are reported" in summary
    assert out.endswith(f"\nverdict: right, {judged} figures are within bounds, {len(cases) - judged} are reported\n")
    assert all(f"`{name}`" in summary and str(name) in out for _, name in cases)
    rows = re.findall(r"^\| ✅ \| fidelity \| `fidelity_db` \|.*$", summary, flags=re.MULTILINE)
    assert "≥ 30" in rows[0]  # the workflow's bound, not the artifact's


def test_a_failure_is_written_and_exits_with_5(artifacts: Path, pipeline: Pipeline) -> None:
    reports = ["summary=summary.md", "junit=validate.xml"]
    code, _, err = pipeline(
        "validate", "artifact=artifacts/new", "bounds.sqnr_db=500", "bounds.solved_percent=9", *reports
    )
    assert code == 5
    assert "sqnr_db" in err
    assert "solved_percent is nan" in err
    assert Path("summary.md").read_text().startswith("## ❌ `new` is not valid\n")
    suite = ElementTree.parse("validate.xml").getroot()[0]
    failed = [case.get("name") for case in suite if case.find("failure") is not None]
    assert sorted(map(str, failed)) == ["solved_percent", "sqnr_db"]
    assert suite.get("failures") == "2"


def test_a_damaged_artifact_is_written_and_exits_with_6(artifacts: Path, pipeline: Pipeline) -> None:
    pte = artifacts / "new" / "model.pte"
    pte.write_bytes(pte.read_bytes()[:-1])
    code, _, err = pipeline("validate", "artifact=artifacts/new", "summary=summary.md", "junit=validate.xml")
    assert code == 6
    assert "(exit code 6)" in Path("summary.md").read_text()
    error = ElementTree.parse("validate.xml").getroot()[0][0][0]
    assert (error.tag, error.get("type")) == ("error", "BadArtifactError")
    assert str(error.get("message")) in err
    code, _, err = pipeline("validate", "artifact=artifacts/last", "baseline=artifacts/new")
    assert code == 6
    assert "model.pte" in err


def test_reports_are_refused_before_the_work(artifacts: Path, pipeline: Pipeline) -> None:
    for key in ("summary", "junit"):
        code, _, err = pipeline("validate", "artifact=artifacts/new", f"{key}=/nowhere/x")
        assert (code, err.count("\n")) == (7, 1)
    code, _, err = pipeline("validate", "artifact=artifacts/new", "--summary", "x.md")
    assert code == 2
    assert "did you mean summary=" in err


def test_what_an_artifact_says_stays_text() -> None:
    """No markup and no control character of a name gets into the page or the XML."""
    figures = [GOOD, replace(BAD, where=HOSTILE)]
    page = markdown("new", figures, None)
    assert page.count("\n") == len(markdown("new", [GOOD, BAD], None).splitlines())
    row = next(line for line in page.splitlines() if "fidelity_db" in line)
    assert re.sub(r"`[^`]*`", "", row).count("<") == 0
    assert len(re.split(r"(?<!\\)\|", row)) == 8
    case = ElementTree.fromstring(junit(HOSTILE, figures, None))[0][1]
    assert case.find("failure") is not None
    error = BadArtifactError(HOSTILE * 100)
    assert len(markdown("new", [], error)) < 500
    assert ElementTree.fromstring(junit("new", [], error))[0][0][0].tag == "error"


def test_pinned_bounds_take_the_place_of_the_artifacts() -> None:
    assert pinned([GOOD, BAD], PinnedBounds()) == [GOOD, BAD]
    loose, strict = pinned([BAD], PinnedBounds(fidelity_db=1)), pinned([GOOD], PinnedBounds(sqnr_db=27))
    assert [figure.ok for figure in (*loose, *strict)] == [True, False]
    assert not pinned([GOOD], PinnedBounds(cosine=0.5))[-1].ok  # not measured


THEN = {
    "top1_agreement": 0.99, "kl_divergence": 0.01, "sqnr_db": 26.0, "cosine": 0.95, "max_abs_diff": 2.0,
    "solved_percent": 99.0, "planned_memory": 1000.0,
}  # fmt: skip
MARGINS = asdict(Margins(0.005, 0.001, 0.5, 0.01, 0.5, 0.5, size=0.02, seconds=0.2))


@pytest.mark.parametrize(
    ("figure", "now", "is_worse"),
    [
        ("top1_agreement", 0.986, False), ("top1_agreement", 0.984, True), ("top1_agreement", 1.0, False),
        ("kl_divergence", 0.0109, False), ("kl_divergence", 0.0112, True),
        ("sqnr_db", 25.6, False), ("sqnr_db", 25.4, True), ("sqnr_db", float("nan"), True),
        ("cosine", 0.945, False), ("cosine", 0.93, True),
        ("max_abs_diff", 2.4, False), ("max_abs_diff", 2.6, True),
        ("solved_percent", 98.6, False), ("solved_percent", 98.4, True), ("solved_percent", None, True),
        ("planned_memory", 1019, False), ("planned_memory", 1021, True),
        ("program_bytes", 1019, False), ("program_bytes", 1021, True), ("program_bytes", 500, False),
        ("seconds_of_32_tokens", 1.19, False), ("seconds_of_32_tokens", 1.21, True),
    ],
)  # fmt: skip
def test_worse_than_the_baseline(
    figure: str, now: float | None, is_worse: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, n_bytes in (("then", 1000), ("now", int(now or 0) if figure == "program_bytes" else 1000)):
        (tmp_path / name).write_bytes(bytes(n_bytes))
    seconds = {32: (now if now is not None and figure == "seconds_of_32_tokens" else 1.0, 1.0)}
    monkeypatch.setattr(baseline, "call_seconds", lambda *_: seconds)
    measured = [Figure("quality", n, v, 0, True) for n, v in (THEN | {figure: now}).items() if v is not None]
    compared = against_baseline(measured, tmp_path / "now", Baseline(tmp_path / "then", THEN), MARGINS, silent)
    assert {f.name for f in compared} == {*THEN, "program_bytes", "seconds_of_32_tokens"}
    assert [f.name for f in compared if not f.ok] == [figure] * is_worse


def test_a_baseline_has_to_be_comparable(build: Build, tmp_path: Path) -> None:
    made = build("gqa2", "fp32_xnnpack")
    manifest = load_manifest(made)
    other = json.loads(json.dumps(manifest))
    other["validation"]["n_prompts"] = 8
    with pytest.raises(UsageError, match=r"validation.n_prompts=32, the artifact with 8"):
        open_baseline(made, other)
    damaged = tmp_path / "damaged"
    shutil.copytree(made, damaged)
    changes: tuple[dict[str, Any], ...] = (
        {"figures": []},
        {"figures": [{}]},
        {"figures": 3},
        {"task": None},
        {"files": {}},
    )
    for change in changes:
        (damaged / MANIFEST_FILE).write_text(json.dumps(manifest | change))
        reseal(damaged)
        with pytest.raises(BadArtifactError, match=MANIFEST_FILE):
            open_baseline(damaged, manifest)
