"""Artifacts side by side: the values are those of their manifests, and the front is of what nothing beats."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from report.candidate import open_candidate
from report.choice_page import compare_markdown, compare_page
from report.overview import beats, overview_of
from runtime.artifact import files_of, read_manifest
from tests.checkpoints import Build
from tests.resealing import reseal, variant

Pipeline = Callable[..., tuple[int, str, str]]


def test_as_json(pipeline: Pipeline, build: Build) -> None:
    one, two = build("gqa2", "fp32_xnnpack"), build("dream_sudoku", "int4_xnnpack")
    code, out, err = pipeline("compare", str(one), str(two), "--json")
    assert (code, err) == (0, "")
    compared = json.loads(out)
    a, b = read_manifest(one), read_manifest(two)
    artifacts = {artifact["name"]: artifact for artifact in compared["artifacts"]}
    assert artifacts[one.name]["files"] == files_of(a)
    assert artifacts[two.name]["figures"]["bytes"] == b["sizes"]["program"]
    assert any("different checkpoints" in note for note in compared["notes"])
    (detail,) = compared["details"]
    assert (detail["a"], detail["b"]) == (one.name, two.name)
    rows = {(row["group"], row["name"]): row for row in detail["rows"]}
    size = rows["size", "model.pte"]
    assert (size["a"], size["b"]) == (a["sizes"]["program"], b["sizes"]["program"])
    assert size["better"] == ("a" if size["a"] < size["b"] else "b")
    assert rows["made of", "recipe.name"]["b"] == "int4_xnnpack"
    assert rows["made of", "recipe.linear.weight_bits"]["a"] is None
    assert ("made of", "recipe.backend") not in rows  # is the same
    figures = [{figure["name"]: figure for figure in manifest["figures"]} for manifest in (a, b)]
    for name in ("sqnr_db", "kl_divergence"):
        row = rows["quality", name]
        assert (row["a"], row["b"]) == tuple(by_name[name]["value"] for by_name in figures)
        assert row["better"] == "a"  # nothing is quantized there
    assert rows["quality", "solved_percent"]["a"] is None
    outside = [manifest["delegation"]["outside"] for manifest in (a, b)]
    for name in outside[0].keys() | outside[1].keys():
        counts = [found.get(name, 0) for found in outside]
        assert (("graph", f"outside: {name}") in rows) == (counts[0] != counts[1])
    for name in ("loads in", "one token, median", "the longest call, median"):
        assert rows["speed", name]["a"] > 0


def test_as_tables_and_as_a_page(pipeline: Pipeline, build: Build, tmp_path: Path) -> None:
    one, two = build("gqa2", "fp32_xnnpack"), build("dream_sudoku", "int4_xnnpack")
    page = tmp_path / "compared.html"
    code, out, err = pipeline("compare", str(one), str(two), f"html={page}")
    assert (code, err) == (0, "")
    for words in ("made of", "model.pte", "sqnr_db", "delegates", "outside: quantized_decomposed::embedding_byte.out"):
        assert words in out
        assert words == "made of" or words in page.read_text()
    assert "note: made of different checkpoints" in out
    assert [file.name for file in tmp_path.iterdir()] == ["compared.html"]


def test_with_itself(pipeline: Pipeline, build: Build) -> None:
    one = build("gqa2", "fp32_xnnpack")
    _, out, _ = pipeline("compare", str(one), str(one), "--json")
    compared = json.loads(out)
    assert [artifact["name"] for artifact in compared["artifacts"]] == [str(one), f"{one} (2)"]
    assert all(artifact["beaten_by"] == [] for artifact in compared["artifacts"])
    (detail,) = compared["details"]
    assert detail["notes"] == ["model.pte is the same, byte for byte"]
    assert [row["name"] for row in detail["rows"] if row["group"] == "made of"] == ["verdict"]
    assert all(row["a"] == row["b"] and row["better"] is None for row in detail["rows"])


def test_speed_is_of_the_same_calls(pipeline: Pipeline, artifact: Path, build: Build) -> None:
    """A call of fewer tokens, positions or rows is not faster, it is another one."""
    one = build("gqa2", "fp32_xnnpack")
    report = json.loads((one / "report.json").read_text())
    whole = {(c["tokens"], c["kv_len"], c["rows"]) for c in report["calls"] if c["where"].startswith("whole")}
    kept = min(whole)
    for call in report["calls"]:
        shape = (call["tokens"], call["kv_len"], call["rows"])
        call["seconds"] = 1.0
        if call["where"].startswith("max-length, call 0"):
            longest = shape
            call["kv_len"] += 1
        elif call["where"].startswith("whole") and shape != kept:
            call["rows"], call["seconds"] = call["rows"] + 1000, 99.0
    (artifact / "report.json").write_text(json.dumps(report))
    reseal(artifact)
    code, out, _ = pipeline("compare", str(one), str(artifact), "--json")
    assert code == 0
    (compared,) = json.loads(out)["details"]
    rows = {row["name"]: row for row in compared["rows"] if row["group"] == "speed"}
    assert rows["a whole sequence, median"]["b"] == 1.0
    assert rows["one token, median"]["b"] == 1.0
    assert "the longest call, median" not in rows
    notes = [note for note in compared["notes"] if note.startswith("speed of")]
    assert len(notes) == 2
    assert f"and {len(whole) - 1 - 3} more" in notes[0]
    tokens, kv_len, n_rows = longest
    assert (
        f"a's {tokens} of {kv_len} with {n_rows} rows and b's {tokens} of {kv_len + 1} with {n_rows} rows" in notes[1]
    )


def test_what_cannot_be_compared(pipeline: Pipeline, artifact: Path, build: Build, tmp_path: Path) -> None:
    one = build("gqa2", "fp32_xnnpack")
    manifest = json.loads((artifact / "manifest.json").read_text())

    def changed(**values: object) -> None:
        (artifact / "manifest.json").write_text(json.dumps(manifest | values))
        reseal(artifact)

    def refused(exit_code: int, *arguments: str) -> str:
        """A line, after what the others have to show."""
        code, _, err = pipeline("compare", *arguments)
        assert (code, err.count("\n")) == (exit_code, 1), err
        return err

    assert "no artifact folder is given" in refused(2)
    assert "no key 'c'" in refused(2, str(one), "+c=1")
    assert "artifacts is given twice" in refused(2, str(one), f"artifacts=[{one}]")
    assert "no such artifact folder" in refused(6, str(one), str(tmp_path / "nowhere"))
    assert "no folder" in refused(7, str(one), f"html={tmp_path / 'nowhere' / 'page.html'}")
    changed(sizes={"program": 1, "ideal_program": 1})
    assert "KeyError: 'parts'" in refused(6, str(one), str(artifact))
    changed(delegation=[])
    assert "cannot be compared" in refused(6, str(one), str(artifact))
    changed(figures=[{"name": "x", "value": 1, "group": {}}])
    assert "cannot be compared" in refused(6, str(one), str(artifact))
    (artifact / "report.json").write_text("[" * 100_000)
    changed()
    assert "report.json" in refused(6, str(one), str(artifact))
    changed(run=manifest["run"] | {"files": {}})
    assert "names no report.json" in refused(6, str(one), str(artifact))
    shutil.rmtree(artifact)
    assert "no such artifact folder" in refused(6, str(one), str(artifact))


# ---- Any number ----


@pytest.fixture(scope="module")
def choices(sudoku: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts that say different things of themselves, and a file that is none."""
    folder = tmp_path_factory.mktemp("choices")
    manifest = read_manifest(sudoku)

    def kl(value: float) -> dict[str, float]:
        return {"kl_divergence": value}

    variant(sudoku, folder / "small", kl(0.01))
    variant(sudoku, folder / "right", kl(0.001), padding=1000)
    variant(sudoku, folder / "worse", kl(0.02), padding=500)
    variant(sudoku, folder / "unlucky", kl(0.001), padding=1000, slower=1.05)
    variant(sudoku, folder / "elsewhere", kl(0.02), padding=2000, slower=0.1, machine={"cpus": 64})
    variant(sudoku, folder / "long", kl(0.02), padding=3000, export=manifest["export"] | {"max_seq_len": 512})
    variant(sudoku, folder / "other", kl(1e-9), validation=manifest["validation"] | {"seed": 1})
    variant(sudoku, folder / "unmeasured", {"kl_divergence": "nan"})
    out_of_bounds(variant(sudoku, folder / "wrong", kl(1e-9), slower=0.01))
    (folder / "tuned.yaml").write_text("name: x")
    return folder


