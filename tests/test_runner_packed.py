"""The native runner's packed weights: the same tokens, really from the file, and never one matrix for another."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from tests.checkpoints import Build
from tests.fuzz import REFUSED, TAKEN, damage
from tests.test_packed import DOWN, GATE, uses, with_other_constants
from tests.test_runner import EMULATED, Native, Run, command, refused, run
from tests.test_runner_tokenizer import files

__all__ = ["run"]  # the fixture
ASKED = ("ids=11,205,7", "max_new_tokens=8", "temperature=0")


def kept(folder: Path) -> Path:
    (file,) = folder.iterdir()
    assert file.suffix == ".packed"
    return file


@pytest.mark.parametrize("recipe", ["int4_xnnpack", "int8_xnnpack", "fp16_xnnpack", "fp32_xnnpack"])
def test_a_program_opens_with_the_weights_that_were_packed_before(
    recipe: str, build: Build, run: Run, tmp_path: Path
) -> None:
    artifact, folder = build("gqa2", recipe), tmp_path / "packed"
    cached = (*ASKED, f"artifact={artifact}", f"packed_cache={folder}")
    expected = run(*ASKED, f"artifact={artifact}")
    assert expected[0] == 0
    assert run(*cached) == expected
    file = kept(folder)
    before = file.stat()
    assert run(*cached) == expected
    assert kept(folder).stat().st_mtime_ns == before.st_mtime_ns

    content = bytearray(file.read_bytes())
    for i in range(len(content) // 2):
        content[i] ^= 1  # which leaves floats finite
    file.write_bytes(content)
    assert run(*cached)[1] != expected[1], "the file is not what it computes with"
    file.write_bytes(content[: len(content) // 2])
    assert run(*cached) == expected, "an incomplete file was taken"
    assert kept(folder).stat().st_size == before.st_size


@pytest.mark.parametrize("recipe", ["int4_xnnpack", "int4_fast_xnnpack", "int8_xnnpack", "fp32_xnnpack"])
def test_matrices_that_the_runtime_takes_for_one_are_refused(
    recipe: str, build: Build, run: Run, tmp_path: Path
) -> None:
    pte = build("gqa2", recipe) / "model.pte"
    gate, _, other, _ = (names for shape, names in uses(pte) if shape == GATE)
    if recipe == "fp32_xnnpack":  # no scales: of another shape
        other = next(names for shape, names in uses(pte) if shape == DOWN)
    same = with_other_constants(pte, {other[0]: gate[0]}, tmp_path / "same.pte")
    assert run(*ASKED, f"artifact={same}")[0] == 0
    ended = run(*ASKED, f"artifact={same}", f"packed_cache={tmp_path / 'packed'}")
    refused(ended, 2, "same.pte: packed weights cannot be kept: ", "the same numbers but other scales or shapes")
    assert not (tmp_path / "packed").exists()


def test_a_program_is_known_by_which_scales_a_matrix_has(build: Build, run: Run, tmp_path: Path) -> None:
    """Two matrices that have each other's scales, and equal ones that share them: files of their own."""
    pte = build("gqa2", "int4_xnnpack") / "model.pte"
    gate, _, other, _ = (names for shape, names in uses(pte) if shape == GATE)
    one, two = gate[1], other[1]
    exchanged = with_other_constants(pte, {one: two, two: one}, tmp_path / "exchanged.pte")
    equal = with_other_constants(pte, dict(zip(other, gate, strict=True)), tmp_path / "equal.pte")
    for program in (pte, exchanged, equal):
        plain = run(*ASKED, f"artifact={program}")
        assert run(*ASKED, f"artifact={program}", f"packed_cache={tmp_path / 'packed'}") == plain
    assert len(list((tmp_path / "packed").iterdir())) == 3
    (tmp_path / "named.pte").write_bytes(pte.read_bytes().replace(one, b"layers.0".ljust(len(one), b"_")))
    ended = run(*ASKED, f"artifact={tmp_path / 'named.pte'}", f"packed_cache={tmp_path / 'other'}")
    refused(ended, 2, "a constant is not named by its sha256")


