"""lm-evaluation-harness on an artifact, by tasks that need no download."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.commands import evaluate as command
from pipeline.lm_harness import ProgramLM
from runtime.text import TextArtifact, open_text_artifact

Pipeline = Callable[..., tuple[int, str, str]]
PUZZLES = {"1003\n0300\n3210\n4132": "1423\n2341\n3214\n4132", "2401\n3104\n4213\n1302": "2431\n3124\n4213\n1342"}


@pytest.fixture(scope="module")
def artifact(sudoku: Path) -> TextArtifact:
    return open_text_artifact(sudoku)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tasks in lm-eval's form: answers that are written, and choices by their likelihood."""
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    lines = [
        {"puzzle": puzzle, "answer": solved, "choices": [solved.replace("1", "2"), solved], "label": 1}
        for puzzle, solved in PUZZLES.items()
    ]
    data = tmp_path / "sudoku.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
    }
    common |= {"doc_to_text": "{{puzzle}}", "target_delimiter": "", "num_fewshot": 0}
    exact: dict[str, Any] = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    written: dict[str, Any] = {"task": "own_written", "output_type": "generate_until", "doc_to_target": "{{answer}}"}
    written |= {"metric_list": [exact], "generation_kwargs": {"until": ["x"], "max_gen_toks": 19}}
    chosen: dict[str, Any] = {"task": "own_chosen", "output_type": "multiple_choice", "doc_to_target": "label"}
    chosen |= {"doc_to_choice": "{{choices}}", "metric_list": [exact | {"metric": "acc"}]}
    folder = tmp_path / "tasks"
    folder.mkdir()
    for task in (written, chosen):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(common | task))
    return folder


def test_its_tasks_are_done_and_its_figures_shown(
    pipeline: Pipeline, sudoku: Path, tasks: Path, tmp_path: Path
) -> None:
    output = tmp_path / "found.json"
    asked = ("lm_eval=[own_written,own_chosen]", f"lm_eval_tasks={tasks}", "n=2", "threshold=0.9", f"output={output}")
    code, out, err = pipeline("evaluate", f"artifact={sudoku}", *asked)
    assert code == 0, err
    results = json.loads(output.read_text())["results"]
    assert results["own_written"]["exact_match,none"] == 1.0
    assert results["own_chosen"]["acc,none"] == 1.0
    assert "exact_match" in out
    assert "own_chosen" in out


def test_a_likelihood_is_that_of_the_tokens_from_left_to_right(artifact: TextArtifact) -> None:
    puzzle, solved = next(iter(PUZZLES.items()))
    model, program = ProgramLM(artifact, {}), artifact.program
    encode: Any = lambda text: artifact.tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    for continuation, is_greedy in ((solved, True), (solved[::-1], False)):
        ((nats, found),) = model.loglikelihood([SimpleNamespace(args=(puzzle, continuation))])
        tokens = torch.tensor(encode(puzzle) + [program.mask_id] * len(encode(continuation)))
        expected = 0.0
        for i, token in enumerate(encode(continuation), start=len(encode(puzzle))):
            row = program.start()(tokens, 0, len(tokens), torch.tensor([i - 1]))[0, 0].double()
            row[program.mask_id] = -torch.inf
            expected += float(row.log_softmax(-1)[token])
            tokens[i] = token
        assert nats == pytest.approx(expected)
        assert found == is_greedy
    (whole,) = model.loglikelihood_rolling([SimpleNamespace(args=(solved,))])
    ((rest, _),) = model.loglikelihood([SimpleNamespace(args=(solved[:1], solved[1:]))])
    assert whole == pytest.approx(rest)


def test_what_cannot_be_asked_of_it(
    pipeline: Pipeline, sudoku: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = pipeline("evaluate", f"artifact={sudoku}", "lm_eval=[no_such_task]", f"lm_eval_tasks={tasks}")
    assert (code, err) == (2, "error: lm_eval: there is no task 'no_such_task'\n")
    monkeypatch.setattr(command, "find_spec", lambda _: None)
    code, _, err = pipeline("evaluate", f"artifact={sudoku}", "lm_eval=[own_written]")
    assert code == 2
    assert "pip install 'dreamedge[lm-eval]'" in err
