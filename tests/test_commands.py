"""`generate`, `evaluate` and `bench` as a user runs them."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.checkpoints import ROOT, Build

Pipeline = Callable[..., tuple[int, str, str]]
PUZZLE, SOLVED = "1003\n0300\n3210\n4132", "1423\n2341\n3214\n4132\n"


def test_a_prompt_is_answered(pipeline: Pipeline, sudoku: Path) -> None:
    for options in ([], ["threshold=0.9"], ["cache=prefix"], ["cache=dual", "steps=10"]):
        code, out, err = pipeline("generate", f"artifact={sudoku}", f"prompt={PUZZLE}", *options)
        assert (code, out) == (0, SOLVED)
        assert "19 tokens in" in err
        assert "forward calls over" in err
        assert err.count("\n") == 1


def test_an_answer_ends_before_a_stop(pipeline: Pipeline, sudoku: Path) -> None:
    calls = {}
    for stop in ("[]", '["\\n2"]', '["zz","41\\n"]'):
        code, out, err = pipeline(
            "generate", f"artifact={sudoku}", f"prompt={PUZZLE}", f"stop={stop}", "block_length=5"
        )
        assert code == 0
        calls[out] = int(re.findall(r"(\d+) forward calls", err)[0])
    assert list(calls) == [SOLVED, SOLVED[: SOLVED.index("\n2")] + "\n", SOLVED[: SOLVED.index("41\n")] + "\n"]
    assert calls[SOLVED] > 2 * min(calls.values()), "what is behind a stop is not computed"


def test_an_empty_answer_is_announced(pipeline: Pipeline, sudoku: Path) -> None:
    code, out, err = pipeline("generate", f"artifact={sudoku}", f"prompt={PUZZLE}{SOLVED.strip()}")
    assert (code, out) == (0, "\n")
    assert "min_new_tokens=16" in err.splitlines()[0]
    code, _, err = pipeline("generate", f"artifact={sudoku}", f"prompt={PUZZLE}", "max_new_tokens=0")
    assert "empty" not in err


def test_a_prompt_is_read_from_stdin(pipeline: Pipeline, sudoku: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(PUZZLE))
    assert pipeline("generate", f"artifact={sudoku}")[:2] == (0, SOLVED)


@pytest.mark.parametrize(
    "text", ["a, b", "{x: [1}", 'it\'s "so"', "${oc.env:HOME}", "a=b", "\\", "x\ny", "~", "+a", "数独"]
)
def test_any_text_is_a_prompt(pipeline: Pipeline, sudoku: Path, text: str) -> None:
    """Hydra's grammar is for keys and values, not for what a user says: each byte is a token here."""
    code, _, err = pipeline("generate", f"artifact={sudoku}", f"prompt={text}", "max_new_tokens=1")
    assert code == 0
    assert f"1 forward calls over {len(text.encode()) + 1} positions" in err


def test_masks_in_a_prompt_are_filled(pipeline: Pipeline, sudoku: Path) -> None:
    half = f"{PUZZLE}1423\n2341\n3<|mask|>14\n41<|mask|>2"
    for options in ([], ["cache=dual"]):
        code, out, _ = pipeline("generate", f"artifact={sudoku}", f"prompt={half}", "max_new_tokens=0", *options)
        assert (code, out) == (0, PUZZLE + SOLVED)


def test_lines_are_answered_one_by_one(
    pipeline: Pipeline, sudoku: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = json.dumps({"prompt": PUZZLE})
    broken = ['{"prompt": ', '["prompt"]', '{"prompt": 1}', '{"prompt": ""}', '{"messages": [{}]}', "[" * 100_000]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join([good, *broken, "", good, json.dumps({"prompt": "1" * 300}), '{"prompt": "\\ud800"}']))
    code, out, err = pipeline("generate", f"artifact={sudoku}", f"prompts={file}", "threshold=0.9")
    answers = {answer["line"]: answer for answer in map(json.loads, out.splitlines())}
    assert code == 2
    assert list(answers) == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11]
    for line in (1, 9):
        assert answers[line]["answer"] + "\n" == SOLVED
        assert answers[line]["forward_calls"] < 19
    assert all("error" in answers[line] for line in answers if line not in (1, 9))
    said = err.splitlines()
    assert len(said) == 9
    assert all(line.startswith(f"error: {file}") for line in said)
    assert "line 2: not JSON" in said[0]
    assert "8 of 10 lines were not answered" in said[-1]
    monkeypatch.setattr(sys, "stdin", io.StringIO(good))
    code, out, err = pipeline("generate", f"artifact={sudoku}", "prompts=-")
    assert (code, err) == (0, "")
    assert json.loads(out)["answer"] + "\n" == SOLVED


