"""The native runner writes what Python writes: the public reference's histories, options, text, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model import load_hf_model
from recipes.lowering import lower_program
from recipes.options import Attention, Backend
from recipes.static_program import StaticProgram, export_program, metadata
from runtime import Program, generate
from runtime.text import open_text_artifact
from runtime.tokenizer import decode, encode
from tests.checkpoints import GOLDEN, GOLDEN_NAMES, ROOT, Build
from tests.test_decoding_rules import REFUSED as WRONG_RULES
from tests.test_generation import (
    PROMPT,
    REFUSED,
    golden_cases,
    golden_tensors,
    options_of,
    prompts_of,
    sampler,
)
from tests.test_guards import REFUSED as WRONG_GUARDS
from tests.test_runner import Run, refused, run
from validation.format import read_format

__all__ = ["run"]  # the fixture

PUZZLES = ["1003\n0300\n4000\n0041\n", "0000\n0000\n0000\n0000\n", "12<|mask|>4\n"]


def written(run: Run, artifact: Path, prompts: list[Tensor], **options: Any) -> dict[str, Any]:
    ids = ";".join(",".join(map(str, prompt.tolist())) for prompt in prompts)
    chosen = [
        f"{name}={'null' if value is None else value}" for name, value in ({"stop_at_eos": "false"} | options).items()
    ]
    code, out, err = run(f"artifact={artifact}", f"ids={ids}", "--history", *chosen)
    assert (code, err) == (0, "")
    said = json.loads(out)
    return said | {"history": torch.tensor(said["history"]).transpose(0, 1)}


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_histories(build: Build, run: Run, name: str) -> None:
    """Token for token and step for step, also where positions are drawn at random."""
    for case, facts in golden_cases(name).items():
        expected = golden_tensors(name)[f"{case}/history"]
        said = written(run, build(name, "fp32_xnnpack"), prompts_of(name, case), **options_of(facts))
        if facts.get("reads_pad_row"):  # its other row has no padding, and is right: tests/test_generation.py
            assert torch.equal(said["history"][:, 1], expected[:, 1]), case
            continue
        assert torch.equal(said["history"], expected), case
        idle = int((expected[1:] == expected[:-1]).all(-1).sum())
        calls = facts["forward_calls"] * expected.shape[1]
        assert calls - idle <= said["forward_calls"] <= calls, case


def test_schedules(check: Path) -> None:
    """How many tokens each step writes: all 333 schedules of the reference."""
    entries = sampler()[0]["schedule"]
    assert len(entries) == 333
    asked = "".join(json.dumps([entry["masks"], entry["steps"], entry["eps"]]) + "\n" for entry in entries)
    ended = subprocess.run([check, "schedule"], input=asked, capture_output=True, text=True, check=True)
    for entry, line in zip(entries, ended.stdout.splitlines(), strict=True):
        assert json.loads(line) == entry["counts"], entry


def test_what_python_writes(build: Build, run: Run) -> None:
    """Every option, in all combinations that decide the same; from the same seed where positions are drawn."""
    artifact = build("gqa2", "fp32_xnnpack")
    program = Program.open(artifact)
    mask = program.mask_id
    prompts = [torch.tensor(PROMPT), torch.tensor([mask, *PROMPT[:3], mask])]
    algs: list[dict[str, Any]] = [{"alg": alg} for alg in ("entropy", "maskgit_plus", "topk_margin")]
    algs += [{"alg": "origin", "seed": 7}, {"alg": "entropy", "alg_temp": 0.5, "seed": -3}, {"threshold": 0.02}]
    algs += [{"threshold": 0.5, "alpha": 0.6}, {"threshold": 0.5, "relaxed_threshold": 0.25, "radius": 2}]
    algs += [{"threshold": 0.2, "kl_threshold": 0.6}, {"gamma": 5.0}, {"entropy_threshold": 3.2}]
    blocks: list[dict[str, Any]] = [{}, {"block_length": 4}, {"cache": "prefix"}, {"cache": "dual", "block_length": 5}]
    blocks += [{"cache": "dual", "block_length": 5, "suffix_window": 3}]
    guards: dict[str, Any] = {"eos_penalty": 3.0, "min_new_tokens": 5, "no_repeat_ngram_size": 3, "stop_at_eos": True}
    cuts: list[dict[str, Any]] = [guards, {}, {"top_p": 0.3, "stop_at_eos": True}, {"top_k": 3, "eps": 0.3, "steps": 9}]
    for alg, block, cut in product(algs, blocks, cuts):
        options = {"max_new_tokens": 12} | alg | block | cut
        expected = generate(program, prompts, **options)
        shown = options | {"stop_at_eos": str(options.get("stop_at_eos", False)).lower()}
        said = written(run, artifact, prompts, **shown)
        assert torch.equal(said["history"], expected.history), options
        assert said["answers"] == [answer.tolist() for answer in expected.answers]
        assert (said["forward_calls"], said["positions"]) == (expected.forward_calls, expected.positions)


def test_tokens_are_drawn_by_their_probability(build: Build, run: Run) -> None:
    """By other numbers than torch's: the same frequencies within five standard deviations."""
    artifact = build("gqa2", "fp32_xnnpack")
    program = Program.open(artifact)
    n = 200
    options: dict[str, Any] = {"max_new_tokens": n, "steps": 1, "temperature": 0.7, "top_k": 4}
    # All masks are seen at once, and each draws from its own four tokens.
    tokens = torch.tensor([*PROMPT, *[program.mask_id] * n])
    logits = program.forward(tokens, 0, len(tokens))[0, len(PROMPT) - 1 : -1].clone()
    logits[:, program.mask_id] = -torch.inf
    probs = torch.zeros_like(logits)
    best = logits.topk(4)
    probs.scatter_(1, best.indices, (best.values / 0.7).softmax(-1))
    first = [written(run, artifact, [torch.tensor(PROMPT)], seed=seed, **options) for seed in range(20)]
    drawn = torch.tensor([said["answers"][0] for said in first])
    assert torch.equal(
        drawn[3], torch.tensor(written(run, artifact, [torch.tensor(PROMPT)], seed=3, **options)["answers"][0])
    )
    assert not torch.equal(drawn[3], drawn[4])
    for rank in range(4):
        p = probs.gather(1, best.indices[:, rank, None])[:, 0]
        seen, expected = (drawn == best.indices[:, rank]).sum(), len(drawn) * p.sum()
        assert abs(seen - expected) < 5 * (len(drawn) * (p * (1 - p)).sum()).sqrt()
    assert (probs.gather(1, drawn.T) > 0).all()


