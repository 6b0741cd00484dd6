"""Packed weights in a file: the same logits, and really from there."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pipeline.config import ROOT
from runtime import packed
from runtime.program import Program, ProgramError
from tests.checkpoints import Build

Pipeline = Callable[..., tuple[int, str, str]]
TOKENS = list(range(5, 13))
# A process of its own: one keeps the packed weights of one program.
OPEN = """
import sys, torch
from runtime.program import Program
artifact, folder, output = sys.argv[1:]
program = Program.open(artifact, folder)
again = Program.open(artifact, folder)
logits = [p.forward(list(range(5, 13)), 0, 8) for p in (program, again)]
assert torch.equal(*logits)
torch.save(logits[0], output)
"""


def opened(artifact: Path, folder: Path, tmp_path: Path) -> Tensor:
    """Logits of a new process that keeps its packed weights."""
    output = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", OPEN, artifact, folder, output], cwd=ROOT, check=True)
    logits: Tensor = torch.load(output)
    return logits


@pytest.mark.parametrize(
    "recipe", ["int4_xnnpack", "int4_fast_xnnpack", "int8_xnnpack", "fp16_xnnpack", "fp32_xnnpack"]
)
def test_a_program_opens_with_the_weights_that_were_packed_before(recipe: str, build: Build, tmp_path: Path) -> None:
    artifact, folder = build("gqa2", recipe), tmp_path / "packed"
    expected = Program.open(artifact).forward(TOKENS, 0, 8)
    assert torch.equal(opened(artifact, folder, tmp_path), expected)
    (file,) = folder.iterdir()
    before = file.stat()
    assert torch.equal(opened(artifact, folder, tmp_path), expected)
    assert list(folder.iterdir()) == [file]
    assert (file.stat().st_mtime_ns, file.stat().st_size) == (before.st_mtime_ns, before.st_size)
    assert file.stat().st_size < 2 * (artifact / "model.pte").stat().st_size, "more than the room that is asked for"

    content = bytearray(file.read_bytes())
    for i in range(len(content) // 2):
        content[i] ^= 1  # which leaves floats finite
    file.write_bytes(content)
    assert not torch.equal(opened(artifact, folder, tmp_path), expected), "the file is not what it computes with"

    file.write_bytes(content[: len(content) // 2])
    assert torch.equal(opened(artifact, folder, tmp_path), expected), "an incomplete file was taken"
    assert packed._complete(file)


def test_what_a_killed_process_left_is_not_taken(build: Build, tmp_path: Path) -> None:
    artifact, folder = build("gqa2", "int4_xnnpack"), tmp_path / "packed"
    # It dies where all is packed, and the file is to get its name.
    killed = "import os; from pathlib import Path; Path.replace = lambda *_: os.kill(os.getpid(), 9)" + OPEN
    process = subprocess.run([sys.executable, "-c", killed, artifact, folder, tmp_path / "logits.pt"], cwd=ROOT)
    assert process.returncode == -9
    assert all(file.name.endswith(".partial") for file in folder.iterdir())
    assert torch.equal(opened(artifact, folder, tmp_path), Program.open(artifact).forward(TOKENS, 0, 8))


def test_programs_have_files_of_their_own(build: Build) -> None:
    artifacts = [build("gqa2", recipe) / "model.pte" for recipe in ("int4_xnnpack", "int8_xnnpack")]
    artifacts.append(build("mqa4-sharded", "int4_xnnpack") / "model.pte")
    assert len({packed.identity(file) for file in artifacts}) == 3


def test_what_cannot_be_kept_is_said(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = build("gqa2", "int4_xnnpack")
    (tmp_path / "file").write_text("")
    with pytest.raises(ProgramError, match=r"file: packed weights cannot be kept there"):
        Program.open(artifact, tmp_path / "file")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(ProgramError, match=r"packed weights may take \d+ MiB, 0 are free"):
        Program.open(artifact, tmp_path / "folder")
    monkeypatch.setattr(packed, "_used", tmp_path / "other.packed")
    with pytest.raises(ProgramError, match=r"already keeps the packed weights of another program"):
        Program.open(artifact, tmp_path / "folder")
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.6.0")
    with pytest.raises(ProgramError, match=r"by executorch 1\.5\.1, this is 1\.6\.0"):
        Program.open(artifact, tmp_path / "folder")


def test_commands_keep_them(pipeline: Pipeline, build: Build, tmp_path: Path) -> None:
    artifact = build("gqa2", "int4_xnnpack")
    options = ["lengths=[1]", "new_tokens=0", "prompt_len=1", "repeats=1", f"packed_cache={tmp_path / 'packed'}"]
    code, _, err = pipeline("bench", f"artifact={artifact}", *options)
    assert code == 0, err
    assert [file.suffix for file in (tmp_path / "packed").iterdir()] == [".packed"]
    command = [sys.executable, "-m", "pipeline", "generate", "prompt=12", "max_new_tokens=4"]
    sudoku = build("dream_sudoku", "int4_xnnpack")
    kept = f"packed_cache={tmp_path / 'kept'}"
    answers = [
        subprocess.run([*command, f"artifact={sudoku}", *more], cwd=ROOT, check=True, capture_output=True).stdout
        for more in ([], [kept], [kept])
    ]
    assert answers[0] == answers[1] == answers[2]
    assert [file.suffix for file in (tmp_path / "kept").iterdir()] == [".packed"]
