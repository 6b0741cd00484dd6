"""The report: it shows what was measured, and a real browser finds nothing wrong with it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.commands.explain import Explained, explain_page
from report import report_json
from report.choice_page import compare_page
from report.overview import overview_of
from report.page import MEANINGS, bound_text, figure_text, render_report
from report.plots import costliest, noise_plots
from runtime.artifact import load_manifest, read_manifest
from tests.browser import CONTRASTS, Browser, chromium
from tests.checkpoints import ROOT, Build
from tests.resealing import variant
from validation.format import ProgramFormat
from validation.judge import Measured
from validation.logits import summarize
from validation.quantization_noise import LayerNoise, ModelNoise
from validation.reference import Call, Expected, Reference, Sequence
from validation.replay import Replay
from validation.wrong_layers import Fidelity, WrongLayers

PHONE, DESKTOP = 390, 1280
LONG_NAME = "<script>alert(1)</script>" + "a_long_name_" * 8


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(build: Build, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A valid one, one without a task, one out of bounds with a hostile name, two and three compared, one explained."""
    folder = tmp_path_factory.mktemp("pages")
    sudoku, random = build("dream_sudoku", "int4_xnnpack"), build("gqa2", "fp32_xnnpack")
    (folder / "failed.html").write_text(render_report(*failed(sudoku)))
    (folder / "compared.html").write_text(compare_page(overview_of([sudoku, random])))
    other = variant(sudoku, folder / LONG_NAME.replace("/", ""), {"kl_divergence": 0.5}, padding=9)
    (folder / "chosen.html").write_text(compare_page(overview_of([sudoku, other, random])))
    (folder / "explained.html").write_text(explain_page(explained(sudoku)))
    paths = {"valid": sudoku / "report.html", "no task": random / "report.html"}
    return paths | {name: folder / f"{name}.html" for name in ("failed", "compared", "chosen", "explained")}


def explained(artifact: Path) -> Explained:
    """As of a program with a wrong layer, and an ugly name."""
    noise = json.loads((artifact / "report.json").read_text())["noise"]
    layers = tuple(LayerNoise(**layer) for layer in noise["layers"])
    right, wrong = (Fidelity(131.2, 18.1, 30.0, True, parts) for parts in ((), ("values 18.1 dB", "output 30.0 dB")))
    message = "layer 1 is wrong: values 18.1 dB, must be at least 110; look at v_proj"
    located = WrongLayers(1, message, 200.0, (right, wrong, right, right), (0, 1, 2, 3))
    return Explained(LONG_NAME, "int4_xnnpack", ModelNoise(**noise | {"layers": layers}), located)


