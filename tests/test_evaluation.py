"""Tasks of a folder: what is counted, and what a checker may do."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.commands.evaluate import read_tasks, with_rule
from runtime.errors import UsageError
from runtime.text import TextArtifact, open_text_artifact
from tests.checkpoints import INFILL, ROOT, Build
from validation.evaluation import Outcome, _words_of, items_of, score
from validation.settings import EvaluatedTask
from validation.texts import hidden_of

Pipeline = Callable[..., tuple[int, str, str]]
TASKS = ROOT / "assets" / "tasks"


@pytest.fixture(scope="module")
def artifact(sudoku: Path) -> TextArtifact:
    return open_text_artifact(sudoku)


def test_a_folder_of_tasks_by_caches_and_rules(pipeline: Pipeline, sudoku: Path, tmp_path: Path) -> None:
    output, plot = tmp_path / "scores.json", tmp_path / "plot.svg"
    asked = ("n=4", "caches=[none,dual]", 'rules=["","gamma=2"]', f"output={output}", f"plot={plot}")
    code, out, err = pipeline("evaluate", f"artifact={sudoku}", f"tasks={TASKS}", *asked)
    assert code == 0
    left_out = [line.split()[1] for line in err.splitlines()]
    assert left_out == ["code", "numbers"], "a gap of unknown length is for DreamOn"
    scores = json.loads(output.read_text())["scores"]
    settings = [("none", ""), ("dual", ""), ("none", "gamma=2"), ("dual", "gamma=2")]
    # Caches first: each rule is seen with every cache.
    assert [(one["task"], one["cache"], one["rule"]) for one in scores] == [
        (task, *setting) for task in ("english", "sudoku") for setting in settings
    ]
    of_sudoku = [one for one in scores if one["task"] == "sudoku"]
    assert of_sudoku[0]["solved"] == 1
    assert of_sudoku[2]["forward_calls"] < of_sudoku[0]["forward_calls"], "the rule was taken"
    assert all(0 <= one["low"] <= one["solved"] <= one["high"] <= 1 for one in scores)
    assert "words right" in out
    assert plot.read_text().count("<circle") >= 8


def test_gaps_are_filled_and_judged(pipeline: Pipeline, build: Build, tmp_path: Path) -> None:
    made = build(INFILL.name, "int4_xnnpack")
    task = [f"task.prompts={TASKS}/numbers.jsonl", f"task.checker={TASKS}/numbers.py", "task.name=numbers"]
    output = tmp_path / "scores.json"
    code, _, err = pipeline("evaluate", f"artifact={made}", *task, "n=20", "caches=[none,dual]", f"output={output}")
    assert code == 0
    assert err == "note: numbers: a gap is filled without cache dual\n"
    (one,) = json.loads(output.read_text())["scores"]
    assert (one["n"], one["cache"]) == (20, "none")
    assert one["solved"] >= 0.6
    code, _, err = pipeline("evaluate", f"artifact={made}", f"tasks={tmp_path}", "n=4")
    assert (code, err) == (2, f"error: tasks: {tmp_path} holds no task, a file such as sudoku.yaml\n")


def test_a_loss_is_of_the_hidden_tokens_and_a_word_is_whole_or_wrong(artifact: TextArtifact, tmp_path: Path) -> None:
    text = "1423\n2341\n3214\n4132"
    (tmp_path / "texts.txt").write_text(text)
    task = EvaluatedTask(name="texts", texts=str(tmp_path / "texts.txt"), hidden=0.4)
    (item,) = items_of(task, artifact, 5)
    found = item(artifact, {"temperature": 0.0, "alg": "maskgit_plus", "cache": "none"})
    assert found.tokens == round(0.4 * 18)
    ids = torch.tensor(artifact.tokenizer.encode(text, add_special_tokens=False).ids)
    hidden = hidden_of(len(ids), 0.4, 0, torch.Generator().manual_seed(0))
    given = ids.masked_fill(hidden, artifact.program.mask_id)
    rows = hidden.nonzero()[:, 0] - 1
    logits = artifact.program.start()(given, 0, len(given), rows)[0].double()
    expected = -sum(float(row.log_softmax(-1)[ids[at + 1]]) for row, at in zip(logits, rows.tolist(), strict=True))
    assert found.nats == pytest.approx(expected)
    assert found.of == len({at // 5 for at in hidden.nonzero()[:, 0].tolist()}), "a line is a word here"
    assert found.right <= found.of


def test_a_token_is_of_the_word_that_it_ends_in() -> None:

    text = "one two  three\nfour"
    offsets = [(0, 2), (2, 3), (3, 7), (7, 9), (9, 12), (12, 15), (15, 19)]
    assert _words_of(text, offsets) == [1, 1, 2, 2, 3, 3, 4]


def test_intervals_of_texts_are_wider_than_of_words() -> None:
    task = EvaluatedTask(name="t", texts="x")
    alike = [Outcome(8, 10, 1, 1, 1, 0.1, 20.0, 10) for _ in range(10)]
    one = score(task, "none", "", alike)
    assert (one.solved, one.low, one.high) == (0.8, 0.8, 0.8)
    assert (one.loss, one.loss_error) == (2.0, 0.0)
    apart = [Outcome(10 * (i % 2), 10, 1, 1, 1, 0.1, 40.0 * (i % 2), 10) for i in range(20)]
    two = score(task, "none", "", apart)
    assert two.high - two.solved == pytest.approx(1.96 * math.sqrt(0.25 / 19))
    assert two.loss_error == pytest.approx(1.96 * math.sqrt(4.0 / 19))


def test_what_an_answer_does_when_it_runs_ends_there(artifact: TextArtifact, tmp_path: Path) -> None:
    """A checker in a process of its own: endless, greedy and crashing answers are wrong ones."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "12"}\n' * 4)
    (tmp_path / "check.py").write_text(
        "import itertools, os\n"
        "seen = itertools.count()\n"
        "def check(prompt, answer):\n"
        "    how = open(__file__ + '.how').read()\n"
        "    if how == 'endless':\n        while True: pass\n"
        "    if how == 'greedy':\n        return len(bytearray(2**31)) > 0\n"
        "    if how == 'crashing':\n        os.abort()\n"
        "    return True\n"
    )
    task = EvaluatedTask(
        name="t", prompts=str(tmp_path / "prompts.jsonl"), checker=str(tmp_path / "check.py"), limit=1, new_tokens=2
    )
    options: dict[str, Any] = {"temperature": 0.0, "alg": "entropy"}
    for how, right in {"endless": 0, "greedy": 0, "crashing": 0, "well": 1}.items():
        (tmp_path / "check.py.how").write_text(how)
        began = time.monotonic()
        assert items_of(task, artifact, 1)[0](artifact, options).right == right, how
        assert time.monotonic() - began < 60