def test_wrong_input_is_one_line(
    pipeline: Pipeline, build: Build, sudoku: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty, latin = tmp_path / "empty.jsonl", tmp_path / "latin.jsonl"
    empty.write_text("\n")
    latin.write_bytes(b'{"prompt": "\xe9"}\n')
    without_tokenizer, bare = build("gqa2", "fp32_xnnpack"), tmp_path / "bare"
    shutil.copytree(sudoku, bare, ignore=shutil.ignore_patterns("tokenizer_config.json"))
    cases: list[tuple[int, str, list[str]]] = [
        (6, "no such artifact", ["generate", "artifact=/nowhere", "prompt=1"]),
        (2, "artifact is not given", ["generate", "prompt=1"]),
        (2, "has no tokenizer.json", ["generate", f"artifact={without_tokenizer}", "prompt=1"]),
        (2, "no chat template", ["generate", f"artifact={bare}", "prompt=1", "chat=true"]),
        (2, "prompt and prompts: give one", ["generate", f"artifact={sudoku}", "prompt=1", "prompts=x"]),
        (2, "/nowhere cannot be read", ["generate", f"artifact={sudoku}", "prompts=/nowhere"]),
        (2, "holds no line", ["generate", f"artifact={sudoku}", f"prompts={empty}"]),
        (2, "300 tokens, max_seq_len is 256", ["generate", f"artifact={sudoku}", "prompt=" + "1" * 300]),
        (2, "at most 251 new tokens", ["generate", f"artifact={sudoku}", "prompt=12345", "max_new_tokens=252"]),
        (2, "empty", ["generate", f"artifact={sudoku}", "prompt="]),
        (2, "not valid Unicode", ["generate", f"artifact={sudoku}", "prompt=\udce9"]),
        (2, "did you mean 'dual'", ["generate", f"artifact={sudoku}", "prompt=1", "cache=duel"]),
        (2, "did you mean 'entropy'", ["generate", f"artifact={sudoku}", "prompt=1", "alg=entropie"]),
        (2, "threshold 1.5", ["generate", f"artifact={sudoku}", "prompt=1", "threshold=1.5"]),
        (2, "top_p 0.0", ["generate", f"artifact={sudoku}", "prompt=1", "top_p=0"]),
        (2, "temperature -1.0", ["generate", f"artifact={sudoku}", "prompt=1", "temperature=-1"]),
        (2, "no key 'promt'", ["generate", f"artifact={sudoku}", "promt=1"]),
        (2, "no task 'sudokus'", ["evaluate", f"artifact={sudoku}", "task=sudokus"]),
        (2, "task 'none' has no prompts", ["evaluate", f"artifact={sudoku}", "task=none"]),
        (2, "n 2000", ["evaluate", f"artifact={sudoku}", "n=2000"]),
        (2, "n 0", ["evaluate", f"artifact={sudoku}", "n=0"]),
        (2, "caches: name at least one", ["evaluate", f"artifact={sudoku}", "caches=[]"]),
        (2, "did you mean 'dual'", ["evaluate", f"artifact={sudoku}", "caches=[duel]"]),
        (7, "there is no folder", ["evaluate", f"artifact={sudoku}", "output=/nowhere/x.json"]),
        (2, "task.checker", ["evaluate", f"artifact={sudoku}", "task.checker=/nowhere"]),
        (6, "no such artifact", ["bench", "artifact=/nowhere"]),
        (2, "more than the artifact's max_seq_len, 256", ["bench", f"artifact={sudoku}", "prompt_len=257"]),
        (2, "more than the artifact's max_seq_len, 256", ["bench", f"artifact={sudoku}", "new_tokens=256"]),
        (2, "at most 256", ["bench", f"artifact={sudoku}", "lengths=[1,257]", "new_tokens=8"]),
        (2, "repeats 0", ["bench", f"artifact={sudoku}", "repeats=0", "new_tokens=8"]),
        (2, "at least 1 token", ["bench", f"artifact={sudoku}", "lengths=[0]", "new_tokens=8"]),
        (7, "is a folder", ["bench", f"artifact={sudoku}", f"output={tmp_path}", "new_tokens=8"]),
        (7, "output /proc/x.json", ["evaluate", f"artifact={sudoku}", "output=/proc/x.json"]),
        (2, "below 1e-6", ["generate", f"artifact={sudoku}", "prompt=1", "temperature=1e-40"]),
        (2, "at most 100000", ["generate", f"artifact={sudoku}", "prompt=1", "steps=2000000000"]),
        (2, "whole number", ["generate", f"artifact={sudoku}", "prompt=1", f"seed={10**30}"]),
    ]
    for name, source, said in [
        ("raises", "def check(p, a): return 1 / 0", "check failed: ZeroDivisionError"),
        ("none", "def check(p, a): pass", "must return True or False"),
        ("exits", "raise SystemExit(3)", "cannot be run: SystemExit"),
    ]:
        (tmp_path / f"{name}.py").write_text(source)
        cases.append((2, said, ["evaluate", f"artifact={sudoku}", "n=1", f"task.checker={tmp_path / name}.py"]))
    for name, key in [("endless", "Infinity"), ("negative", "-3")]:
        shutil.copytree(sudoku, tmp_path / name)
        manifest = (tmp_path / name / "manifest.json").read_text()
        (tmp_path / name / "manifest.json").write_text(manifest.replace('"new_tokens": 19', f'"new_tokens": {key}'))
        cases.append((6, "not a manifest", ["generate", f"artifact={tmp_path / name}", "prompt=1"]))
    shutil.copytree(sudoku, tmp_path / "foreign")
    tokenizer = json.loads((tmp_path / "foreign" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["1"] = 5000
    (tmp_path / "foreign" / "tokenizer.json").write_text(json.dumps(tokenizer))
    cases.append((6, "its tokenizer has id 5000", ["generate", f"artifact={tmp_path / 'foreign'}", "prompt=2"]))
    for expected, said, arguments in cases:
        code, out, err = pipeline(*arguments)
        assert (code, out) == (expected, ""), (arguments, err)
        assert said in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
    code, out, err = pipeline("generate", f"artifact={sudoku}", f"prompts={latin}")
    assert code == 2
    assert "not valid Unicode" in err
    assert "not valid Unicode" in json.loads(out)["error"]
    damaged = tmp_path / "damaged"
    shutil.copytree(sudoku, damaged)
    (damaged / "model.pte").write_bytes((damaged / "model.pte").read_bytes()[:5000])
    for arguments in (["generate", "prompt=1"], ["evaluate"], ["bench", "new_tokens=8"]):
        code, out, err = pipeline(*arguments, f"artifact={damaged}")
        assert (code, out, err.count("\n")) == (6, "", 1)
        assert "truncated" in err


def test_interrupted_it_prints_what_is_done(sudoku: Path, tmp_path: Path) -> None:
    """Ctrl-C after some steps: the tokens that are written, masks as blocks, and exit code 130."""
    command = [sys.executable, "-m", "pipeline", "generate", f"artifact={sudoku}", f"prompt={PUZZLE}"]
    begun = tmp_path / "begun"
    # Slower steps, so that there is a middle.
    slow = (
        "import time; from runtime import generation as g; after = g.Run.after_step; "
        f"g.Run.after_step = lambda run, rows: (after(run, rows), open({str(begun)!r}, 'w'), time.sleep(0.3))[0]"
    )
    code = f"{slow}; import sys; from pipeline.__main__ import main; sys.exit(main({command[3:]!r}))"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    deadline = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.2)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err == "error: interrupted\n"
    assert set(out) <= set("░1234\n")
    assert 0 < out.count("░") < 19


def test_a_closed_pipe_and_a_closed_stdin_end_it_in_a_line(sudoku: Path) -> None:
    lines = "\n".join([json.dumps({"prompt": PUZZLE})] * 400)
    command = f"{sys.executable} -m pipeline generate artifact={sudoku} prompts=- threshold=0.9"
    for line, said in [(f"{command} | head -n 1", "stdout cannot be written"), (f"{command} <&-", "stdin is closed")]:
        done = subprocess.run(line, shell=True, input=lines, capture_output=True, text=True, cwd=ROOT, check=False)
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
        if "head" in line:
            assert json.loads(done.stdout)["answer"] + "\n" == SOLVED
        else:
            assert done.returncode == 2


def test_evaluate(pipeline: Pipeline, sudoku: Path, tmp_path: Path) -> None:
    """The share is that of the run's own figure; caches are an approximation, and say so."""
    file = tmp_path / "scores.json"
    code, out, err = pipeline("evaluate", f"artifact={sudoku}", "n=60", "caches=[none,prefix,dual]", f"output={file}")
    assert (code, err) == (0, "")
    scores = {score["cache"]: score for score in json.loads(file.read_text())["scores"]}
    assert list(scores) == ["none", "prefix", "dual"]
    assert scores["none"]["solved"] >= 0.95
    for score in scores.values():
        assert score["n"] == 60
        assert 0 < score["low"] <= score["solved"] <= score["high"] <= 1
        assert f"{100 * score['solved']:.1f} %" in out
    assert scores["dual"]["positions"] < scores["none"]["positions"] * 2


def test_bench(pipeline: Pipeline, build: Build, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    options = ["prompt_len=8", "new_tokens=24", "block_length=8", "lengths=[1,8]", "repeats=2", f"output={file}"]
    code, out, err = pipeline("bench", f"artifact={build('gqa2', 'fp32_xnnpack')}", *options)
    assert (code, err) == (0, "")
    result = json.loads(file.read_text())
    assert [call["tokens"] for call in result["calls"]] == [1, 8, 256]
    assert [call["rows"] for call in result["calls"]] == [1, 8, 8]
    modes = {run["mode"]: run for run in result["generations"]}
    assert list(modes) == ["no cache", "prefix", "dual", "dual, threshold"]
    assert modes["no cache"]["same_tokens"] == 1
    # The same steps; of a block's eight, one writes nothing.
    assert len({modes[name]["forward_calls"] for name in ("no cache", "prefix", "dual")}) == 1
    calls = modes["dual"]["forward_calls"] // 3
    assert modes["no cache"]["positions"] == 3 * calls * 32
    assert modes["prefix"]["positions"] == sum(32 + (calls - 1) * (24 - start) for start in (0, 8, 16))
    assert modes["dual"]["positions"] == 3 * (32 + (calls - 1) * 8)
    for spread in (result["load_seconds"], modes["dual"]["seconds"], result["calls"][0]["seconds"]):
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    assert result["memory"]["peak"] > result["memory"]["loaded"]["anonymous"] > 0
    for title in ("one call, median", "24 tokens after 8, blocks of 8", "peak memory"):
        assert title in out


@pytest.mark.parametrize(
    ("max_seq_len", "given", "measured"),
    [
        (2048, {}, (128, 256, (1, 8, 32, 128))),
        (384, {}, (128, 256, (1, 8, 32, 128))),
        (256, {}, (128, 128, (1, 8, 32, 128))),
        (64, {}, (32, 32, (1, 8, 32))),
        (1, {}, (1, 0, (1,))),
        (64, {"prompt_len": 40}, (40, 24, (1, 8, 32))),
        (64, {"new_tokens": 40}, (24, 40, (1, 8, 32))),
        (64, {"new_tokens": 0, "lengths": [64]}, (64, 0, (64,))),
    ],
)
def test_bench_measures_what_fits(
    max_seq_len: int, given: dict[str, Any], measured: tuple[int, int, tuple[int, ...]]
) -> None:
    from pipeline.commands import bench
    from pipeline.schema import BenchConfig

    config = BenchConfig(**given)
    settings = bench._settings(config, max_seq_len)
    assert (settings.prompt_len, settings.new_tokens, settings.lengths) == measured
    cut = bench._cut(config, settings)
    for name, default, value in zip(("prompt_len", "new_tokens"), (128, 256), measured, strict=False):
        assert (f"{name} {value}" in cut) == (name not in given and value != default)


def test_a_program_shorter_than_the_defaults(pipeline: Pipeline, sudoku: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    code, _, err = pipeline("bench", f"artifact={sudoku}", "steps=4", "repeats=1", f"output={file}")
    assert code == 0
    assert err == "note: what fits into the artifact's max_seq_len, 256, is measured: new_tokens 128\n"
    result = json.loads(file.read_text())
    assert (result["settings"]["prompt_len"], result["settings"]["new_tokens"]) == (128, 128)


def test_an_artifact_out_of_bounds_is_warned_of(pipeline: Pipeline, sudoku: Path, tmp_path: Path) -> None:
    failed = tmp_path / "sudoku.failed"
    shutil.copytree(sudoku, failed)
    manifest = json.loads((failed / "manifest.json").read_text())
    for figure in manifest["figures"]:
        figure["ok"] = figure["name"] not in ("cosine", "sqnr_db")
    (failed / "manifest.json").write_text(json.dumps(manifest))
    cheap = {
        "generate": [f"prompt={PUZZLE}", "max_new_tokens=1"],
        "evaluate": ["n=1"],
        "bench": ["new_tokens=0", "lengths=[1]", "repeats=1"],
    }
    for command, options in cheap.items():
        code, _, err = pipeline(command, f"artifact={failed}", *options)
        assert code == 0, err
        assert err.splitlines()[0] == f"warning: {failed} was out of bounds when it was made: sqnr_db, cosine"


@pytest.mark.parametrize("line", ['{"prompt": "1", %s: 3}', '{"messages": [], %s: 3}'])
def test_a_key_of_a_line_that_is_not_known_is_refused(
    line: str, pipeline: Pipeline, sudoku: Path, tmp_path: Path
) -> None:
    keys = {
        "promt": "no key 'promt' in a line; did you mean 'prompt'?",
        "message": "no key 'message' in a line; did you mean 'messages'?",
        "gen_length": "no key 'gen_length' in a line; did you mean 'max_new_tokens'? That is given to the command",
        "temperature": "no key 'temperature' in a line; did you mean 'temperature'? That is given to the command",
        "zzz": "no key 'zzz' in a line; it has a prompt or messages",
    }
    file = tmp_path / "lines"
    file.write_text("\n".join(line % json.dumps(key) for key in keys))
    code, out, _ = pipeline("generate", f"artifact={sudoku}", f"prompts={file}")
    assert code == 2
    for answer, said in zip(map(json.loads, out.splitlines()), keys.values(), strict=True):
        assert answer["error"].startswith(said)


def test_brackets_of_a_name_are_shown(pipeline: Pipeline, sudoku: Path, tmp_path: Path) -> None:
    """They are no markup."""
    artifact = tmp_path / "an [artifact]"
    shutil.copytree(sudoku, artifact)
    for arguments, said in [
        (["verify", f"artifact={artifact}"], f"{artifact} is as"),
        (["clean", f"cache={tmp_path}/[c]"], f"from {tmp_path}/[c],"),
        (["bench", f"artifact={artifact}", "new_tokens=0", "lengths=[1]", "repeats=1"], "an [artifact], "),
        (["evaluate", f"artifact={artifact}", "task=sudoku", "task.name=[t]", "n=1"], "[t], per prompt"),
    ]:
        code, out, _ = pipeline(*arguments)
        assert code == 0
        assert said in out, out


WORDS = ["generation_config.json", "reference.safetensors", "unexpected_operators", "1.5094e+06", "FAILED"]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_inspect_breaks_no_word_and_cuts_no_name(width: int, sudoku: Path) -> None:
    from pipeline.commands import inspect

    found = inspect.contents(sudoku)
    manifest = found["manifest"]
    name = "a-checkpoint-of-a-long-name-in-one-word-of-58-characters-x"
    manifest["checkpoint"]["name"] = name
    manifest["solved"]["task"] = "task_of_a_long_name"
    manifest["figures"][0]["ok"] = False
    manifest["figures"][1]["bound"] = -123.45e-100
    console = Console(file=io.StringIO(), width=width)
    inspect._show(console, found, *inspect._tables(found))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in said
    for word in (*WORDS, name, "task_of_a_long_name, n=1000", "-1.2345e-98", "operators", "between", "outside"):
        assert word in said, word
    for row in manifest["figures"]:
        shown = next(line for line in said.splitlines() if row["name"] in line)
        assert any(verdict in shown for verdict in ("ok", "FAILED", "reported")), shown


def test_tokenizer_files_of_a_real_checkpoint(pipeline: Pipeline, chatty: Path, chatty_artifact: Path) -> None:
    """vocab.json and merges.txt become the artifact's tokenizer.json; generation needs the artifact alone."""
    from runtime.tokenizer import decode, encode, load_tokenizer

    assert not (chatty / "tokenizer.json").exists()
    assert (chatty_artifact / "tokenizer.json").is_file()
    alone, theirs = load_tokenizer(chatty_artifact), load_tokenizer(chatty)
    assert alone is not None
    assert theirs is not None
    text = "the cat <|im_end|> sat — 数独 é\u0301\n"
    assert encode(alone, text) == encode(theirs, text)
    assert decode(alone, encode(alone, text)) == decode(theirs, encode(theirs, text))
    prompt = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    plain = pipeline("generate", f"artifact={chatty_artifact}", f"prompt={prompt}")
    chat = pipeline("generate", f"artifact={chatty_artifact}", "prompt=the cat", "chat=true")
    assert plain[0] == chat[0] == 0
    assert plain[1] == chat[1]
    assert re.findall(r"over (\d+) positions", plain[2]) == re.findall(r"over (\d+) positions", chat[2])


def test_all_end_tokens_reach_the_program(chatty: Path, chatty_artifact: Path) -> None:
    """Of config.json, generation_config.json, the tokenizer, and the end of turn of its chat template."""
    from pipeline.load import load
    from runtime import Program

    ends = (300, 305, 302)
    assert Program.open(chatty_artifact).eos_ids == ends
    assert json.loads((chatty_artifact / "manifest.json").read_text())["model"]["eos_token_id"] == list(ends)
    loaded = load(chatty)
    assert loaded.model.eos_ids == loaded.config.eos_ids == ends


def test_somebodys_own_task(pipeline: Pipeline, own_task: Path, chatty: Path, chatty_artifact: Path) -> None:
    """Prompts and a checker by their files; `validate` runs no file that it is not given."""
    manifest = json.loads((chatty_artifact / "manifest.json").read_text())
    assert manifest["solved"] == {"task": "words", "n": 2, "float32": 0.5, "program": 0.5}
    assert manifest["task"]["checker"] == "words.py"
    files = [f"task.prompts={own_task}/words.jsonl", f"task.checker={own_task}/words.py"]
    code, out, _ = pipeline(
        "evaluate", f"artifact={chatty_artifact}", *files, "n=2", "task.name=words", "task.new_tokens=4"
    )
    assert code == 0
    assert "50.0 %" in out
    code, _, err = pipeline("validate", f"artifact={chatty_artifact}")
    assert code == 2
    assert "checker=FILE" in err
    code, out, _ = pipeline("validate", f"artifact={chatty_artifact}", f"checker={own_task}/words.py")
    assert code == 0
    assert "solved_percent" in out