def failed(artifact: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Manifest and report as those of a program whose logits are no numbers, of a checkpoint with an ugly name."""
    manifest, report = load_manifest(artifact), json.loads((artifact / "report.json").read_text())
    manifest["checkpoint"]["name"] = LONG_NAME
    for figure in manifest["figures"]:
        if figure["group"] in ("quality", "fidelity"):
            figure |= {"ok": False, "value": "nan"}
    report["differences"] |= {"limit": 1.0, "median": None, "p95": None, "not_finite": 7, "counts": [0] * 61}
    report["calls"] = [call | {"fidelity_db": None} for call in report["calls"]]
    return manifest, report | {"valid": False}


@pytest.mark.parametrize("name", ["valid", "no task", "failed", "compared", "chosen", "explained"])
def test_in_a_browser(browser: Browser, pages: dict[str, Path], name: str) -> None:
    """No request but the page itself, no complaint, nothing wider than the window, and all text can be read."""
    for width in (DESKTOP, PHONE):
        for dark in (False, True):
            browser.open(pages[name], width, dark)
            assert browser.requests() == [pages[name].resolve().as_uri()]
            assert browser.complaints() == []
            assert browser.value("document.documentElement.scrollWidth") <= width
            assert browser.value("document.scripts.length") == 0
            contrasts = browser.value(CONTRASTS)
            assert len(contrasts) > 100
            assert [text for text, contrast in contrasts if contrast < 4.5] == [], (width, dark)
            background = browser.value("getComputedStyle(document.body).backgroundColor")
            assert (max(map(int, re.findall(r"\d+", background))) < 64) == dark
            # What is small on a phone is not read there.
            smallest = "Math.min(...[...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().width))"
            assert browser.value(smallest) > 300


def test_the_browser_sees_what_is_wrong(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "wrong.html"
    page.write_text(
        '<meta name="viewport" content="width=device-width"><body style="background: #fff">'
        '<p style="color: #999">pale</p><svg><text fill="#eee" y="20">paler</text></svg>'
        '<div style="width: 600px">wide</div><img src="http://127.0.0.1:9/x.png"><script>nothing.here()</script>'
    )
    browser.open(page, PHONE)
    assert "http://127.0.0.1:9/x.png" in browser.requests()
    assert "nothing is not defined" in json.dumps(browser.complaints())
    assert browser.value("document.documentElement.scrollWidth") > PHONE
    assert [text for text, contrast in browser.value(CONTRASTS) if contrast < 4.5] == ["pale", "paler"]


def test_without_a_browser_the_tests_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match=r"^no chromium: apt-get install -y chromium$"), chromium(tmp_path):
        pass


def test_the_verdict_is_on_top(browser: Browser, pages: dict[str, Path], build: Build) -> None:
    browser.open(pages["valid"], PHONE)
    verdict = "(e => [e.innerText, e.getBoundingClientRect().bottom])(document.querySelector('.verdict'))"
    text, bottom = browser.value(verdict)
    assert "Valid" in text
    assert "12 figures that have a bound" in text
    assert bottom < 600  # seen without scrolling
    browser.open(pages["failed"])
    text, _ = browser.value(verdict)
    assert "do not ship" in text
    for figure in failed(build("dream_sudoku", "int4_xnnpack"))[0]["figures"]:
        assert (f"{figure['name']} is nan, must be {bound_text(figure)}" in text) == (not figure["ok"])
    assert LONG_NAME in browser.value("document.querySelector('h1').textContent")


def test_it_shows_every_figure_with_its_bound(browser: Browser, pages: dict[str, Path], build: Build) -> None:
    manifest = read_manifest(build("dream_sudoku", "int4_xnnpack"))
    browser.open(pages["valid"])
    rows = "[...document.querySelectorAll('#figures tbody tr:not(.group)')]"
    listed = browser.value(f"{rows}.map(row => [...row.children].map(cell => cell.innerText))")
    shown = {cells[0].split("\n")[0]: cells[1:4] for cells in listed}
    assert shown == {
        f["name"]: [figure_text(f), bound_text(f), "" if f["bound"] is None else "✓ ok"] for f in manifest["figures"]
    }
    text = browser.value("document.body.textContent")
    for digest in (*manifest["checkpoint"]["sha256"].values(), manifest["files"]["model.pte"]["sha256"]):
        assert digest in text
    for operator, n in manifest["delegation"]["outside"].items():
        assert re.search(rf"{re.escape(operator)}\s*{n}\b", text)


def test_every_figure_has_a_meaning() -> None:
    page = (ROOT / "docs" / "validation.md").read_text()
    table = page.partition("## The figures")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]+)\|", table, flags=re.MULTILINE))))
    assert set(MEANINGS) == named - {"exports_that_differ"}  # which only `validate` measures


def test_the_plots_are_drawn_from_what_was_measured(build: Build) -> None:
    """Each plot's numbers add up to the figure that validation took from the same calls."""
    artifact = build("dream_sudoku", "int4_xnnpack")
    manifest, report = read_manifest(artifact), json.loads((artifact / "report.json").read_text())
    figures = {figure["name"]: figure["value"] for figure in manifest["figures"]}
    assert min(call["fidelity_db"] for call in report["calls"]) == pytest.approx(figures["fidelity_db"])
    assert report["differences"]["limit"] == pytest.approx(figures["max_abs_diff"])
    for groups in report["agreement"].values():
        rows = sum(group["rows"] for group in groups)
        for name, figure in (("same", "top1_agreement"), ("kl", "kl_divergence")):
            mean = sum(group["rows"] * group[name] for group in groups) / rows
            assert mean == pytest.approx(figures[figure]), name
        assert sum(report["differences"]["counts"]) == rows * manifest["model"]["vocab_size"]
    sizes = manifest["sizes"]
    assert sum(sizes["parts"].values()) == sizes["program"]
    linear = sizes["parts"]["attention"] + sizes["parts"]["mlp"] + sizes["parts"]["output"]
    assert linear == pytest.approx(sizes["linear_weights"], rel=0.1)  # without biases
    assert sizes["parts"]["other"] < 0.25 * sizes["program"]


def test_the_error_of_each_layer_is_drawn(browser: Browser, pages: dict[str, Path], build: Build) -> None:
    artifact = build("dream_sudoku", "int4_xnnpack")
    noise = json.loads((artifact / "report.json").read_text())["noise"]
    figures = {figure["name"]: figure["value"] for figure in read_manifest(artifact)["figures"]}
    assert noise["logits_db"] == pytest.approx(figures["sqnr_db"], abs=2)  # over fewer tokens, and all of their rows
    browser.open(pages["valid"])
    plots = "[...document.querySelectorAll('#quality figure')]"
    titles = browser.value(f"{plots}.map(e => [...e.querySelectorAll('title')].map(t => t.textContent))")
    for i, layer in enumerate(noise["layers"]):
        assert f"layer {i}, the stream after it: {layer['stream_db']:.1f} dB" in titles[-2]
        assert f"layer {i}, the layer alone: {layer['alone_db']:.1f} dB" in titles[-2]
        for kind, db in layer["matrices"].items():
            assert f"{kind.removesuffix('_proj')}, layer {i}: {db:.1f}" in titles[-1]
    assert "Layer 3 costs most" in browser.value(f"{plots}.at(-2).textContent")
    # In the dark as in the light: the noisiest cell stands out from the card most.
    fills = browser.value(f"[...{plots}.at(-1).querySelectorAll('.cell')].map(e => +getComputedStyle(e).fillOpacity)")
    decibels = [layer["matrices"][kind] for kind in noise["layers"][0]["matrices"] for layer in noise["layers"]]
    assert fills[decibels.index(min(decibels))] == max(fills)
    browser.open(pages["no task"])  # of a float32 recipe
    assert "leaves all weights and activations in float32" in browser.value(f"{plots}.at(-1).textContent")


def test_noise_that_is_no_number_is_said(build: Build) -> None:
    noise = json.loads((build("dream_sudoku", "int4_xnnpack") / "report.json").read_text())["noise"]
    noise["layers"][2] |= {"stream_db": None, "alone_db": None}
    plots = noise_plots(noise)
    assert "Layer 2 gives numbers that are not finite." in plots[0].text
    assert plots[0].picture.count("<circle") == 6
    for layer in noise["layers"]:
        layer |= {"stream_db": None, "alone_db": None, "share": None}
    assert [plot.text for plot in noise_plots(noise)] == ["No layer gives finite numbers."]
    same = {"stream_db": 200.0, "alone_db": 200.0, "share": 0.0, "matrices": {"q_proj": 200.0}}
    assert costliest({"layers": [same]}) == "No layer adds noise"


def test_the_example_is_what_both_wrote(browser: Browser, pages: dict[str, Path], build: Build) -> None:
    artifact = build("dream_sudoku", "int4_xnnpack")
    examples = json.loads((artifact / "report.json").read_text())["examples"]
    prompts = [json.loads(line)["prompt"] for line in (ROOT / "assets/tasks/sudoku.jsonl").read_text().splitlines()]
    assert examples["prompts"] == 1000
    assert 900 < examples["same"] < 1000
    assert [shown["differs"] for shown in examples["shown"]] == [False, True]
    for shown in examples["shown"]:
        assert shown["prompt"] == prompts[shown["number"] - 1]
        texts = {}
        for side in ("float32", "program"):
            pieces = shown[side]["pieces"]
            texts[side] = "".join(piece["text"] for piece in pieces)
            assert re.fullmatch(r"([1-4]{4}\n){3}[1-4]{4}", texts[side])
            assert {piece["step"] for piece in pieces} <= set(range(shown[side]["steps"]))
            assert any(piece["differs"] for piece in pieces) == shown["differs"]
        assert (texts["float32"] == texts["program"]) == (not shown["differs"])
    assert examples["shown"][0]["program"]["steps"] > 1
    browser.open(pages["valid"])
    sides = browser.value("[...document.querySelectorAll('#example pre')].map(e => e.textContent.replaceAll('↵', ''))")
    assert sides[3:] == [prompts[shown["number"] - 1], texts["float32"], texts["program"]]
    browser.open(pages["no task"])
    assert "without a task" in browser.value("document.querySelector('#example').innerText")


def test_logits_that_are_no_numbers_are_shown_as_such(build: Build) -> None:
    """A program that gives NaN is what a report is needed for most."""
    float32 = summarize(torch.randn(3, 8))
    logits = torch.randn(3, 8)
    logits[1, 2] = torch.nan
    call = Call(torch.tensor([1, 7, 7, 7]), 0, 4, torch.tensor([0, 1, 2]))
    columns = torch.empty(3, 0, dtype=torch.int64)
    reference = Reference(
        (Sequence("whole-000", (call,)),),
        ((Expected(float32.vector, float32, columns, torch.zeros(3), 0.1),),),
        math.inf,
    )
    replay = Replay(
        logits={"whole-000": [summarize(logits)]},
        digests={"whole-000": [""]},
        seconds={"whole-000": [0.01]},
        answers=None,
        greedy=None,
        load_seconds=0.1,
        run_seconds=0.1,
        peak_rss=1,
        anonymous=1,
        grown=1,
        threads=1,
        metadata={"get_mask_id": 7},
    )
    measured = Measured(reference, [], replay, ProgramFormat({}, (), {}, (), (), {}))
    manifest, report = failed(build("dream_sudoku", "int4_xnnpack"))
    seen: dict[str, Any] = {"calls": report_json._calls(measured), "differences": report_json._differences(measured)}
    seen |= {"agreement": report_json._agreement(measured)}
    assert seen["calls"][0]["fidelity_db"] is None
    assert seen["differences"]["not_finite"] == 1
    assert [group["kl"] for group in seen["agreement"]["masks"]] == [None]
    json.dumps(seen, allow_nan=False)
    assert "1 are not finite" in render_report(manifest, report | seen)
    replay = replace(replay, logits={"whole-000": [summarize(torch.full((3, 8), torch.nan))]})
    nothing = report_json._differences(replace(measured, replay=replay))
    assert nothing["median"] is None
    assert "no logit is a number" in render_report(manifest, report | {"differences": nothing}).lower()
