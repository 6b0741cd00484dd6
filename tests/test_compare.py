"""Two artifacts side by side: the values are those of their manifests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from runtime.artifact import files_of, read_manifest
from tests.checkpoints import Build
from tests.resealing import reseal

Pipeline = Callable[..., tuple[int, str, str]]


def test_as_json(pipeline: Pipeline, build: Build) -> None:
    one, two = build("gqa2", "fp32_xnnpack"), build("dream_sudoku", "int4_xnnpack")
    code, out, err = pipeline("compare", f"a={one}", f"b={two}", "--json")
    assert (code, err) == (0, "")
    compared = json.loads(out)
    a, b = read_manifest(one), read_manifest(two)
    assert compared["a"] == {"name": one.name, "files": files_of(a)}
    assert any("different checkpoints" in note for note in compared["notes"])
    rows = {(row["group"], row["name"]): row for row in compared["rows"]}
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
    code, out, err = pipeline("compare", f"a={one}", f"b={two}", f"html={page}")
    assert (code, err) == (0, "")
    for words in ("made of", "model.pte", "sqnr_db", "delegates", "outside: quantized_decomposed::embedding_byte.out"):
        assert words in out
        assert words == "made of" or words in page.read_text()
    assert "note: made of different checkpoints" in out
    assert [file.name for file in tmp_path.iterdir()] == ["compared.html"]


def test_with_itself(pipeline: Pipeline, build: Build) -> None:
    one = build("gqa2", "fp32_xnnpack")
    _, out, _ = pipeline("compare", f"a={one}", f"b={one}", "--json")
    compared = json.loads(out)
    assert compared["notes"] == ["model.pte is the same, byte for byte"]
    assert [row["name"] for row in compared["rows"] if row["group"] == "made of"] == ["verdict"]
    assert all(row["a"] == row["b"] and row["better"] is None for row in compared["rows"])


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
    code, out, _ = pipeline("compare", f"a={one}", f"b={artifact}", "--json")
    assert code == 0
    compared = json.loads(out)
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
        code, out, err = pipeline("compare", f"a={one}", *arguments)
        assert (code, out, err.count("\n")) == (exit_code, "", 1), err
        return err

    assert "b is not given" in refused(2)
    assert "no key 'c'" in refused(2, f"b={one}", "+c=1")
    assert "no such artifact folder" in refused(6, f"b={tmp_path / 'nowhere'}")
    assert "no folder" in refused(7, f"b={one}", f"html={tmp_path / 'nowhere' / 'page.html'}")
    changed(sizes={"program": 1, "ideal_program": 1})
    assert "KeyError: 'parts'" in refused(6, f"b={artifact}")
    changed(delegation=[])
    assert "cannot be compared" in refused(6, f"b={artifact}")
    changed(figures=[{"name": "x", "value": 1, "group": {}}])
    assert "cannot be compared" in refused(6, f"b={artifact}")
    (artifact / "report.json").write_text("[" * 100_000)
    changed()
    assert "report.json" in refused(6, f"b={artifact}")
    changed(run=manifest["run"] | {"files": {}})
    assert "names no report.json" in refused(6, f"b={artifact}")
    shutil.rmtree(artifact)
    assert "no such artifact folder" in refused(6, f"b={artifact}")
