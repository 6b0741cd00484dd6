"""The runtime's threads: how many there are, who sets them, and what leaves how many processors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime import text
from runtime.artifact import read_manifest
from runtime.processor import available
from runtime.program import ProgramError
from runtime.threads import thread_count
from tests.checkpoints import ROOT, Build
from validation import judge

Pipeline = Callable[..., tuple[int, str, str]]

# A process of its own: the pool is the process's.
SET = """
import os, sys, hashlib
from runtime import Program, use_threads
from runtime.errors import UsageError
threads, artifact = int(sys.argv[1]), sys.argv[2]
before = len(os.listdir("/proc/self/task"))
assert use_threads(threads) == threads
program = Program.open(artifact)
logits = program.forward(list(range(64)), 0, 64)
assert len(os.listdir("/proc/self/task")) - before == threads - 1, "threads that the pool did not count"
assert use_threads(threads) == threads
try:
    use_threads(threads + 1)
    raise AssertionError("changed under an open program")
except UsageError as error:
    assert "a program is open" in str(error)
assert use_threads() == threads
print(hashlib.sha256(logits.numpy().tobytes()).hexdigest())
"""
OWN_CHOICE = (
    "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import runtime; print(runtime.use_threads())"
)


def printed(code: str, *arguments: object, **environment: str) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "what the runtime says of its threads is for nobody"
    return done.stdout.strip()


def test_threads_are_set_and_change_no_bit(build: Build) -> None:
    artifact = build("gqa2", "int4_xnnpack")
    assert len({printed(SET, threads, artifact) for threads in (1, 3)}) == 1


def test_by_itself_it_takes_no_more_than_there_are_processors_for_it() -> None:
    """torch's threads, which OMP_NUM_THREADS sets, are others."""
    assert printed(OWN_CHOICE, OMP_NUM_THREADS="3") == "1"


QUOTA, PERIOD = "cpu.cfs_quota_us", "cpu.cfs_period_us"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/\n", {"cpu.max": "250000 100000"}, 3),
        ("0::/\n", {"cpu.max": "max 100000"}, 64),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ("0::/docker/123\n", {"cpu.max": "400000 100000"}, 4),  # a name of the host
        (
            "4:cpu,cpuacct:/\n0::/\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "150000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            2,
        ),
        ("1:cpu:/\n2:memory:/x\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ("9:cpuset:/\n0::/\n", {"cpu.max": "garbage"}, 64),
        (None, {}, 64),
    ],
)
def test_processors_that_are_left(
    groups: str | None, files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What control groups of both versions say, inside and outside of containers."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    if groups is not None:
        (tmp_path / "proc" / "self").mkdir(parents=True)
        (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    for name, content in files.items():
        file = tmp_path / "sys" / "fs" / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")
    assert available(tmp_path) == expected
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    assert available(tmp_path) == 1


def test_bench_and_the_manifest_say_how_many(pipeline: Pipeline, build: Build, tmp_path: Path) -> None:
    artifact, file = build("gqa2", "int4_xnnpack"), tmp_path / "bench.json"
    options = ["lengths=[1]", "new_tokens=0", "prompt_len=1", "repeats=1", f"output={file}"]
    code, out, _ = pipeline("bench", f"artifact={artifact}", "threads=3", *options)
    assert (code, json.loads(file.read_text())["threads"]) == (0, 3)
    assert "3 threads" in out
    its_own = min(thread_count(), available())
    for machine in (
        read_manifest(artifact)["run"]["machine"],
        json.loads((artifact / "report.json").read_text())["machine"],
    ):
        assert (machine["threads"], machine["available"]) == (its_own, available())


def test_commands_set_them(pipeline: Pipeline, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    # Before `replay` is replaced, which a build runs.
    artifact = f"artifact={build('dream_sudoku', 'int4_xnnpack')}"
    given: list[int | None] = []

    def replay(*_: Any, threads: int | None = None, **__: Any) -> None:
        given.append(threads)
        raise ProgramError("enough")

    monkeypatch.setattr(judge, "replay", replay)
    monkeypatch.setattr(text, "use_threads", given.append)
    many = available() + 1
    for command in (["validate", artifact], ["generate", artifact, "prompt=1"], ["evaluate", artifact, "n=1"]):
        for threads in (many, None):
            _, _, err = pipeline(*command, f"threads={'null' if threads is None else threads}")
            assert given.pop() == threads
            assert (f"warning: threads {many}: this process may use {available()} processor" in err) == bool(threads)
    for name in ("validate", "generate", "evaluate", "bench"):
        for threads in (0, 10**9):
            code, out, err = pipeline(name, artifact, f"threads={threads}")
            assert (code, out, err) == (2, "", f"error: threads {threads}: must be from 1 to 1024\n")
    assert given == []
