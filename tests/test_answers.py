"""Defaults that a checkpoint brings, several answers, and how likely the model finds them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.load import load
from runtime import generate
from runtime.answers import best_answers
from runtime.defaults import own_defaults, with_defaults
from runtime.errors import InputError, UsageError
from runtime.text import TextArtifact, open_text_artifact
from runtime.tokenizer import encode
from tests.checkpoints import BUNDLED, Build
from tests.test_generation import PROMPT, eager

PUZZLE = "1003\n0300\n3210\n4132"
Pipeline = Callable[..., tuple[int, str, str]]


def own(folder: Path, **values: Any) -> dict[str, Any]:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return own_defaults(folder)


def test_a_checkpoint_says_how_it_is_written_with(tmp_path: Path) -> None:
    assert own_defaults(tmp_path) == {}
    asked = {
        "steps": 64,
        "alg": "entropy",
        "temperature": 0.2,
        "top_p": 0.95,
        "top_k": 50,
        "alg_temp": 0.1,
        "eps": 1e-3,
    }
    assert own(tmp_path, **asked, eos_token_id=[1, 2], max_length=20, top_h=None) == asked
    assert own(tmp_path, steps=512, alg="origin", temperature=None) == {"steps": 512}, "the class's own, not a choice"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"steps": 0}, "steps 0"),
        ({"steps": "many"}, "steps 'many'"),
        ({"alg": "best"}, "alg 'best'"),
        ({"alg": ["entropy"]}, "alg"),
        ({"temperature": -1}, "temperature -1"),
        ({"temperature": True}, "temperature True"),
        ({"top_p": 0}, "top_p 0"),
        ({"top_k": 1.5}, "top_k 1.5"),
        ({"alg_temp": "x"}, "alg_temp 'x'"),
        ({"eps": 1}, "eps 1"),
    ],
    ids=str,
)
def test_what_a_checkpoint_says_wrongly_is_named(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        own(tmp_path, **values)
    assert "generation_config.json" in str(raised.value)


def test_it_is_found_before_the_long_work(tmp_path: Path) -> None:
    shutil.copytree(BUNDLED, tmp_path / "wrong")
    ids = json.loads((BUNDLED / "generation_config.json").read_text())
    (tmp_path / "wrong" / "generation_config.json").write_text(json.dumps(ids | {"top_p": 7}))
    with pytest.raises(InputError, match=r"generation_config\.json: top_p 7"):
        load(tmp_path / "wrong")


def test_who_writes_has_the_last_word() -> None:
    own = {"steps": 64, "temperature": 0.2, "top_p": 0.9}
    nothing = {"steps": None, "temperature": None, "alg": None, "threshold": None}
    taken = with_defaults(nothing, own)
    assert [taken[name] for name in ("steps", "temperature", "top_p", "alg", "eps")] == [64, 0.2, 0.9, "entropy", 1e-3]
    taken = with_defaults({"temperature": 0.0, "top_p": 1.0, "steps": 3}, own)
    assert [taken[name] for name in ("steps", "temperature", "top_p")] == [3, 0.0, 1.0]
    assert with_defaults({"threshold": 0.9}, own)["steps"] is None, "a rule is not held to a schedule"
    assert with_defaults({"threshold": 0.9, "steps": 5}, own)["steps"] == 5


def test_generate_shows_and_takes_them(pipeline: Pipeline, build: Build, tmp_path: Path) -> None:
    artifact = tmp_path / "sudoku"
    shutil.copytree(build("dream_sudoku", "int4_xnnpack"), artifact)
    (artifact / "generation_config.json").write_text(json.dumps({"temperature": 9.5, "steps": 4, "alg": "origin"}))
    asked = ("generate", f"artifact={artifact}", f"prompt={PUZZLE}", "seed=3")
    code, answer, err = pipeline(*asked)
    assert code == 0
    assert err.splitlines()[0] == "the checkpoint's own: steps=4 temperature=9.5 (generation_config.json)"
    assert "4 forward calls" in err
    code, same, err = pipeline(*asked, "temperature=9.5", "steps=4")
    assert (code, same) == (0, answer)
    assert "own" not in err
    code, best, _ = pipeline(*asked, "temperature=0", "steps=19")
    assert (code, best) == (0, "1423\n2341\n3214\n4132\n")
    assert best != answer


def test_logprobs_are_the_networks_own_when_it_wrote() -> None:
    network, said = eager("gqa2"), {}

    def look(step: int, tokens: Tensor, positions: Tensor, logits: Tensor) -> None:
        said[step] = positions, logits.clone()

    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.7, "top_p": 0.9, "seed": 1, "logprobs": True}
    written = generate(network, PROMPT, on_logits=look, **options)
    assert written.logprobs is not None
    expected = torch.zeros(8)
    for step, (positions, logits) in said.items():
        before, after = written.history[step, 0], written.history[step + 1, 0]
        for at in (before != after).nonzero()[:, 0].tolist():
            row = logits[positions.tolist().index(at)].double()
            assert int(row.argmax()) != network.mask_id
            expected[at - len(PROMPT)] = float(row[after[at]] - row.logsumexp(0))
    torch.testing.assert_close(written.logprobs[0], expected, atol=1e-5, rtol=0)
    assert (expected < 0).all()
    assert generate(network, PROMPT, max_new_tokens=8).logprobs is None


@pytest.fixture(scope="module")
def sudoku(build: Build) -> TextArtifact:
    return open_text_artifact(build("dream_sudoku", "int4_xnnpack"))


def test_the_likeliest_of_several_answers_come_first(sudoku: TextArtifact) -> None:
    ids = encode(sudoku.tokenizer, "0000\n0000\n0010\n4132")
    options: dict[str, Any] = {"temperature": 1.0, "seed": 5, "steps": 4}
    drawn = best_answers(sudoku, ids, 19, options, n=6)
    assert [one.seed for one in drawn] == list(range(5, 11))
    assert len({one.text for one in drawn}) > 1
    best = best_answers(sudoku, ids, 19, options, n=2, best_of=6)
    expected = sorted(drawn, key=lambda one: -one.likelihood)
    assert [(one.seed, one.text) for one in best] == [(one.seed, one.text) for one in expected[:2]]
    assert all(one.likelihood < 0 for one in best)
    again = best_answers(sudoku, ids, 19, {"temperature": 1.0, "steps": 4}, n=2)
    assert [one.seed for one in again] == [again[0].seed, (again[0].seed or 0) + 1], "a seed is chosen, and told"


@pytest.mark.parametrize(
    ("n", "best_of", "options", "said"),
    [
        (0, None, {}, "n 0"),
        (129, None, {"temperature": 1}, "n 129"),
        (3, 2, {"temperature": 1}, "best_of 2"),
        (2, None, {}, "would be the same"),
        (1, 4, {"temperature": 0.0}, "would be the same"),
    ],
)
def test_answers_that_cannot_be(sudoku: TextArtifact, n: int, best_of: int | None, options: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        best_answers(sudoku, [5], 4, options, n, best_of)


def test_several_answers_are_json_lines(pipeline: Pipeline, build: Build, tmp_path: Path) -> None:
    artifact = build("dream_sudoku", "int4_xnnpack")
    drawn = ("temperature=1.0", "seed=5", "steps=4")
    code, out, err = pipeline("generate", f"artifact={artifact}", f"prompt={PUZZLE}", "n=2", *drawn)
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["seed"] for line in lines] == [5, 6]
    assert err.count("tokens in") == 2
    code, best, _ = pipeline("generate", f"artifact={artifact}", f"prompt={PUZZLE}", "best_of=2", *drawn)
    assert code == 0
    assert best.rstrip("\n") == max(lines, key=lambda line: line["likelihood"])["answer"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": PUZZLE}) + "\n")
    code, out, _ = pipeline("generate", f"artifact={artifact}", f"prompts={prompts}", "n=2", *drawn)
    assert [entry["answer"] for entry in json.loads(out)["answers"]] == [line["answer"] for line in lines]