ALL: list[tuple[dict[str, Any], str]] = [*REFUSED, *WRONG_RULES, *WRONG_GUARDS]  # type: ignore[list-item]
NUMBERS = [
    (options, said)
    for options, said in ALL
    if "prompt_ids" not in options and not any(value is None or isinstance(value, bool) for value in options.values())
]


@pytest.mark.parametrize(("options", "said"), NUMBERS, ids=[said for _, said in NUMBERS])
def test_refused(build: Build, run: Run, options: dict[str, Any], said: str) -> None:
    words = {"ids": ",".join(map(str, PROMPT)), "max_new_tokens": 12} | options
    ended = run(f"artifact={build('gqa2', 'fp32_xnnpack')}", *(f"{key}={value}" for key, value in words.items()))
    # A text that is a number is one here; and what Python calls None is called none.
    if any(isinstance(value, str) and value.replace(".", "").isdigit() for value in options.values()):
        assert ended[0] == 0
        return
    refused(ended, 2)
    assert re.search(said.replace("None", "none").replace("1: must", "'1"), ended[2]) or "whole number" in ended[2]


def test_wrong_ids(build: Build, run: Run) -> None:
    artifact = f"artifact={build('gqa2', 'fp32_xnnpack')}"
    for ids, said in (
        ("", "a prompt is empty"), ("1;;2", "a prompt is empty"), ("1,x", "ids 'x': must be token ids"),
        ("1,320", "token id 320 is outside the vocabulary, 0..319"), ("-1", "token id -1 is outside"),
        (",".join(["1"] * 300), "the prompt has 300 tokens, max_seq_len is 256"),
        (",".join(["1"] * 250), "at most 6 new tokens fit"), ("9" * 30, "must be token ids"),
    ):  # fmt: skip
        refused(run(artifact, f"ids={ids}", "max_new_tokens=12"), 2, said)
    refused(run(artifact, "ids=1"), 2, "give max_new_tokens=")
    refused(run(artifact, "ids=1", "prompt=x", "max_new_tokens=1"), 2, "ids, prompt and prompts: give one of them")
    refused(run(artifact, "prompt=x"), 2, "has no tokenizer.json")
    code, out, _ = run(artifact, f"ids={','.join(map(str, PROMPT))}", "max_new_tokens=3")
    program = Program.open(build("gqa2", "fp32_xnnpack"))
    answer = generate(program, PROMPT, max_new_tokens=3, stop_at_eos=True).answers[0].tolist()
    assert (code, out) == (0, ",".join(map(str, answer)) + "\n")