def test_the_code_task_runs_what_was_filled_in(tmp_path: Path) -> None:
    from validation.tasks import load_checker

    check = load_checker(TASKS / "code.py")
    lines = [json.loads(line) for line in (TASKS / "code.jsonl").read_text().splitlines()]
    answers = [
        "number > best", "sum(numbers) / len(numbers)", "text[::-1]", "found[word] = found.get(word, 0) + 1",
        "n * factorial(n - 1)", "n % 2 == 0", "x for one in lists for x in one", "a, b = b, a + b", "seen.add(item)",
        "word[0].upper()", "a, b = b, a % b", "zip(*rows)",
    ]  # fmt: skip
    for line, answer in zip(lines, answers, strict=True):
        assert check(line["prompt"], answer, line["suffix"])
        assert not check(line["prompt"], "1 / 0", line["suffix"])
        assert not check(line["prompt"], "raise SystemExit", line["suffix"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("propmts: x", "propmts"),
        ("hidden: many", "hidden"),
        ("[1, 2]", "task"),
        ("texts: [", "is no task"),
    ],
)
def test_a_wrong_task_of_a_folder_is_named(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(UsageError, match=said) as raised:
        read_tasks(tmp_path)
    assert "mine.yaml" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("rule", ["treshold=0.9", "gamma=x", "gamma", "cache=dual"])
def test_a_wrong_rule_is_named(rule: str) -> None:
    with pytest.raises(UsageError, match="rules: "):
        with_rule(rule)


def test_what_cannot_be_evaluated(pipeline: Pipeline, sudoku: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("x")
    wrong = {
        "rules=[]": "rules: name at least one", f"task.texts={tmp_path}/empty.txt": "no text of 8 tokens",
        "task.hidden=1.5": "task.hidden 1.5", 'rules=["gamma=-1"]': "gamma -1", f"tasks={tmp_path}": "holds no task",
    }  # fmt: skip
    for option, said in wrong.items():
        more = [f"task.texts={TASKS.parent}/text/held_out.jsonl"] if "hidden" in option else []
        code, _, err = pipeline("evaluate", f"artifact={sudoku}", option, *more, "n=2")
        assert code == 2, option
        assert said in err
        assert err.count("\n") == 1
