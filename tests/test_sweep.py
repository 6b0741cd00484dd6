"""`run --multirun`: what jobs share, what each leaves, and that a sweep that was broken off is taken up."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import MissingConfigException

from model import load_hf_model
from pipeline import admission, float32, job, lock
from pipeline.commands import COMMANDS
from pipeline.config import explain, load_recipe, load_task
from pipeline.float32 import float32_of
from pipeline.load import load
from pipeline.quantize import quantize
from pipeline.schema import RunConfig
from pipeline.search import best_of, front_of, write_found
from pipeline.sweep import begin
from recipes.stored import Weights, untie
from report.front import Point
from runtime.artifact import sha256
from runtime.errors import OutputError, RecipeError, ResourceError, UsageError
from tests.checkpoints import BUNDLED, GOLDEN
from validation.float32 import Float32, Request, enough, run_float32
from validation.material import Material, material_of, task_of
from validation.progress import silent
from validation.settings import ValidationConfig

Pipeline = Callable[..., tuple[int, str, str]]
LENGTHS = "export.max_seq_len=64,96"
RECIPES = "recipe=fp32_xnnpack,int8_xnnpack"


@pytest.fixture
def sweep(tmp_path: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """sweep(run, arguments): four jobs in a folder of their own, which `run` makes."""
    monkeypatch.chdir(tmp_path)

    def go(run: Callable[[RunConfig], None], *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setitem(COMMANDS, "run", run)
        return pipeline("run", "-m", f"checkpoint={GOLDEN / 'gqa2'}", RECIPES, LENGTHS, *arguments)

    return go


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """What became of each job in the last sweep that asked for it."""
    files = sorted((folder / "artifacts" / ".sweep").glob("*/*.json"), key=lambda file: file.stat().st_mtime_ns)
    found = [json.loads(file.read_text()) for file in files]
    return {Path(record["output"]).name: record for record in found}


def test_a_failing_job_fails_alone(sweep: Callable[..., Any], tmp_path: Path) -> None:
    made = []

    def run(config: RunConfig) -> None:
        made.append(config.output)
        if config.recipe.name == "fp32_xnnpack" and config.export.max_seq_len == 96:
            raise RecipeError("it does not fit")

    code, out, err = sweep(run)
    names = [f"gqa2-{recipe}-{length}" for recipe in ("fp32_xnnpack", "int8_xnnpack") for length in (64, 96)]
    assert made == [f"artifacts/{name}" for name in names]
    assert code == 4
    assert "4 jobs in" in out
    assert "3 done, 0 done before, 1 failed" in out
    assert "artifacts/gqa2-fp32_xnnpack-96: it does not fit" in out
    assert "error: it does not fit\n" in err
    found = records(tmp_path)
    assert {name: record["code"] for name, record in found.items()} == dict(zip(names, (0, 4, 0, 0), strict=True))
    first = found[names[0]]
    assert first["seconds"] >= 0
    assert first["peak_memory"] > 2**20
    assert (first["read"] is None) == (first["written"] is None)
    assert first["overrides"][1:3] == ["recipe=fp32_xnnpack", "export.max_seq_len=64"]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["recipe=int4_xnnpack"], {"gqa2-int4_xnnpack"}),
        (
            ["recipe=int4_xnnpack", "recipe.linear.group_size=32,64", "validation.seed=0"],
            {"gqa2-int4_xnnpack-group_size=32", "gqa2-int4_xnnpack-group_size=64"},
        ),
        (
            ["recipe=int4_xnnpack,int8_xnnpack", "export.max_seq_len=null,64"],
            {"gqa2-int4_xnnpack", "gqa2-int4_xnnpack-64", "gqa2-int8_xnnpack", "gqa2-int8_xnnpack-64"},
        ),
    ],
)
def test_each_job_has_an_output_of_its_own(arguments: list[str], names: set[str]) -> None:
    outputs = begin(["-m", f"checkpoint={GOLDEN / 'gqa2'}", *arguments]).outputs
    assert set(outputs.values()) == {f"artifacts/{name}" for name in names}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["output=/x/one", RECIPES], ["output /x/one: two jobs", "recipe=fp32_xnnpack", "leave output out"]),
        (["checkpoint=a/model,b/model"], ["model-int4_xnnpack: two jobs", "sweeps of their own"]),
        (["output=x,./x"], ["two jobs would write to it"]),
    ],
)
def test_no_two_jobs_write_to_one(
    arguments: list[str], words: list[str], pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any work."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(COMMANDS, "run", lambda _: pytest.fail("it began"))
    code, _, err = pipeline("run", "-m", *arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert list(tmp_path.iterdir()) == []


def test_other_commands_do_their_jobs_one_after_another(pipeline: Pipeline) -> None:
    code, _, err = pipeline("validate", "-m", "artifact=a,b", "hydra/launcher=joblib")
    assert (code, err.count("\n")) == (2, 1)
    assert "one after another" in err


def test_the_flag_may_stand_anywhere(sweep: Callable[..., Any], tmp_path: Path, pipeline: Pipeline) -> None:
    sweep(lambda _: None)
    code, out, _ = pipeline("run", f"checkpoint={GOLDEN / 'gqa2'}", "--multirun", RECIPES)
    assert code == 0
    assert "2 jobs in" in out


@pytest.mark.parametrize(
    ("missing", "extra"), [("hydra/launcher/submitit_slurm", "slurm"), ("hydra/sweeper/optuna", "search")]
)
def test_a_launcher_that_is_not_installed(missing: str, extra: str) -> None:
    said = explain(MissingConfigException("Could not find it", missing, options=["basic"]), "run")
    assert f"pip install 'dreamedge[{extra}]'" in said


def test_what_is_made_is_not_made_again(
    tmp_path: Path, artifact: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`artifact` stands for what a job made; what was changed since is made again."""
    monkeypatch.chdir(tmp_path)
    checkpoint, began = tmp_path / "gqa2", []
    checkpoint.symlink_to(GOLDEN / "gqa2")

    def run(config: RunConfig) -> None:
        began.append(config.export.max_seq_len)
        if Path(config.output).exists() and not config.overwrite:
            raise OutputError(f"output {config.output} is already there")
        if config.export.max_seq_len == 64 or len(began) > 2:
            shutil.rmtree(config.output, ignore_errors=True)
            shutil.copytree(artifact, config.output)
        else:
            raise RecipeError("not yet")

    monkeypatch.setitem(COMMANDS, "run", run)
    arguments = ["run", "-m", f"checkpoint={checkpoint}", "recipe=fp32_xnnpack", LENGTHS]
    code, out, _ = pipeline(*arguments)
    assert (code, began) == (4, [64, 96])
    code, out, _ = pipeline(*arguments)
    assert (code, began) == (0, [64, 96, 96])
    assert "1 done, 1 done before, 0 failed" in out
    code, out, _ = pipeline(*arguments)
    assert (code, began) == (0, [64, 96, 96])
    assert "0 done, 2 done before, 0 failed" in out
    record = records(tmp_path)["gqa2-fp32_xnnpack-64"]
    made = tmp_path / record["output"]
    assert record["manifest"] == sha256(made / "manifest.json")
    assert record["objectives"][0] == (made / "model.pte").stat().st_size
    code, out, _ = pipeline(*arguments, "overwrite=true")
    assert (code, began[3:]) == (0, [64, 96])
    (made / "model.pte").write_bytes(b"damaged")
    code, _, err = pipeline(*arguments)  # nothing that is there is lost
    assert (code, began[5:]) == (7, [64])
    assert "already there" in err
    code, _, _ = pipeline(*arguments, "validation.seed=1")
    assert (code, began[6:]) == (7, [64, 96])