# ---- Text ----


@pytest.fixture(scope="module")
def answers(sudoku: Path) -> list[str]:
    """Python's, with a mask inside a prompt shown as it was filled."""
    artifact = open_text_artifact(sudoku)
    found = []
    for prompt in PUZZLES:
        ids = encode(artifact.tokenizer, prompt)
        said = generate(artifact.program, ids, max_new_tokens=artifact.new_tokens, stop_at_eos=True, threshold=0.9)
        shown = said.tokens[0, : len(ids)].tolist() if artifact.program.mask_id in ids else []
        found.append(decode(artifact.tokenizer, [*shown, *said.answers[0].tolist()]))
    return found


@pytest.mark.parametrize("load", ["mmap", "file"])
def test_a_prompt(run: Run, sudoku: Path, answers: list[str], load: str) -> None:
    for prompt, answer in zip(PUZZLES, answers, strict=True):
        code, out, err = run(f"artifact={sudoku}", f"prompt={prompt}", "threshold=0.9", f"load={load}", "threads=1")
        assert (code, out) == (0, answer + "\n")
        assert re.fullmatch(
            r"\d+ tokens in .* tokens/s, \d+ forward calls over \d+ positions, peak memory .* MiB\n", err
        )
        assert run(f"artifact={sudoku}", "threshold=0.9", stdin=prompt)[:2] == (0, answer + "\n")


def test_what_the_checkpoint_asks_for(
    run: Run, pipeline: Callable[..., tuple[int, str, str]], sudoku: Path, tmp_path: Path
) -> None:
    """As in Python: what it sets counts where nobody says otherwise, and a wrong value is named."""
    artifact = tmp_path / "sudoku"
    shutil.copytree(sudoku, artifact)
    file = artifact / "generation_config.json"
    file.write_text(json.dumps({"steps": 3, "alg": "maskgit_plus", "alg_temp": 0.0, "eos_token_id": 1}))
    for options in ([], ["steps=5"], ["threshold=0.9"], ["alg=entropy", "alg_temp=0"]):
        asked = [f"artifact={artifact}", f"prompt={PUZZLES[0]}", *options]
        code, out, err = run(*asked)
        same = pipeline("generate", *asked)
        assert (code, out) == same[:2]
        first, second = (sorted(text.splitlines()[0].split()) for text in (err, same[2]))
        assert first == second
        assert "own:" in first
        assert re.findall(r"\d+ forward calls", err) == re.findall(r"\d+ forward calls", same[2])
    file.write_text(json.dumps({"alg": "origin"}))
    assert "own" not in run(f"artifact={artifact}", f"prompt={PUZZLES[0]}")[2]
    for wrong, said in (
        ({"steps": 0}, "steps 0"),
        ({"steps": 1.5}, "steps '1.5'"),
        ({"alg": 3}, "alg 3"),
        ({"top_p": 7}, "top_p 7"),
    ):
        file.write_text(json.dumps(wrong))
        code, out, err = run(f"artifact={artifact}", f"prompt={PUZZLES[0]}")
        assert (code, out) == (6, "")
        assert err.startswith(f"error: {file}: {said}")
    file.write_text("[]")
    assert run(f"artifact={artifact}", f"prompt={PUZZLES[0]}")[0] == 6


def test_a_stream(run: Run, sudoku: Path, answers: list[str]) -> None:
    """A line after each step, in which what is written stays; and the answer at the end."""
    code, out, err = run(f"artifact={sudoku}", f"prompt={PUZZLES[0]}", "--stream")
    assert (code, err) == (0, "")
    *steps, last = map(json.loads, out.splitlines())
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    left = [step["masks_left"] for step in steps]
    assert left == sorted(left, reverse=True)
    assert left[-1] == 0
    assert all(step["text"].count("░") == step["masks_left"] for step in steps)
    assert set(last) == {"answer", "new_tokens", "forward_calls", "positions", "seconds"}
    assert steps[-1]["text"].startswith(last["answer"])


