"""Packed weights in a file: the same logits, and really from there."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import ROOT
from pipeline.pack import pack
from runtime import packed
from runtime.delegates import matrices, named_data
from runtime.errors import OutputError
from runtime.program import Program, ProgramError
from tests.checkpoints import Build
from validation.format import read_format

Pipeline = Callable[..., tuple[int, str, str]]
TOKENS = list(range(5, 13))
# A process for each program: one keeps the packed weights of one. They are copies of one that has imported torch.
OPEN = """
import os, sys, torch
from runtime.program import Program, executorch_runtime
executorch_runtime()
for line in sys.stdin:
    if (child := os.fork()) == 0:
        artifact, folder, output = line.split()
        logits = [Program.open(artifact, folder).forward(list(range(5, 13)), 0, 8) for _ in range(2)]
        assert torch.equal(*logits)
        torch.save(logits[0], output)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""
Opened = Callable[[Path, Path], Tensor]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """opened(artifact, folder): logits of a new process that keeps its packed weights."""
    output = tmp_path_factory.mktemp("opened") / "logits.pt"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", OPEN], cwd=ROOT, **pipes) as process:
        asks, answers = process.stdin, process.stdout
        assert asks is not None
        assert answers is not None

        def open_(artifact: Path, folder: Path) -> Tensor:
            asks.write(f"{artifact} {folder} {output}\n")
            asks.flush()
            assert answers.readline() == "0\n"
            logits: Tensor = torch.load(output)
            return logits

        yield open_
        asks.close()