def test_a_job_of_a_sweep_that_was_killed_is_made(sweep: Callable[..., Any], tmp_path: Path) -> None:
    """Killed in the second of four: its note says that it began and no more, and the next sweep does the rest."""
    began: list[str] = []
    child = os.fork()
    if child == 0:

        def run(config: RunConfig) -> None:
            began.append(config.output)
            if len(began) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        sweep(run)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [record["code"] for record in records(tmp_path).values()].count(None) == 1
    code, out, _ = sweep(lambda config: began.append(config.output))
    assert (code, len(began)) == (0, 4)  # the faked artifacts are none, so that all are made
    assert "4 done" in out
    assert [record["code"] for record in records(tmp_path).values()] == [0] * 4


def test_a_full_disk_in_one_job(sweep: Callable[..., Any], tmp_path: Path) -> None:
    def run(config: RunConfig) -> None:
        if config.output.endswith("int8_xnnpack-64"):
            raise OutputError(f"output {config.output} cannot be written: {os.strerror(errno.ENOSPC)}")
        Path(config.output).mkdir(parents=True)

    code, out, err = sweep(run)
    assert code == 7
    assert "3 done, 0 done before, 1 failed" in out
    assert err.count("error: ") == 1
    assert len([path for path in (tmp_path / "artifacts").iterdir() if path.name.startswith("gqa2")]) == 3