def test_what_cannot_be_kept_is_said(build: Build, run: Run, tmp_path: Path) -> None:
    artifact = build("gqa2", "int4_xnnpack")
    (tmp_path / "file").write_text("")
    ended = run(*ASKED, f"artifact={artifact}", f"packed_cache={tmp_path / 'file'}")
    refused(ended, 7, "file: packed weights cannot be kept there")
    refused(run(*ASKED, f"artifact={artifact}", "packed_cache="), 2, "packed_cache: give a folder")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    ended = run(*ASKED, f"artifact={artifact}", f"packed_cache={tmp_path / 'loop'}")
    refused(ended, 7, "loop: packed weights cannot be kept there")
    assert run(*ASKED, f"artifact={artifact}", f"packed_cache={tmp_path / 'folder'}")[0] == 0
    file = kept(tmp_path / "folder")
    file.unlink()
    file.mkdir()
    ended = run(*ASKED, f"artifact={artifact}", f"packed_cache={tmp_path / 'folder'}")
    refused(ended, 7, f"{file.name} is no file")
    deep = tmp_path.joinpath(*["a" * 100] * 3)
    refused(run(*ASKED, f"artifact={artifact}", f"packed_cache={deep}"), 2, "longer than the runtime takes")
    ended = run("--self-test", f"artifact={artifact}", f"packed_cache={tmp_path}")
    refused(ended, 2, "--self-test packs the weights anew")


def test_changed_constants_are_never_kept(build: Build, run: Run, tmp_path: Path) -> None:
    """The program is known by their names: a right one would get what was packed of them."""
    program = build("gqa2", "int4_xnnpack") / "model.pte"
    content = bytearray(program.read_bytes())
    content[-len(content) // 3] ^= 1
    (tmp_path / "changed.pte").write_bytes(content)
    ended = run(*ASKED, f"artifact={tmp_path / 'changed.pte'}", f"packed_cache={tmp_path / 'packed'}")
    refused(ended, 6, "changed.pte: damaged: its constant ", "is not what it was made with")
    assert list((tmp_path / "packed").iterdir()) == []


def test_what_killed_processes_left_is_removed(build: Build, run: Run, tmp_path: Path) -> None:
    """But not what one is writing, which has a lock on it."""
    left, written, other = (tmp_path / f".{c * 32}.packed.7.partial" for c in "abc")
    for file in (left, written, other.with_name("notes.partial")):
        file.write_text("x")
    with written.open() as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        assert run(*ASKED, f"artifact={build('gqa2', 'int4_xnnpack')}", f"packed_cache={tmp_path}")[0] == 0
    names = {file.name for file in tmp_path.iterdir()}
    assert {name for name in names if name.endswith(".partial")} == {written.name, "notes.partial"}


def test_what_is_not_written_whole_is_not_kept(build: Build, native: Native, tmp_path: Path) -> None:
    limited = "trap '' XFSZ; ulimit -f 100; exec \"$@\""
    keys = (*ASKED, f"artifact={build('gqa2', 'int4_xnnpack')}", f"packed_cache={tmp_path / 'packed'}")
    refused(command("sh", "-c", limited, "sh", native(), *keys), 7, "the runtime did not write all of them")
    assert list((tmp_path / "packed").iterdir()) == []


def test_arm_keeps_them_too(build: Build, native: Native, tmp_path: Path) -> None:
    artifact = build("gqa2", "int4_xnnpack")
    asked = (*EMULATED, native("aarch64"), *ASKED, f"artifact={artifact}")
    plain = command(*asked)
    assert plain[0] == 0
    for _ in range(2):
        assert command(*asked, f"packed_cache={tmp_path / 'packed'}") == plain
    kept(tmp_path / "packed")


def test_damaged_programs_are_refused_or_read(build: Build, check: Path, tmp_path: Path) -> None:
    """Their delegates are read under sanitizers: what breaks that ends it."""
    pte = build("gqa2", "int4_xnnpack") / "model.pte"
    whole = pte.read_bytes()
    delegate = whole.index(b"XH00")
    paths = [pte]
    for seed in range(80):
        content = bytearray(damage(whole, "model.pte", seed))
        if seed % 2:  # where the reader looks: the program's tables, and a delegate's
            content = bytearray(whole)
            for i in range(8):
                content[(64, delegate)[i % 2] + 7919 * seed * (i + 1) % 6000] = (37 * seed + i) % 256
        paths.append(tmp_path / f"{seed}.pte")
        paths[-1].write_bytes(content)
    words = [line.partition(":")[0] for line in files(check, "program", *paths)]
    assert len(words) == len(paths)
    assert words[0] == TAKEN
    assert set(words) == {TAKEN, REFUSED}