def out_of_bounds(artifact: Path) -> Path:
    """The same, where a figure was when it was made."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["figures"][0]["ok"] = False
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    reseal(artifact)
    return artifact


def test_the_front_is_what_nothing_beats(pipeline: Pipeline, choices: Path) -> None:
    code, out, err = pipeline("compare", *map(str, sorted(choices.iterdir())), "--json")
    assert (code, err) == (0, "")
    compared = json.loads(out)
    found = {one["name"]: one for one in compared["artifacts"]}
    assert {name: sorted(one["beaten_by"]) for name, one in found.items() if one["beaten_by"]} == {
        "worse": ["small"],  # larger, and loses more
        "unmeasured": ["small"],  # as large, and nobody knows what it loses
        "elsewhere": ["right", "small", "unlucky", "worse"],  # its times are of another machine
    }
    assert not found["wrong"]["front"]
    assert found["wrong"]["out_of_bounds"] == ["fidelity_db"]
    assert found["long"]["front"], "it can take more tokens"
    assert found["other"]["front"], "it was measured on other inputs, and is a group of its own"
    assert found["unmeasured"]["missing"]["kl"] == "not a number"
    assert found["other"]["group"] != found["small"]["group"]
    assert [(detail["a"], len(detail["rows"]) > 10) for detail in compared["details"]] == 8 * [("elsewhere", True)]
    assert any(
        "within a machine only" in note and "of 64 processors, 2 threads: elsewhere" in note
        for note in compared["notes"]
    )


def test_what_beats_another(choices: Path) -> None:
    right, unlucky, small = (open_candidate(choices / name) for name in ("right", "unlucky", "small"))
    assert not beats(right, unlucky), "times within 10% are equal"
    assert not beats(small, right)
    assert not beats(right, small)
    slow = right.values | {"ms": 1.2 * right.values["ms"]}
    assert beats(right, type(right)(**vars(right) | {"values": slow}))
    unknown = type(right)(**vars(right) | {"values": {n: v for n, v in slow.items() if n != "kl"}})
    assert beats(right, unknown)
    assert not beats(type(right)(**vars(unknown) | {"values": unknown.values | {"ms": 0.0}}), unknown)


def test_a_table_a_page_and_markdown_of_all(pipeline: Pipeline, choices: Path, tmp_path: Path) -> None:
    page, summary = tmp_path / "page.html", tmp_path / "summary.md"
    code, out, err = pipeline("compare", *map(str, sorted(choices.iterdir())), f"html={page}", f"summary={summary}")
    assert (code, err) == (0, "")
    lines = summary.read_text().splitlines()
    for name in ("small", "right", "other"):
        assert re.search(rf"^ +{name} .* front *$", out, flags=re.MULTILINE), name
        assert any(line.startswith(f"| **`{name}`** |") and line.endswith("| **front** |") for line in lines), name
    assert any(line.startswith("| `worse` |") and "`beaten by small`" in line for line in lines)
    assert "out of bounds:" in out
    assert "made of" not in out, "what differs in detail is of two"
    shown = page.read_text()
    assert shown.count("<details>") == 8
    assert "✓ front" in shown
    assert "Size against divergence" in shown


def test_one_that_is_damaged_is_named_beside_the_others(pipeline: Pipeline, choices: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(choices / "small", broken)
    (broken / "model.pte").write_bytes(b"")
    summary = tmp_path / "summary.md"
    words = [str(broken), str(choices / "small"), str(choices / "right")]
    code, out, err = pipeline("compare", *words, "--json", f"summary={summary}")
    assert (code, err.count("\n")) == (6, 1)
    compared = json.loads(out)
    assert [one["name"] for one in compared["artifacts"]] == ["small", "right"]
    assert [one["name"] for one in compared["unusable"]] == ["broken"]
    assert "`broken` cannot be compared" in summary.read_text()


@pytest.mark.parametrize("name", ["a=b", "a, b", "[x]", "${oc.env:HOME}", "it's", "{x: 1}", "数独", "<b>", "`|`\n# x"])
def test_a_name_is_taken_as_it_stands(pipeline: Pipeline, artifact: Path, tmp_path: Path, name: str) -> None:
    artifact.rename(tmp_path / name)
    code, out, err = pipeline("compare", str(tmp_path / name), "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["artifacts"][0]["name"] == name
    overview = overview_of([tmp_path / name])
    assert f"<th>{name}</th>" in compare_page(overview) or "<" in name or "'" in name or "`" in name
    assert "<b>" not in compare_page(overview)
    (row,) = [line for line in compare_markdown(overview).splitlines() if line.startswith("| **`")]
    assert len(re.split(r"(?<!\\)\|", row)) == 12
    assert "\n# x" not in compare_markdown(overview)
