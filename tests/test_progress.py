"""Long work says what it does and how long it may take still, on a terminal and in a log."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from rich.console import Console

from model import load_hf_model
from pipeline import display
from pipeline.config import load_recipe
from pipeline.display import Display, Doing
from pipeline.load import load
from pipeline.quantize import quantize
from recipes.stored import Weights
from runtime.artifact import REFERENCE_FILE
from runtime.generation import generate
from tests.checkpoints import GOLDEN, ROOT, Build
from validation import child
from validation.child import run_child
from validation.float32 import Request, run_float32
from validation.judge import check_artifact
from validation.material import Material
from validation.progress import within
from validation.quantization_noise import quantization_noise
from validation.recording import make_reference
from validation.reference import Task, load_reference
from validation.replay import _hear, solve
from validation.settings import ValidationConfig


class Heard:
    """What was reported, by phase in their order: (done, total, share)."""

    def __init__(self) -> None:
        self.phases: dict[str, list[tuple[int, int, float | None]]] = defaultdict(list)

    def __call__(self, what: str, done: int = 0, total: int = 0, share: float | None = None) -> None:
        self.phases[what].append((done, total, share))

    def counts(self, what: str) -> tuple[list[int], int]:
        """(how many were done at each report, of how many)"""
        ((total,),) = [{total for _, total, _ in self.phases[what]}]
        return [done for done, _, _ in self.phases[what]], total


def test_what_is_left_is_told_by_the_pace_of_the_phase() -> None:
    now = 0.0
    doing = Doing(lambda: now)
    assert doing.words() == ""
    doing.report("float32, layers", 0, 28)
    assert doing.words() == "float32, layers 0/28"
    now = 7.0
    doing.report("float32, layers", 7, 28)
    assert doing.words() == "float32, layers 7/28, 21 s left"
    now = 10.0  # nothing new: three of them are over
    assert doing.words() == "float32, layers 7/28, 18 s left"
    now = 40.0  # it takes longer than it should: nobody knows how long
    assert doing.words() == "float32, layers 7/28"
    doing.report("quantized, layers", 0, 28)
    assert doing.words() == "quantized, layers 0/28"


def test_calls_that_are_not_alike_are_weighed_by_their_work() -> None:
    now = 0.0
    doing = Doing(lambda: now)
    doing.report("calls", 0, 77, 0.0)
    now = 10.0
    doing.report("calls", 1, 77, 0.5)
    assert doing.words() == "calls 1/77, 10 s left"


def test_what_a_cache_held_says_nothing_of_the_pace() -> None:
    now = 0.0
    doing = Doing(lambda: now)
    for i in range(1, 11):
        doing.report("parts from the cache", i, 30)
        now += 0.01
    doing.report("parts", 11, 30)
    now += 10
    doing.report("parts", 12, 30)
    assert doing.words() == "parts 12/30, 3 min left"


def test_a_log_is_never_silent_and_not_flooded() -> None:
    log = io.StringIO()
    shown = Display(Console(file=log, width=120), every=0.2)
    with shown.live():
        with shown.stage("validate") as report:
            for i in range(1000):
                report("[red]layers", i, 1000)  # no markup: a file's name may look like it
            time.sleep(0.5)  # one layer that takes long
        with shown.stage("package"):
            pass
    lines = log.getvalue().splitlines()
    expected = [r"validate +0\.\d s   now .* MiB   \[red\]layers 999/1,000"] * 2
    expected += [r"validate +0\.\d s   peak .* MiB", r"package +0\.0 s   peak .* MiB"]
    assert len(lines) == len(expected)
    assert all(re.fullmatch(*pair) for pair in zip(expected, lines, strict=True)), lines
    assert display.EVERY <= 30


def test_a_stage_that_fails_leaves_no_thread() -> None:
    before = threading.active_count()
    with pytest.raises(KeyError), Display(Console(file=io.StringIO()), every=0.01).stage("lower"):
        raise KeyError
    assert threading.active_count() == before


def test_a_terminal_shows_the_phase() -> None:
    log = io.StringIO()
    shown = Display(Console(file=log, width=120, force_terminal=True), every=0.01)
    with shown.live(), shown.stage("validate") as report:
        report("layers", 3, 28)
        shown._progress.refresh()
        assert re.search(r"validate.*now .* MiB.*layers 3/28", log.getvalue())
        assert log.getvalue().count("\n") < 3  # no lines of a log


def test_eager_and_quantization_count_what_they_do(tmp_path: Path) -> None:
    loaded, recipe, heard = load(GOLDEN / "gqa2"), load_recipe("int8_xnnpack"), Heard()
    quantized = quantize(loaded, recipe, tmp_path, heard).weights
    n_layers = loaded.config.num_hidden_layers
    assert heard.counts("parts") == (list(range(n_layers + 4)), n_layers + 3)
    shares = [share or 0.0 for _, _, share in heard.phases["parts"]]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    quantize(loaded, recipe, tmp_path, heard)
    assert heard.counts("parts from the cache") == (list(range(1, n_layers + 4)), n_layers + 3)

    prompts = [torch.arange(5, 17) + i for i in range(8)]
    float32, told = Weights(loaded.model, {}), within("validate", heard)
    material = Material(prompts, is_random=True)
    request = Request(material, None, 4, ValidationConfig(n_prompts=8), 32, 32)
    found = run_float32(float32, request, told)
    reference = make_reference(quantized, found, None, request, told)
    for part in ("answers", "float32", "quantized"):
        assert heard.counts(f"validate, {part}, layers") == (list(range(n_layers)), n_layers)
        done, total = heard.counts(f"validate, {part}, rows of logits")
        assert done[0] == 0
        assert done == sorted(done)
        assert done[-1] < total

    quantization_noise(float32, quantized, reference.sequences, within("noise", heard), tokens=16)
    assert heard.counts("noise, layers") == (list(range(n_layers)), n_layers)
    assert heard.phases["noise, rows of the output layer"]


def test_each_prompt_is_counted() -> None:
    model, _, _ = load_hf_model(GOLDEN / "gqa2", dtype=torch.float32)
    heard = Heard()
    prompts = (torch.arange(5, 9), torch.arange(6, 12))
    answers = solve(model, Task(prompts, 3, None), heard)
    together = generate(model, prompts, max_new_tokens=3, alg="maskgit_plus")
    assert torch.equal(answers.tokens, torch.stack(together.answers))
    assert torch.equal(answers.steps, (together.history[:, :, -3:] == model.mask_id).sum(0) - 1)
    assert heard.counts("prompts") == ([0, 1], 2)


def test_a_program_says_from_its_own_process_which_calls_it_makes(build: Build) -> None:
    artifact, heard = build("gqa2", "fp32_xnnpack"), Heard()
    measured = check_artifact(artifact, report=heard)
    assert measured.figures
    n = sum(len(sequence.calls) for sequence in load_reference(artifact / REFERENCE_FILE).sequences)
    for run in ("model.pte", "model.pte again"):
        assert heard.counts(f"{run}, calls") == (list(range(n)), n)
        shares = [share or 0.0 for _, _, share in heard.phases[f"{run}, calls"]]
        assert shares == sorted(shares)
        assert shares[0] == 0
        assert shares[-1] < 1
    assert next(iter(heard.phases)) == "model.pte taken apart"


@pytest.mark.parametrize(
    "line", ["", "[1]", "null", '["calls", 1, 2, 7]', '["calls", "1", 2, 0]', '["\\u001b[2J", 1, 2, 0.5]', "[" * 10**5]
)
def test_what_a_broken_program_says_is_not_shown(line: str) -> None:
    heard = Heard()
    _hear(heard, line)
    assert not heard.phases
    _hear(heard, '["calls", 1, 2, 0.5]')
    assert heard.phases == {"calls": [(1, 2, 0.5)]}


def test_a_child_that_complains_at_length_ends() -> None:
    lines: list[str] = []
    ended = run_child("tests.children", ["complains"], lines.append)
    assert lines == ["a\n", "b\n"]
    assert ended.returncode == 1
    assert ended.stderr.endswith("at last\n")


def test_a_child_goes_with_whoever_stops_listening() -> None:
    def stop(_: str) -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_child("tests.children", ["sleeps"], stop)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(("argument", "code"), [("exits", 3), ("crashes", -signal.SIGSEGV), ("raises", 1), ("ends", 0)])
def test_a_childs_end_is_its_own(argument: str, code: int) -> None:
    ended = run_child("tests.children", [argument], lambda _: None)
    assert ended.returncode == code
    assert ("ZeroDivisionError" in ended.stderr) == (argument == "raises")


def test_children_are_new_each_time_but_for_what_was_imported() -> None:
    """One has torch from the start, and nothing of the one before it: no variable, directory, limit or timer."""
    heard: list[str] = []
    for _ in range(2):
        assert run_child("tests.children", ["counts"], heard.append).returncode == 0
    assert heard == ["1 True\n"] * 2


def test_a_child_has_the_environment_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    for value in ("a", "b"):
        monkeypatch.setenv("DREAMEDGE_TEST", value)
        run_child("tests.children", ["environment"], heard.append)
    assert heard == ["a\n", "b\n"]


def test_a_fork_server_that_was_killed_is_said_and_replaced() -> None:
    def kill(_: str) -> None:
        child._servers[0].process.kill()

    assert run_child("tests.children", ["speaks"], kill).returncode == 1
    assert run_child("tests.children", ["ends"], lambda _: None).returncode == 0


def test_nothing_outlives_whoever_started_it() -> None:
    """Killed, its fork server and the program in it end too."""
    tells = "lambda line: print(line, flush=True)"
    code = f"from validation.child import run_child; run_child('tests.children', ['tells'], {tells})"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child_pid, server_pid = map(int, parent.stdout.readline().split())
        parent.kill()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in (child_pid, server_pid)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