@pytest.fixture
def artifact_like(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """artifact_like(folder): what a sweep takes for an artifact."""
    monkeypatch.setattr(job, "_is_whole", lambda record, manifest: job._manifest(record.output) == manifest != "")
    monkeypatch.setattr(job, "_with_made", lambda record: replace(record, manifest=job._manifest(record.output)))

    def make(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").write_text(f"{folder} {time.time_ns()}")

    return make


def test_a_refusal_forgets_nothing(sweep: Callable[..., Any], artifact_like: Callable[[Path], None]) -> None:
    """What is asked for in another way is refused, and the first way is still done."""

    def run(config: RunConfig) -> None:
        if Path(config.output).exists():
            raise OutputError(f"{config.output} is there")
        artifact_like(Path(config.output))

    assert sweep(run)[0] == 0
    code, out, _ = sweep(run, "validation.seed=7")
    assert code == OutputError.exit_code
    assert "4 failed" in out
    code, out, _ = sweep(run)
    assert (code, "4 done before" in out) == (0, True)


def test_killed_after_it_was_placed(
    sweep: Callable[..., Any], artifact_like: Callable[[Path], None], tmp_path: Path
) -> None:
    """The artifact is there, and its note is not: it is not made again, unless it was there before."""

    def run(config: RunConfig) -> None:
        artifact_like(Path(config.output))

    assert sweep(run)[0] == 0
    notes = tmp_path / "artifacts" / ".sweep"
    first = min(notes.glob("*.json"))
    record = json.loads(first.read_text())
    first.unlink()
    begun = first.with_suffix(".begun")
    begun.write_text(json.dumps(record | {"code": None}))  # of an artifact that was there when it began
    made: list[str] = []
    assert sweep(lambda config: made.append(config.output))[0] == 0
    assert made == [record["output"]]
    first.unlink(missing_ok=True)
    begun.write_text(json.dumps(record | {"code": None, "manifest": ""}))
    code, out, _ = sweep(lambda _: pytest.fail("it is made again"))
    assert (code, "4 done before" in out) == (0, True)


def test_a_failure_that_is_no_fault_of_the_notes(sweep: Callable[..., Any], tmp_path: Path) -> None:
    code, out, err = sweep(lambda _: pytest.fail("it began"), f"checkpoint={'x' * 300}")
    assert code == UsageError.exit_code
    assert "4 failed" in out
    assert err.count("File name too long") == 4


def test_a_folder_for_notes_that_goes_away(sweep: Callable[..., Any], tmp_path: Path) -> None:
    """As a shared folder that is not mounted any more: a line for each job, and an exit code."""
    (tmp_path / "gone").write_text("no folder")
    code, _, err = sweep(lambda _: pytest.fail("it began"), f"hydra.sweep.dir={tmp_path / 'gone'}")
    assert (code, err) == (7, f"error: sweep {tmp_path / 'gone'} cannot be written: File exists\n")


def test_a_key_of_a_launcher_that_is_not_in_use(sweep: Callable[..., Any]) -> None:
    code, _, err = sweep(lambda _: pytest.fail("it began"), "hydra.launcher.n_jobs=4")
    assert (code, err.count("\n")) == (2, 1)
    assert "launchers with keys of their own are joblib" in err


def test_a_checkpoint_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one process, as long as its files stay the same; what a recipe does to a model is its own."""
    folder, read = tmp_path / "tied", list[int]()
    shutil.copytree(GOLDEN / "mha-tied", folder)

    def counted(*arguments: Any, **named: Any) -> Any:
        read.append(1)
        return load_hf_model(*arguments, **named)

    monkeypatch.setattr("pipeline.load.load_hf_model", counted)
    first = load(folder)
    untie(first.model, load_recipe("int8_xnnpack"))
    second = load(folder)
    assert len(read) == 1
    assert second.model.lm_head.weight is second.model.embed_tokens.weight
    assert first.model.lm_head.weight is not first.model.embed_tokens.weight
    assert first.model.norm.weight is second.model.norm.weight
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    load(folder)
    assert len(read) == 2


def test_float32_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept is what is computed, to the bit; what is damaged is computed anew; another material is another."""
    loaded, task_config, settings = load(BUNDLED), load_task("sudoku"), ValidationConfig(n_prompts=8)
    task_config = replace(task_config, n_solve=8)
    computed = []

    def counted(*arguments: Any) -> Float32:
        computed.append(1)
        return run_float32(*arguments)

    monkeypatch.setattr(float32, "run_float32", counted)

    def ask(S: int, settings: ValidationConfig = settings) -> Float32:
        material = material_of(loaded.folder, loaded.tokenizer, loaded.config, task_config, settings, S, Path())
        task = task_of(loaded.tokenizer, material.prompts, task_config, S)
        request = Request(material, task, task_config.new_tokens, settings, S, S)
        return float32_of(loaded, tmp_path, request, silent)

    first, again, longer = ask(128), ask(128), ask(256)
    assert len(computed) == 1
    for other in (again, longer):
        assert_same(first, other)
    (file,) = tmp_path.glob("*/float32.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert_same(first, ask(128))
    assert len(computed) == 2
    ask(128, ValidationConfig(n_prompts=8, seed=1))
    assert len(computed) == 3
    assert [path.name for path in tmp_path.glob("*/*.partial")] == []


def assert_same(a: Float32, b: Float32) -> None:
    assert len(a.whole) == len(b.whole) > 0
    for one, other in zip(a.whole, b.whole, strict=True):
        assert one.name == other.name
        assert torch.equal(one.calls[0].tokens, other.calls[0].tokens)
        assert torch.equal(one.calls[0].rows, other.calls[0].rows)
        (mine, columns), (theirs, other_columns) = a.logits[one.name], b.logits[one.name]
        assert torch.equal(columns, other_columns)
        assert all(torch.equal(vars(mine)[name], tensor) for name, tensor in vars(theirs).items())
    assert a.answers is not None
    assert b.answers is not None
    assert torch.equal(a.answers.tokens, b.answers.tokens)
    assert torch.equal(a.answers.steps, b.answers.steps)
    assert a.targets.keys() == b.targets.keys()
    assert all(torch.equal(a.targets[name], b.targets[name]) for name in a.targets)


def test_texts_and_greedy_answers_are_kept(tmp_path: Path) -> None:
    loaded = load(GOLDEN / "gqa2")
    texts = [torch.arange(5 + i, 25 + i) for i in range(8)]
    material = Material([t[:10] for t in texts], texts, "x")
    request = Request(material, None, 4, ValidationConfig(n_prompts=8), 64, 64)
    a, b = (float32_of(loaded, tmp_path, request, silent) for _ in range(2))
    assert a.targets.keys() == b.targets.keys() == {f"whole-{i:03d}" for i in range(8)}
    assert a.greedy is not None
    assert b.greedy is not None
    assert torch.equal(a.greedy.tokens, b.greedy.tokens)
    assert all(torch.equal(x, y) for x, y in zip(a.greedy.prompts, b.greedy.prompts, strict=True))


@pytest.mark.parametrize("n_new", [4, 32])
def test_longer_programs_ask_float32_the_same(n_new: int) -> None:
    loaded = load(GOLDEN / "gqa2")
    texts = [torch.arange(5 + i, 25 + i) for i in range(8)]
    material = Material([t[:10] for t in texts], texts, "x")
    request = Request(material, None, n_new, ValidationConfig(n_prompts=8), 4096, 4096)
    assert enough(request).max_seq_len < 256
    short = replace(request, max_seq_len=8, max_rows=8)
    assert enough(short) == short
    longer = replace(request, max_seq_len=300, max_rows=300)
    one, other = (run_float32(Weights(loaded.model, {}), asked, silent) for asked in (enough(request), longer))
    assert one.greedy is not None
    assert other.greedy is not None
    assert torch.equal(one.greedy.tokens, other.greedy.tokens)
    assert all(torch.equal(one.logits[name][0].vector, other.logits[name][0].vector) for name in other.logits)


def test_one_of_two_processes_quantizes(tmp_path: Path) -> None:
    """Both at once: one makes the parts, the other waits for it and takes them."""
    loaded, recipe = load(GOLDEN / "gqa2"), load_recipe("int8_xnnpack")
    heard: list[str] = []

    def hear(what: str, done: int = 0, total: int = 0, share: float | None = None) -> None:
        heard.append(what)

    entered, enters = os.pipe()
    child = os.fork()
    if child == 0:
        # As a process that is slow in the middle of the work.
        from pipeline.kept import LOCK_FILE
        from pipeline.quantize import cache_folder

        folder = cache_folder(loaded, recipe, tmp_path)
        folder.mkdir(parents=True)
        with lock.in_turn(folder / LOCK_FILE):
            os.write(enters, b"x")
            time.sleep(0.5)
        os._exit(0)
    os.read(entered, 1)
    quantize(loaded, recipe, tmp_path, hear)
    os.waitpid(child, 0)
    assert heard[0].startswith(f"waits for process {child} on ")
    assert "parts" in heard


def test_memory_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run waits until what the others were estimated at fits beside its own; a killed one's share is nobody's."""
    from rich.console import Console

    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    console = Console(file=(tmp_path / "said").open("w"), width=200)
    entered, enters = os.pipe()
    child = os.fork()
    if child == 0:
        with admission.admitted(600, 1000, console):
            os.write(enters, b"x")
            signal.pause()
    os.read(entered, 1)
    with admission.admitted(400, 1000, console):
        pass
    started = time.monotonic()
    waiter = os.fork()
    if waiter == 0:
        with admission.admitted(401, 1000, console):
            console.file.flush()
            os._exit(0)
    time.sleep(0.5)
    assert os.waitpid(waiter, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(os.waitpid(waiter, 0)[1]) == 0
    assert time.monotonic() - started < 5
    assert "waits for memory" in (tmp_path / "said").read_text()
    with pytest.raises(ResourceError, match="memory=1000"), admission.admitted(1001, 1000, console):
        pass


def test_free_memory_is_for_what_is_still_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "available_memory", lambda: 100)
    monkeypatch.setattr(admission, "_taken", {1: 50, 2: 0}.__getitem__)
    assert admission._fits(50, None, {1: 100})  # which has taken 50 of it
    assert not admission._fits(51, None, {1: 100})
    assert not admission._fits(1, None, {2: 100})
    assert not admission._fits(50, 149, {1: 100})


def test_the_front_and_the_best() -> None:
    good, small, fast, beaten = (
        Point("good", 10, 0.1, 3), Point("small", 5, 0.3, 3), Point("fast", 10, 0.3, 1), Point("beaten", 10, 0.3, 3),
    )  # fmt: skip
    even = Point("even", 7, 0.15, 1.5)
    front = front_of([good, small, fast, beaten, even])
    assert front == [good, small, fast, even]
    assert best_of(front) == even
    assert best_of([good]) == good


def test_what_a_search_finds_is_a_recipe(tmp_path: Path, artifact: Path, pipeline: Pipeline) -> None:
    found = [
        job.Record("s", i, str(artifact), [f"a={i}"], "", "h", 1, code=0, objectives=objectives)
        for i, objectives in enumerate(([1e6, 0.1, 2.0], None))
    ]
    said = write_found(tmp_path, found)
    assert "1 of 1 are on the front" in said
    assert (tmp_path / "front.svg").read_text().startswith("<svg")
    listed = json.loads((tmp_path / "front.json").read_text())
    assert [point["front"] for point in listed["points"]] == [True]
    code, out, err = pipeline("run", "--cfg", "job", f"recipe={tmp_path / 'best.yaml'}")
    assert (code, err) == (0, "")
    assert "name: fp32_xnnpack-best" in out
    assert write_found(tmp_path, found[1:]).startswith("nothing was made")


def test_outputs_of_a_search_are_refused() -> None:
    with pytest.raises(UsageError, match="a search makes many"):
        begin(["-m", "output=x", "hydra.sweeper._target_=some.Search"])