def test_lines(run: Run, sudoku: Path, answers: list[str], tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": prompt}) for prompt in PUZZLES]
    wrong = {
        '{"prompt": 5}': 'expected a JSON object with a "prompt"', "[": "not JSON", '{"promt": "x"}': "no key 'promt'",
        '{"messages": []}': "of Python alone", '"x"': "expected a JSON object", "[" * 1000: "nested too deeply",
        '{"prompt": ""}': "a prompt is empty",
    }  # fmt: skip
    code, out, err = run(f"artifact={sudoku}", "prompts=-", "threshold=0.9", stdin="\ufeff" + "\n\n".join(lines) + "\n")
    said = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [(line["line"], line["answer"]) for line in said] == list(zip((1, 3, 5), answers, strict=True))
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join([lines[0], *wrong, lines[1]]))
    code, out, err = run(f"artifact={sudoku}", f"prompts={file}", "threshold=0.9")
    assert code == 2
    assert err.splitlines()[-1] == f"error: {file}: {len(wrong)} of {len(wrong) + 2} lines were not answered"
    said = [json.loads(line) for line in out.splitlines()]
    assert [said[0]["answer"], said[-1]["answer"]] == answers[:2]
    for line, number, words in zip(said[1:-1], range(2, len(wrong) + 2), wrong.values(), strict=True):
        assert line["line"] == number
        assert words in line["error"]
        assert f"line {number}: {line['error']}" in err
    refused(run(f"artifact={sudoku}", "prompts=-", stdin="\n \n"), 2, "stdin: holds no line")
    refused(run(f"artifact={sudoku}", f"prompts={tmp_path}"), 2, "cannot be read")
    refused(run(f"artifact={sudoku}", "prompts=-", "prompt=x"), 2, "prompt and prompts: give one of them")


def test_texts_that_are_refused(run: Run, sudoku: Path) -> None:
    refused(run(f"artifact={sudoku}", "prompt="), 2, "a prompt is empty")
    refused(run(f"artifact={sudoku}", b"prompt=\xff".decode(errors="surrogateescape")), 2, "not valid Unicode")
    for words, said in (
        (["--json"], "--json is of --self-test"), (["--history", "prompt=x"], "--history is of ids="),
        (["--stream", "ids=1"], "--stream is of one prompt"), (["prompt=x", "cache=both"], "there are prefix, dual"),
        (["prompt=x", "stop_at_eos=yes"], "must be true or false"), (["prompt=x", "threads=0"], "threads 0: must be"),
    ):  # fmt: skip
        refused(run(f"artifact={sudoku}", *words), 2, said)


def test_a_stdout_that_is_full(native: Callable[..., Path], sudoku: Path) -> None:
    with Path("/dev/full").open("w") as full:
        words = [str(native()), f"artifact={sudoku}", f"prompt={PUZZLES[0]}"]
        ended = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 7
    assert ended.stderr.splitlines()[-1] == "error: stdout cannot be written"


def test_it_takes_a_fraction_of_pythons_memory(native: Callable[..., Path], sudoku: Path) -> None:
    """A tenth at most; measured was a seventeenth. Time is for `scripts/compare_runner.py` itself."""
    words = [sys.executable, "-m", "scripts.compare_runner", str(sudoku), str(native()), "--repeats", "1"]
    found = json.loads(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert found["same_answer"]
    assert found["ratios"]["peak_rss"] >= 10
    assert set(found["ratios"]) == {"seconds", "peak_rss", "tokens_per_second"}


def test_planned_memory_is_there_where_it_is_written(native: Callable[..., Path], tmp_path: Path) -> None:
    """The scores of the longest call are 64 MiB of this program's plan, those of a short one next to nothing."""
    model = load_hf_model(GOLDEN / "gqa2")[0]
    program = StaticProgram(model, 2048, Backend.portable, Attention.aten)
    exported, methods = export_program(program, 2048), metadata(model, 2048, 2048, Attention.aten)
    with (tmp_path / "model.pte").open("wb") as file:
        lower_program(exported, Backend.portable, methods).write_to_file(file)
    assert sum(read_format(tmp_path / "model.pte").planned_memory) > 64 * 2**20
    command = [str(native()), f"artifact={tmp_path / 'model.pte'}", "ids=11,205,7", "max_new_tokens=1"]
    # Of a small parent: what a process had before it became the runner counts for it too.
    ask = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
    ask += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", ask, *command], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40 * 2**10  # KiB
