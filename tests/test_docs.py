"""What the documents show is what the commands print, and what they name exists."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evidence.device import cmake_lines
from pipeline.__main__ import HELP
from pipeline.cli import OUR_FLAGS
from pipeline.config import _keys, names_of
from pipeline.schema import POSITIONAL, SCHEMAS
from runtime.artifact import read_manifest
from tests.checkpoints import BUNDLED, GOLDEN, INFILL, ROOT, Build, arguments

PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "findings" / "README.md", *(ROOT / "docs").glob("*.md")]
)
README = (ROOT / "README.md").read_text()

# What the words stand for that a reader puts something in the place of, page by page.
PLACEHOLDERS = {
    "README.md": {"DIR": "mine", "NAME": "mine"},
    "performance.md": {"DIR": "artifacts/dream_sudoku-int4_xnnpack", "FOLDER": "packed", "TEXT": "1003"},
    "provenance.md": {"DIR": "artifacts/new"},
}
# The lines that no test runs as they stand, and why. Whatever else is in a block of commands is run.
NOT_RUN = {
    "make run   # sets up .venv, builds and validates the int4 program of the bundled checkpoint": "takes the network",
    "make test  # the same set-up, then the tests": "runs this",
    "python3.11 -m venv .venv": "the environment of the tests was made so",
    '.venv/bin/pip install --constraint constraints.txt --editable ".[dev]"': "takes the network",
    ".venv/bin/python -m pipeline run recipe=int4_xnnpack overwrite=true": "the fixture `build` runs it, elsewhere",
    ".venv/bin/python -m pipeline run checkpoint=assets/dream_infill recipe=int4_xnnpack": "the fixture `build`, too",
    "python3.11 -m venv anywhere": "test_installed.py",
    'anywhere/bin/pip install --constraint constraints.txt ".[harness]"': "test_installed.py, without the network",
    "anywhere/bin/dreamedge run recipe=int4_xnnpack overwrite=true": "test_installed.py, with a smaller checkpoint",
    "anywhere/bin/python -m pytest --pyargs runtime_tests --artifact artifacts/dream_sudoku-int4_xnnpack": (
        "test_installed.py, with a smaller artifact"
    ),
    "dreamedge validate artifact=artifacts/new summary=summary.md junit=validate.xml": "test_installed.py",
    "python -m pytest --pyargs runtime_tests --artifact artifacts/new --junitxml harness.xml": "test_installed.py",
    (
        "find conf evidence model pipeline recipes report runtime validation -name '*.py' -o -name '*.yaml'"
        " | LC_ALL=C sort | xargs sha256sum | sha256sum"
    ): "test_evidence.py, and what it prints",
    ".venv/bin/python -m pipeline tune checkpoint=assets/dream_english budget.kl=0.005": "test_tune.py, of another",
    (
        ".venv/bin/python -m pipeline run recipe=artifacts/dream_english-tuned.yaml"
        " checkpoint=assets/dream_english budget.kl=0.005"
    ): "test_tune.py, of another",
    "make runner                 # build/runner-x86_64/dreamedge-run": "test_runner.py",
    "make runner ARCH=aarch64    # build/runner-aarch64/dreamedge-run": "test_runner.py",
    "build/runner-x86_64/dreamedge-run --self-test artifact=artifacts/dream_sudoku-int4_xnnpack": "test_runner.py",
    ".venv/bin/python -m pipeline validate artifact=artifacts/dream_sudoku-int4_xnnpack target=arm64": "test_arm.py",
    ".venv/bin/python -m pipeline run recipe=int4_xnnpack targets=[host,arm64] output=artifacts/new": "test_arm.py",
    (
        "build/runner-x86_64/dreamedge-run artifact=artifacts/dream_sudoku-int4_xnnpack"
        " prompt=$'1003\\n0300\\n4000\\n0041' threshold=0.9"
    ): "test_runner_generation.py",
    '.venv/bin/pip install --constraint constraints.txt --editable ".[serve]"': "takes the network",
    ".venv/bin/python -m pipeline serve artifact=artifacts/dream_sudoku-int4_xnnpack threshold=0.9": "test_serving.py",
    (
        '.venv/bin/python -m pipeline chat artifact=DIR system="Answer briefly." save=chat.jsonl'
        " cache=dual threshold=0.9"
    ): "test_chat.py",
    '.venv/bin/pip install --constraint constraints.txt --editable ".[lm-eval]"': "takes the network",
    '.venv/bin/pip install --constraint constraints.txt --editable ".[s3]"': "takes the network",
    (
        ".venv/bin/python -m pipeline publish artifacts/dream_sudoku-int4_xnnpack registry=s3://bucket/models"
    ): "takes a bucket; tests/extra/test_s3.py",
    (
        ".venv/bin/python -m pipeline evaluate artifact=DIR lm_eval=[gsm8k,humaneval] n=100"
        " temperature=0.1 top_p=0.9 threshold=0.9"
    ): "takes the network; test_lm_eval.py, of its own tasks",
    (
        ".venv/bin/python -m pipeline run --multirun checkpoint=A,B recipe=int4_xnnpack,int8_xnnpack exp"
        "ort.max_seq_len=512,2048"
    ): "test_sweep.py and tests/extra/test_launchers.py, of others",
    ('.venv/bin/pip install --constraint constraints.txt --editable ".[joblib]"'): "takes the network",
    (
        ".venv/bin/python -m pipeline run --multirun hydra/launcher=joblib hydra.launcher.n_jobs=4 check"
        "point=A,B recipe=int4_xnnpack,int8_xnnpack"
    ): "test_sweep.py and tests/extra/test_launchers.py, of others",
    ('.venv/bin/pip install --constraint constraints.txt --editable ".[slurm]"'): "takes the network",
    (
        ".venv/bin/python -m pipeline run --multirun hydra/launcher=submitit_slurm hydra.launcher.partit"
        "ion=main hydra.launcher.mem_gb=16 hydra.launcher.timeout_min=600 checkpoint=A,B recipe=int4_xnn"
        "pack,int8_xnnpack"
    ): "tests/extra/test_launchers.py",
    ('.venv/bin/pip install --constraint constraints.txt --editable ".[ray]"'): "takes the network",
    (".venv/bin/pip install --no-deps hydra-ray-launcher==1.2.2"): "takes the network",
    (
        ".venv/bin/python -m pipeline run --multirun hydra/launcher=ray hydra.launcher.ray.init.address="
        "HEAD:6379 +hydra.launcher.ray.init.object_store_memory=null checkpoint=A,B recipe=int4_xnnpack,"
        "int8_xnnpack"
    ): "tests/extra/test_launchers.py",
    ('.venv/bin/pip install --constraint constraints.txt --editable ".[search]"'): "takes the network",
    (
        ".venv/bin/python -m pipeline run --multirun hydra/sweeper=search hydra.sweeper.n_trials=20 hydr"
        "a.sweep.dir=artifacts/search checkpoint=DIR recipe=int4_xnnpack 'recipe.linear.rules.q_proj=cho"
        "ice(int4_channel,int4,int8)' 'recipe.linear.rules.down_proj=choice(int4_channel,int4,int8)' 're"
        "cipe.linear.rules.lm_head=choice(int4,int8)'"
    ): "tests/extra/test_search.py, of another",
    "python -m scripts.faults catch docs/faults.json": "takes 45 minutes",
    "python -m scripts.faults alarms docs/alarms.json": "takes two hours",
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_help_is_the_commands() -> None:
    assert HELP in blocks(README, "text")


def test_the_recipes_are_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.__main__ import main

    main(["recipes"])
    printed = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    shown = [[line.strip() for line in block.splitlines() if line.strip()] for block in blocks(README, "text")]
    assert printed in shown


def test_the_run_shows_each_figure_with_its_bound(build: Build) -> None:
    shown = next(block for block in blocks(README, "text") if "fidelity_exact_db" in block)
    figures = read_manifest(build("dream_sudoku", "int4_xnnpack"))["figures"]
    rows = {words[1]: words[2:] for words in map(str.split, shown.splitlines()) if {"ok", "reported"} & set(words)}
    assert set(rows) == {figure["name"] for figure in figures}
    for figure in figures:
        # A figure may differ from machine to machine, but not by much.
        assert float(rows[figure["name"]][0]) == pytest.approx(figure["value"], rel=0.2, abs=1e-3), figure["name"]
        if figure["bound"] is None:
            assert rows[figure["name"]][1] == "reported"
        else:
            measured = {"kl_divergence": 0.05}  # this bound is, too: by what eager loses
            tolerance = measured.get(figure["name"], 1e-5)
            assert float(rows[figure["name"]][2]) == pytest.approx(figure["bound"], rel=tolerance), figure["name"]
            assert rows[figure["name"]][3] == "ok"


def test_every_figure_is_explained(build: Build) -> None:
    page = (ROOT / "docs" / "validation.md").read_text()
    for figure in read_manifest(build("dream_sudoku", "int4_xnnpack"))["figures"]:
        assert f"`{figure['name']}`" in page


def test_the_lines_of_an_app_are_the_commands(build: Build) -> None:
    needs = read_manifest(build("dream_sudoku", "int4_xnnpack"))["device"]
    assert "\n".join(cmake_lines(needs)) + "\n" in blocks((ROOT / "docs" / "device.md").read_text(), "text")


def test_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        for line in "\n".join(blocks(page.read_text(), "sh")).splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["make"]:
                assert words[1] in targets
            if words[1:3] == ["-m", "pipeline"]:
                keys = _keys(SCHEMAS[words[3]]) if words[3] != "recipes" else []
                is_named = [w for w in words[4:] if words[3] not in POSITIONAL or "=" in w or w.startswith("-")]
                given = {word.partition("=")[0].lstrip("+") for word in is_named}
                given = {key for key in given if key.partition(".")[0].partition("/")[0] != "hydra"}
                rules = {key for key in given if key.startswith("recipe.linear.rules.")}
                assert given - rules <= {*keys, *OUR_FLAGS.get(words[3], {}), "--multirun"}


def test_the_example_recipe_is_one() -> None:
    from omegaconf import OmegaConf

    from recipes.options import Recipe

    (example,) = blocks((ROOT / "docs" / "recipes.md").read_text(), "yaml")
    recipe = OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.create(example))
    assert recipe.name not in names_of("recipe")


def test_the_example_task_is_one() -> None:
    from omegaconf import OmegaConf

    from validation.settings import TaskConfig

    (example,) = blocks((ROOT / "docs" / "tasks.md").read_text(), "yaml")
    task = OmegaConf.merge(OmegaConf.structured(TaskConfig), OmegaConf.create(example))
    assert task.name not in names_of("task")


def test_the_caches_are_drawn_from_real_calls() -> None:
    import torch

    from model import load_hf_model
    from scripts.draw_caches import CHECKPOINT, draw

    model, _, _ = load_hf_model(CHECKPOINT, dtype=torch.float32)
    assert draw(model) == (ROOT / "docs" / "caches.svg").read_text()


def test_the_rooms_are_drawn_from_the_code() -> None:
    from scripts.draw_rooms import draw_call, draw_rooms

    assert draw_rooms() == (ROOT / "docs" / "rooms.svg").read_text()
    assert draw_call() == (ROOT / "docs" / "call.svg").read_text()


def test_the_picture_of_a_call_is_a_real_program(build: Build) -> None:
    import importlib

    from scripts.draw_rooms import ANSWERED, ASKED, INSIDE, REPEATED

    for file, function, _ in (*ASKED, *ANSWERED):
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        assert hasattr(module, function) or hasattr(module.Program, function), file
    manifest = read_manifest(build("dream_sudoku", "int4_xnnpack"))
    n_layers, delegation = manifest["model"]["num_hidden_layers"], manifest["delegation"]
    shown = [step for i, step in enumerate(INSIDE) for _ in range(n_layers - 1 if i in REPEATED else 1)]
    assert sum(is_delegate for _, is_delegate in shown) == delegation["delegates"]
    writes = sum("update_cache" in what for what, _ in shown)
    assert 2 * writes == delegation["outside"]["llama::update_cache.out"]  # keys and values


def test_each_finding_is_listed_and_has_the_form() -> None:
    page = (ROOT / "findings" / "README.md").read_text()
    scripts = sorted((ROOT / "findings").glob("*.sh"))
    assert len(scripts) >= 2
    assert sorted(re.findall(r"\]\((\w+\.sh)\)", page)) == [script.name for script in scripts]
    for script in scripts:
        text = script.read_text()
        assert text.startswith("#!/usr/bin/env bash\n# Expected: "), script.name
        for part in ("\n# Seen, ", "\n# So: ", "set -euo pipefail", "mktemp -d", "trap ", 'pip" install'):
            assert part in text, f"{script.name}: {part}"
        installed = re.findall(r"install --quiet (.*)", text)
        assert all("==" in package for line in installed for package in line.split()), script.name
        ours = [f"{name}." for name in ("model", "recipes", "runtime", "validation", "pipeline")]
        assert not any(f"from {name}" in text or f"import {name}" in text for name in ours), script.name


def test_files_that_a_page_names_exist() -> None:
    for page in PAGES:
        for file in re.findall(r"`((?:conf|[a-z_]+)/[\w/.]+\.(?:py|j2|yaml|md|sh))`", page.read_text()):
            assert "NAME" in file or (ROOT / file).is_file(), f"{page.name}: {file}"


def test_what_recipes_lose_on_text_is_what_was_measured() -> None:
    from scripts.compare_quality import RUNS, quality_table

    rows = json.loads((ROOT / "docs" / "quality.json").read_text())
    assert list(rows) == list(RUNS)
    table = quality_table(rows)
    assert table in README
    assert table in (ROOT / "docs" / "quality.md").read_text()
    kl = {name: row["kl_divergence"] for name, row in rows.items()}
    assert kl["int4_xnnpack"] < 0.5 * kl["int4_xnnpack, to the nearest"]
    assert kl["int4_fast_xnnpack"] < kl["int4_xnnpack, to the nearest"], "what is fast is better than groups of 32 were"


def test_what_a_sweep_shares_is_what_was_measured() -> None:
    found = json.loads((ROOT / "docs" / "sweep.json").read_text())
    page = (ROOT / "docs" / "sweep.md").read_text()
    assert len(found["jobs"]) == len(found["single"]) == 6
    assert found["share"] <= 0.7
    for seconds in (found["single_sum"], found["sweep"]):
        assert f"{seconds:.0f} s" in page
    assert f"{found['share']:.2f}" in page


def test_the_page_of_decoding_shows_what_was_measured() -> None:
    from scripts.compare_decoding import BEST_BEFORE, SETTINGS, draw, table_of

    rows = json.loads((ROOT / "docs" / "decoding.json").read_text())
    assert list(rows) == list(SETTINGS)
    page = (ROOT / "docs" / "decoding.md").read_text()
    assert table_of(rows) in page
    assert draw(rows) == (ROOT / "docs" / "decoding.svg").read_text()
    chosen, before = rows["window, EB 4"], rows[BEST_BEFORE]
    assert "`suffix_window=32 gamma=4`" in page
    assert chosen["tokens_per_second"] > 2 * before["tokens_per_second"]
    assert chosen["same"] > before["same"]
    assert chosen["loss"] < before["loss"] + 0.05


def test_the_page_of_infilling_shows_what_was_measured() -> None:
    from scripts.compare_infill import DREAMON, SETTINGS, table_of
    from scripts.train_infill import STARTS

    found = json.loads((ROOT / "docs" / "infill.json").read_text())
    page = (ROOT / "docs" / "infill.md").read_text()
    assert table_of(found["rows"]) in page
    assert f"{found['gaps']} gaps" in page
    assert len(found["rows"]) == 2 * len(SETTINGS) * len(STARTS)
    assert min(row["right"] for row in found["rows"] if row["setting"] == DREAMON) > 80


def test_every_option_of_infilling_is_explained() -> None:
    import inspect

    from runtime.infill import infill

    page = (ROOT / "docs" / "infill.md").read_text()
    for option in list(inspect.signature(infill).parameters)[3:]:
        assert re.search(rf"^\|.*`{option}[`(]", page, flags=re.MULTILINE), option


def test_what_full_size_takes_on_text_is_what_was_measured() -> None:
    job = json.loads((ROOT / "docs" / "fullsize-text.json").read_text())["main_job"]
    page = (ROOT / "docs" / "memory.md").read_text()
    for stage in job["stages"][:5]:
        memory = " | ".join(f"{stage[name] / 2**30:.2f} GiB" for name in ("peak_rss", "peak_anonymous"))
        assert f"| {stage['name']} | {stage['seconds']:.0f} | {memory} |" in page
    assert max(stage["peak_anonymous"] for stage in job["stages"]) < 6 * 2**30
    assert job["hard_limit"] == 12 * 2**30
    assert all(figure["ok"] for figure in job["figures"])


def test_the_page_of_the_family_names_all_that_are_refused() -> None:
    from model.family import table

    assert table() in (ROOT / "docs" / "family.md").read_text()


def test_full_size_is_what_was_measured() -> None:
    """The page shows what its JSON holds, and its claims are those of the JSON."""
    from scripts import show_fullsize as show

    result = json.loads((ROOT / "docs" / "fullsize.json").read_text())
    page = (ROOT / "docs" / "memory.md").read_text()
    for table in (show.road_table, show.growth_table, show.recipe_table, show.speed_table, show.llama_table):
        assert table(result) in page, table.__name__
    assert show.draw(result) == (ROOT / "docs" / "fullsize.svg").read_text()
    job = result["main_job"]
    assert job["hard_limit"] == 12 * 2**30
    assert max(stage["peak_rss"] for stage in job["stages"]) < 4 * 2**30
    assert all(figure["ok"] for figure in job["figures"])
    assert job["of_ideal"] < 1.01
    assert f"It took {result['seconds'] / 60:.0f} minutes" in page
    assert job["stages"][4]["seconds"] < 20 * 60
    road = sum(stage["seconds"] for stage in job["stages"] if stage["name"] != "validate") / 60
    assert f"goes through in {road:.0f} minutes" in README
    estimated = show.estimated(result)
    for stage in job["stages"][:5]:
        assert estimated[stage["name"]] == pytest.approx(stage["peak_rss"], rel=0.2), stage["name"]
    kept = result["packed"]
    opens = sorted(opened["seconds"] for opened in kept["then"])[1]
    assert f"{kept['first']['seconds']:.0f} s once and {opens:.1f} s from then on" in page
    assert opens < 5
    slower = json.loads((ROOT / "docs" / "fullsize-avx2.json").read_text())
    for table in (show.speed_table, show.llama_table):
        assert table(slower) in page, table.__name__
    assert estimated["program"] == pytest.approx(job["program"]["peak_rss"], rel=0.2)
    explained = result["explain"]
    said = f"{explained['peak_rss'] / 2**30:.2f} GiB at its peak"
    for name in ("memory.md", "explain.md"):
        text = " ".join((ROOT / "docs" / name).read_text().split())
        assert said in text, name
        assert f"{explained['seconds'] / 60:.1f} minutes" in text, name


def test_speed_is_what_was_measured() -> None:
    from scripts import show_bench as show
    from scripts.bench import MARGIN, ratios

    kinds = json.loads((ROOT / "docs" / "bench.json").read_text())
    page = (ROOT / "docs" / "performance.md").read_text()
    assert show.page(page, kinds) == page
    (result, *_) = kinds.values()
    assert show.draw(result) == (ROOT / "docs" / "lengths.svg").read_text()
    for one in kinds.values():
        assert ratios(one) == pytest.approx(one["ratios"])
    assert f"worse than that of its kind of machine by more than {MARGIN - 1:.0%}" in " ".join(page.split())
    assert result["ratios"]["step of int4_fast_xnnpack, 7B's four layers, to llama.cpp"] <= 0.35
    assert result["ratios"]["answer by window, EB 4, to dual, threshold 0.9"] <= 0.51


def test_the_page_shows_what_lowering_equal_layers_once_saves() -> None:
    from scripts.compare_lowering import table_of

    found = json.loads((ROOT / "docs" / "lowering.json").read_text())
    assert f"<!-- lowering -->\n\n{table_of(found)}\n" in (ROOT / "docs" / "performance.md").read_text()
    once, each = (sum(found[way]["seconds"].values()) for way in ("once", "each"))
    assert once < each / 2


def test_a_ratio_that_is_worse_is_named() -> None:
    from scripts.bench import MARGIN, show

    before = {"a": 1.0, "b": 1.0}
    assert show({"a": 0.99 * MARGIN, "b": 1.01 * MARGIN, "new": 9.0}, before) == ["b"]


def test_every_option_of_generation_is_explained() -> None:
    import inspect

    from runtime import generate

    page = (ROOT / "docs" / "generation.md").read_text()
    options = list(inspect.signature(generate).parameters)[2:]
    for option in options:
        assert re.search(rf"^\|.*`{option}[`(]", page, flags=re.MULTILINE), option


PYTHON = ["README.md", "docs/artifact.md", "docs/cache.md", "docs/generation.md", "docs/infill.md"]


@pytest.mark.parametrize("page", PYTHON)
def test_python_runs_as_shown(
    build: Build, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / "artifacts").mkdir()
    artifact = build(INFILL.name if page == "docs/infill.md" else BUNDLED.name, "int4_xnnpack")
    (tmp_path / "artifacts" / artifact.name).symlink_to(artifact)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"tokens": [49, 48, 48, 51, 10]}
    capsys.readouterr()  # what the build said
    for code in blocks((ROOT / page).read_text(), "python"):
        exec(code, names)
    if page == "README.md":
        assert (tmp_path / "model.pte").is_file()
    if page in ("docs/generation.md", "docs/infill.md"):
        assert capsys.readouterr().out in blocks((ROOT / page).read_text(), "text")


def test_exit_codes_are_documented() -> None:
    from runtime import errors

    page = (ROOT / "docs" / "exit-codes.md").read_text()
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", page, flags=re.MULTILINE)}
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.PipelineError)]
    assert documented == {0, errors.INTERNAL_ERROR, errors.INTERRUPTED} | {c.exit_code for c in classes}


def lines_of(page: Path) -> list[str]:
    return [line for block in blocks(page.read_text(), "sh") for line in block.splitlines()]


def test_commands_stand_in_blocks_that_are_run() -> None:
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(), flags=re.MULTILINE)
        assert set(fences[::2]) <= {"sh", "text", "python", "yaml"}, page.name
        shown = "\n".join(blocks(page.read_text(), "text"))
        assert not re.search(r"^(\S*python|make|pip|dreamedge|openssl) ", shown, flags=re.MULTILINE), page.name


def test_what_is_not_run_is_in_the_documents() -> None:
    lines = [line for page in PAGES for line in lines_of(page)]
    assert [line for line in NOT_RUN if line not in lines] == []
    assert arguments("dream_sudoku", "int4_xnnpack") == []


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder like a clone of this repository, with somebody's small model beside it."""
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name != "artifacts":
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "artifacts").mkdir()
    shutil.copytree(GOLDEN / "gqa2", tmp_path / "mine")
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    # It knows 131,072 positions: 256 keep its program small.
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if set(lines_of(page)) - set(NOT_RUN)], ids=lambda p: p.name)
def test_commands_run_as_shown(clone: Path, build: Build, page: Path) -> None:
    lines = [line for line in lines_of(page) if line not in NOT_RUN]
    if page.name == "provenance.md":  # what is signed further down is verified first
        lines = [line for line in lines if line.startswith("openssl") or "pipeline sign" in line] + lines
    commands = "\n".join(lines)
    for word, value in PLACEHOLDERS.get(page.name, {}).items():
        commands = re.sub(rf"\b{word}\b", value, commands)
    for checkpoint, recipe in set(re.findall(rf"artifacts/({BUNDLED.name}|{INFILL.name})-(\w+)", commands)):
        artifact = build(checkpoint, recipe)
        (clone / "artifacts" / artifact.name).symlink_to(artifact)
        # As if it had been made here: `explain` looks into the weights that `run` kept, and `run` takes them again.
        if not (clone / "artifacts" / ".cache").is_symlink():
            (clone / "artifacts" / ".cache").symlink_to(artifact.parent / "cache")
    if "artifacts/new" in commands:
        shutil.copytree(build("gqa2", "fp32_xnnpack"), clone / "artifacts" / "new")
    assert "pipeline clean" not in commands, "it would clean what all tests share"
    environment = os.environ | {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", commands], cwd=clone, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
