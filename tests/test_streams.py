"""Streams that lack characters, or cannot be written: nothing is taken for damaged, and no work is lost."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

import pytest

from pipeline import road
from pipeline.__main__ import main
from pipeline.commands import COMMANDS, validate
from pipeline.package import Packaged
from runtime.artifact import read_manifest
from runtime.errors import OutputError
from tests.checkpoints import ROOT, Build
from validation.figure import Figure

PUZZLE, SOLVED = "1003\n0300\n3210\n4132", "1423\n2341\n3214\n4132\n"
FIGURES = [Figure("quality", "sqnr_db", 30, 20, True, "数独 \udce9"), Figure("quality", "cosine", 0.9, 0.8, True)]


@pytest.fixture
def commands(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Each that prints, on whole artifacts; what takes long in them is left out."""
    one, sudoku = build("gqa2", "fp32_xnnpack"), build("dream_sudoku", "int4_xnnpack")
    replay = SimpleNamespace(load_seconds=0.1, peak_rss=2**20)
    verdict = SimpleNamespace(words="right")
    validated = SimpleNamespace(figures=FIGURES, measured=SimpleNamespace(replay=replay), verdict=verdict)
    monkeypatch.setattr(road, "run", lambda *_: (Packaged(tmp_path / "[a]", read_manifest(one), FIGURES), validated))
    monkeypatch.setattr(validate, "revalidate", lambda *_: FIGURES)
    (tmp_path / "lines").write_text(json.dumps({"prompt": PUZZLE}) + '\n{"数独 😀": 1}\n', encoding="utf-8")
    lines = ["cache=dual", f"prompts={tmp_path / 'lines'}"]
    return [
        ["--help"],
        ["recipes"],
        ["run", "--help"],
        ["run", "--cfg", "job", "output=数独"],
        ["run", f"output={tmp_path / 'out'}"],
        ["validate", f"artifact={one}"],
        ["inspect", f"artifact={one}"],
        ["inspect", f"artifact={one}", "--json"],
        ["verify", f"artifact={one}"],
        ["generate", f"artifact={sudoku}", *lines],
        ["generate", f"artifact={sudoku}", "cache=dual", f"prompt={PUZZLE}"],
        ["compare", str(one), str(sudoku)],
        ["compare", str(one), str(sudoku), "--json"],
        ["clean", f"cache={tmp_path / '数独'}"],
    ]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str], TextIO | None], tuple[int, str]]:
    """Runs a command with this stdout: (exit code, stderr)."""

    def run(arguments: list[str], stdout: TextIO | None) -> tuple[int, str]:
        stderr = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            patch.setattr(sys, "stderr", stderr)
            code = main(arguments)
        stderr.seek(0)
        return code, stderr.read()

    return run


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_cannot_be_shown_is_replaced(
    encoding: str, commands: list[list[str]], said: Callable[..., tuple[int, str]]
) -> None:
    failed = {}
    for arguments in commands:
        stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        code, err = said(arguments, stdout)
        stdout.seek(0)
        out = stdout.read()
        assert out, arguments
        if code:
            failed[arguments[0]] = (code, err)
        if arguments[0] == "run" and out.endswith("report.html\n"):
            assert "[a], to look at" in out
        if "--json" in arguments:
            json.loads(out)
        if arguments[0] in ("run", "validate") and "--help" not in arguments and "--cfg" not in arguments:
            assert ">= 20" in out
            assert r"\u6570\u72ec" in out
        if any(argument.startswith("prompts=") for argument in arguments):
            answered, refused = map(json.loads, out.splitlines())
            assert answered["answer"] + "\n" == SOLVED
            assert "数独 😀" in refused["error"]
    assert {command: code for command, (code, _) in failed.items()} == {"generate": 2}
    assert all("internal" not in err for _, err in failed.values())


@pytest.fixture(params=["full", "closed", "pipe"])
def unwritable(request: pytest.FixtureRequest) -> Iterator[Callable[[], TextIO | None]]:
    opened = []

    def make() -> TextIO | None:
        if request.param == "closed":
            return None
        if request.param == "full":
            opened.append(open("/dev/full", "w", encoding="utf-8"))  # noqa: PTH123, SIM115
        else:
            reads, writes = os.pipe()
            os.close(reads)
            opened.append(open(writes, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
        return opened[-1]

    yield make
    for stream in opened:
        stream.close()


def test_a_stdout_that_cannot_be_written_is_one_line(
    unwritable: Callable[[], TextIO | None], commands: list[list[str]], said: Callable[..., tuple[int, str]]
) -> None:
    for arguments in commands:
        code, err = said(arguments, unwritable())
        assert (code, err.count("\n")) == (7, 1), (arguments, err)
        assert err.startswith("error: stdout cannot be written: "), arguments


def test_a_failure_of_another_thread_is_told(said: Callable[..., tuple[int, str]]) -> None:
    """What a thread of progress could not write is not taken for written."""

    def work(config: object) -> None:
        with contextlib.suppress(OutputError):
            sys.stdout.write("x" * 2**17)
        sys.stdout.write("the last line")

    with open("/dev/full", "w", encoding="utf-8") as full, pytest.MonkeyPatch.context() as patch:  # noqa: PTH123
        patch.setitem(COMMANDS, "clean", work)
        code, err = said(["clean"], full)
    assert (code, err) == (7, "error: stdout cannot be written: No space left on device\n")


def test_streams_of_a_shell(build: Build) -> None:
    """Also at the end of the interpreter, which flushes once more, and where a file may take the number of a stream."""
    artifact = build("gqa2", "fp32_xnnpack")
    command = f"{sys.executable} -m pipeline inspect artifact={artifact}"
    cases = [
        (f"{command} >/dev/full", 7, "error: stdout cannot be written: No space left on device\n"),
        (f"{command} >&-", 7, "error: stdout cannot be written: it is closed\n"),
        (f"set -o pipefail; {command} | true", 7, "error: stdout cannot be written: Broken pipe\n"),
        (f"{command} --nope >/dev/full 2>/dev/full", 2, ""),
        (f"{command} 2>&- <&-", 0, ""),
        (f"PYTHONIOENCODING=latin-1 {command}", 0, ""),
        (f"LC_ALL=C PYTHONUTF8=0 {command}", 0, ""),
    ]
    started = [
        subprocess.Popen(["bash", "-c", line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        for line, _, _ in cases
    ]
    for (line, code, err), child in zip(cases, started, strict=True):
        assert (child.communicate()[1], child.returncode) == (err, code), line


def test_a_prompt_that_stdin_cannot_decode(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    sudoku = build("dream_sudoku", "int4_xnnpack")
    prompts = io.TextIOWrapper(io.BytesIO(json.dumps({"prompt": "数"}, ensure_ascii=False).encode()), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", prompts)
    assert main(["generate", f"artifact={sudoku}", "prompts=-", "max_new_tokens=1"]) == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("数".encode()), encoding="ascii"))
    assert main(["generate", f"artifact={sudoku}", "max_new_tokens=1"]) == 2