@pytest.mark.parametrize("recipe", ["int4_xnnpack", "int8_xnnpack", "fp16_xnnpack", "fp32_xnnpack"])
def test_a_program_opens_with_the_weights_that_were_packed_before(
    recipe: str, build: Build, opened: Opened, tmp_path: Path
) -> None:
    artifact, folder = build("gqa2", recipe), tmp_path / "packed"
    expected = Program.open(artifact).forward(TOKENS, 0, 8)
    assert torch.equal(opened(artifact, folder), expected)
    (file,) = folder.iterdir()
    before = file.stat()
    assert torch.equal(opened(artifact, folder), expected)
    assert list(folder.iterdir()) == [file]
    assert (file.stat().st_mtime_ns, file.stat().st_size) == (before.st_mtime_ns, before.st_size)
    assert file.stat().st_size < 2 * (artifact / "model.pte").stat().st_size, "more than the room that is asked for"

    content = bytearray(file.read_bytes())
    for i in range(len(content) // 2):
        content[i] ^= 1  # which leaves floats finite
    file.write_bytes(content)
    assert not torch.equal(opened(artifact, folder), expected), "the file is not what it computes with"

    file.write_bytes(content[: len(content) // 2])
    assert torch.equal(opened(artifact, folder), expected), "an incomplete file was taken"
    assert packed._complete(file)


GATE, DOWN = (160, 64), (64, 160)  # of gqa2


def uses(pte: Path) -> list[tuple[tuple[int, ...], list[bytes]]]:
    """Shape of each matrix, in the program's order, and the names of its weights and scales."""
    data = pte.read_bytes()
    names: dict[object, bytes] = {segment: name.encode() for name, segment in named_data(data).items()}
    found = []
    for matrix in matrices(data):
        scales = [part[-1] for part in matrix.packed_by if isinstance(part, tuple) and part]
        found.append((matrix.shape, [names[place] for place in (matrix.name[0], *scales)]))
    return found


def with_other_constants(pte: Path, swapped: dict[bytes, bytes], output: Path) -> Path:
    """The program, but its delegates use other constants of it: those are in the file as before."""
    content = pte.read_bytes()
    header = int.from_bytes(content[16:24], "little")
    pattern = re.compile(b"|".join(swapped))
    output.write_bytes(content[:header] + pattern.sub(lambda found: swapped[found[0]], content[header:]))
    return output


@pytest.mark.parametrize("recipe", ["int4_xnnpack", "int4_fast_xnnpack", "int8_xnnpack", "fp32_xnnpack"])
def test_matrices_that_the_runtime_takes_for_one_are_refused(recipe: str, build: Build, tmp_path: Path) -> None:
    """It keeps what it packed by the names of the numbers alone: the scales of one were the other's, silently."""
    pte = build("gqa2", recipe) / "model.pte"
    gate, _, other, _ = (names for shape, names in uses(pte) if shape == GATE)
    if recipe == "fp32_xnnpack":  # no scales: of another shape
        other = next(names for shape, names in uses(pte) if shape == DOWN)
    same = with_other_constants(pte, {other[0]: gate[0]}, tmp_path / "model.pte")
    assert Program.open(same).forward(TOKENS, 0, 8).isfinite().all()
    with pytest.raises(ProgramError, match=r"model\.pte: .* the same numbers but other scales or shapes") as raised:
        Program.open(same, tmp_path / "packed")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "packed").exists()


def test_equal_matrices_share_what_is_packed(build: Build, opened: Opened, tmp_path: Path) -> None:
    pte = build("gqa2", "int4_xnnpack") / "model.pte"
    gate, _, other, _ = (names for shape, names in uses(pte) if shape == GATE)
    same = with_other_constants(pte, dict(zip(other, gate, strict=True)), tmp_path / "same.pte")
    assert torch.equal(opened(same, tmp_path / "packed"), Program.open(same).forward(TOKENS, 0, 8))


def test_a_program_is_known_by_which_scales_a_matrix_has(build: Build, tmp_path: Path) -> None:
    """Two matrices that have each other's scales: the header and all constants are the same."""
    pte = build("gqa2", "int4_xnnpack") / "model.pte"
    one, _, other, _ = (names[1] for shape, names in uses(pte) if shape == GATE)
    exchanged = with_other_constants(pte, {one: other, other: one}, tmp_path / "exchanged.pte")
    assert packed.identity(exchanged) != packed.identity(pte)
    # With other names nobody knows whether the constants are still the same.
    (tmp_path / "named.pte").write_bytes(pte.read_bytes().replace(one, b"layers.0".ljust(len(one), b"_")))
    with pytest.raises(packed.PackedError, match="does not name a constant by its sha256"):
        packed.identity(tmp_path / "named.pte")


def test_a_damaged_delegate_is_one_line(build: Build, tmp_path: Path) -> None:
    content = (build("gqa2", "int4_xnnpack") / "model.pte").read_bytes()
    delegate = content.index(b"XH00")
    for wrong in (b"XH01", b"XH00" + b"\xff" * 40):
        (tmp_path / "model.pte").write_bytes(content[:delegate] + wrong + content[delegate + len(wrong) :])
        with pytest.raises(packed.PackedError, match=r"model\.pte: damaged: "):
            packed.identity(tmp_path / "model.pte")


def test_the_matrices_of_a_program_are_those_that_executorch_reads(build: Build) -> None:
    pte = build("gqa2", "int4_xnnpack") / "model.pte"
    assert [shape for shape, _ in uses(pte)] == [linear.shape for linear in read_format(pte).linears]


def test_what_a_killed_process_left_is_not_taken(build: Build, opened: Opened, tmp_path: Path) -> None:
    artifact, folder = build("gqa2", "int4_xnnpack"), tmp_path / "packed"
    # It dies where all is packed, and the file is to get its name.
    killed = "import os; from pathlib import Path; Path.replace = lambda *_: os.kill(os.getpid(), 9)\n"
    killed += f"from runtime.program import Program; Program.open({str(artifact)!r}, {str(folder)!r})"
    process = subprocess.run([sys.executable, "-c", killed], cwd=ROOT)
    assert process.returncode == -9
    assert all(file.name.endswith(".partial") for file in folder.iterdir())
    assert torch.equal(opened(artifact, folder), Program.open(artifact).forward(TOKENS, 0, 8))
    assert [file.suffix for file in folder.iterdir()] == [".packed"]


def test_changed_constants_are_never_kept(build: Build, tmp_path: Path) -> None:
    """The program is known by their names: a right one would get what was packed of them."""
    content = bytearray((build("gqa2", "int4_xnnpack") / "model.pte").read_bytes())
    content[-len(content) // 3] ^= 1
    (tmp_path / "model.pte").write_bytes(content)
    with pytest.raises(ProgramError, match=r"model\.pte: damaged: its constant \w+ is not what it was made with"):
        Program.open(tmp_path / "model.pte", tmp_path / "packed")
    assert list((tmp_path / "packed").iterdir()) == []


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


def test_packed_ahead(build: Build, tmp_path: Path) -> None:
    artifact = build("gqa2", "int4_xnnpack")
    before = sorted(file.name for file in artifact.iterdir())
    pack(artifact, tmp_path / "packed")
    (file,) = (tmp_path / "packed").iterdir()
    made = file.stat().st_mtime_ns
    pack(artifact, tmp_path / "packed")
    assert [f.stat().st_mtime_ns for f in (tmp_path / "packed").iterdir()] == [made]
    assert sorted(file.name for file in artifact.iterdir()) == before
    with pytest.raises(OutputError, match=r"whole, but its weights are not packed: .*cannot be kept there"):
        pack(artifact, artifact / "model.pte")


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
