"""The native runner: every recipe's program on this processor and on Arm, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime import Program
from runtime.artifact import MANIFEST_FILE, REFERENCE_FILE, SCHEMA_VERSION
from tests.checkpoints import RECIPES, ROOT, Build
from tests.resealing import reseal
from validation.figures import fidelity, sqnr_db
from validation.logits import digest, summarize
from validation.reference import load_reference
from validation.replay import Replay

Native = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]
# Debian's libraries for Arm may be there beside those of its cross compiler: they do not go together.
QEMU = ("qemu-aarch64-static", "-cpu", "cortex-a53", "-L", "/usr/aarch64-linux-gnu", "-E")
EMULATED = (*QEMU, "LD_LIBRARY_PATH=/usr/aarch64-linux-gnu/lib")


def command(*words: object, stdin: str = "") -> tuple[int, str, str]:
    ended = subprocess.run([*map(str, words)], input=stdin, capture_output=True, text=True, timeout=120)
    return ended.returncode, ended.stdout, ended.stderr


@pytest.fixture(scope="session")
def run(native: Native) -> Run:
    """Runs `dreamedge-run`: (exit code, stdout, stderr)."""
    file = native()
    return lambda *words, stdin="": command(file, *words, stdin=stdin)


def refused(ended: tuple[int, str, str], code: int, *words: str) -> None:
    """One line, which holds these words."""
    assert ended[0] == code, ended
    assert ended[2].startswith("error: ")
    assert ended[2].count("\n") == 1
    for word in words:
        assert word in ended[2]


def test_it_needs_no_torch_and_no_python(native: Native) -> None:
    code, libraries, _ = command("ldd", native())
    assert code == 0
    assert "not found" not in libraries
    names = {line.split()[0] for line in libraries.splitlines()}
    assert "libexecutorch.so" in names
    executorchs = {name for name in names if name.startswith("libexecutorch")}
    assert not [name for name in names - executorchs if any(word in name for word in ("torch", "c10", "python"))]


@pytest.mark.skipif(platform.machine() == "aarch64", reason="this is Arm")
def test_one_for_arm_is_built_once(native: Native, tmp_path: Path) -> None:
    """And kept outside of the tree by what it is made of, so it finds its libraries from where it lies."""
    file = native("aarch64")
    asked = ["make", "-n", "-o", ".venv/.ready", "runner", "ARCH=aarch64"]
    steps = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "cmake" not in steps
    elsewhere = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    anew = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True, env=elsewhere).stdout
    assert "cmake --build build/runner-aarch64" in anew
    assert str(tmp_path / "dreamedge" / "runner-aarch64-") in anew
    assert str(ROOT).encode() not in file.read_bytes()


def test_it_reads_the_schema_that_is_written() -> None:
    header = (ROOT / "runner" / "artifact.h").read_text()
    assert f"SCHEMA_VERSION = {SCHEMA_VERSION};" in header


# ---- The self-test ----


def measured(ended: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = ended
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_gives_what_it_gives_in_python(build: Build, run: Run, recipe: str) -> None:
    """The same bits, but for `custom_sdpa`, which is a kernel of ours; and the same figures as Python's of them."""
    artifact = build("gqa2", recipe)
    said = measured(run("--self-test", "--json", f"artifact={artifact}"))
    reference, program = load_reference(artifact / REFERENCE_FILE), Program.open(artifact)
    calls = iter(said["calls"])
    logits: dict[str, list[Any]] = {}
    for sequence, expected in zip(reference.sequences, reference.expected, strict=True):
        for i, (call, asked) in enumerate(zip(sequence.calls, expected, strict=True)):
            given = program.forward(call.tokens, call.start_pos, call.kv_len, call.rows)[0]
            logits.setdefault(sequence.name, []).append(summarize(given, asked.columns))
            found = next(calls)
            assert (found["sequence"], found["call"]) == (sequence.name, i)
            assert (found["tie_margin"] or math.inf) == asked.tie_margin
            if program.metadata.use_sdpa_with_kv_cache:
                continue
            assert found["sha256"] == digest(given)
            assert math.isclose(found["sqnr_db"], sqnr_db(asked.eager, given), rel_tol=1e-9)
    assert next(calls, None) is None
    bounds = json.loads((artifact / MANIFEST_FILE).read_text())["recipe"]["bounds"]
    for figure in fidelity(reference, Replay(logits, *[None] * 11), bounds):  # type: ignore[arg-type]
        (found,) = [other for other in said["figures"] if other["name"] == figure.name]
        assert found["bound"] == figure.bound
        assert found["ok"]
        if not program.metadata.use_sdpa_with_kv_cache:
            assert math.isclose(found["value"], figure.value, rel_tol=1e-9)
            assert found["where"] == figure.where
    names = [figure["name"] for figure in said["figures"]]
    assert names[-2:] == ["wrong_metadata", "calls_that_differ"]


def test_a_figure_out_of_its_bounds_is_named(artifact: Path, run: Run) -> None:
    manifest = json.loads((artifact / MANIFEST_FILE).read_text())
    manifest["recipe"]["bounds"] |= {"fidelity_exact_db": 190.0, "fidelity_db": 190.0}
    (artifact / MANIFEST_FILE).write_text(json.dumps(manifest))
    reseal(artifact)
    reference = load_reference(artifact / REFERENCE_FILE)
    assert reference.floor_db < 190, "no bound is above what rounding allows"
    code, out, err = run("--self-test", f"artifact={artifact}")
    assert (code, err) == (0, "")
    assert f"fidelity_db {float(out.split()[1]):.6g} >= {reference.floor_db:.6g} ok" in out

    manifest["expected_format"]["metadata"]["get_mask_id"] = 7
    (artifact / MANIFEST_FILE).write_text(json.dumps(manifest))
    reseal(artifact)
    ended = run("--self-test", f"artifact={artifact}")
    refused(ended, 6, "format: wrong_metadata is 1, must be at most 0 (get_mask_id)")
    assert "wrong_metadata 1 <= 0 NOT OK (get_mask_id)" in ended[1]
    said = json.loads(run("--self-test", "--json", f"artifact={artifact}")[1])
    assert [figure["name"] for figure in said["figures"] if not figure["ok"]] == ["wrong_metadata"]


def test_a_changed_weight_is_a_figure(artifact: Path, run: Run) -> None:
    """In the last weights of the file, with digests that agree: only the calls can show it."""
    pte = artifact / "model.pte"
    content = bytearray(pte.read_bytes())
    for place in range(len(content) // 2, len(content), 1021):
        content[place] ^= 0x40
    pte.write_bytes(content)
    refused(run("--self-test", f"artifact={artifact}"), 6, "model.pte: its sha256 is not the manifest's")
    reseal(artifact)
    refused(run("--self-test", f"artifact={artifact}"), 6, "fidelity: fidelity_db is ", "must be at least")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no such artifact folder"),
    "no manifest": (lambda a: (a / MANIFEST_FILE).unlink(), f"no {MANIFEST_FILE}"),
    "manifest": (lambda a: (a / MANIFEST_FILE).write_text("{"), "not a manifest: not JSON"),
    "deep": (lambda a: (a / MANIFEST_FILE).write_text("[" * 100_000), "not a manifest: not JSON: nested too deeply"),
    "version": (lambda a: (a / MANIFEST_FILE).write_text('{"schema_version": 1}'), "schema version 1, this program"),
    "no provenance": (lambda a: (a / "provenance.json").unlink(), "provenance.json: missing"),
    "provenance": (lambda a: (a / "provenance.json").write_text("{}"), "not a provenance statement: no 'subject'"),
    "link": (lambda a: (a / "more").symlink_to(a / "model.pte"), "more: a link"),
    "gone": (lambda a: (a / REFERENCE_FILE).unlink(), "reference.safetensors: missing, the manifest names it"),
    "longer": (lambda a: (a / REFERENCE_FILE).open("ab").write(b"x"), "bytes, the manifest says"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_artifact_is_refused(artifact: Path, run: Run, case: str) -> None:
    change, said = CHANGES[case]
    change(artifact)
    refused(run("--self-test", f"artifact={artifact}"), 6, str(artifact), said)


@pytest.mark.skipif(platform.machine() == "aarch64", reason="this is Arm")
def test_on_arm(build: Build, native: Native) -> None:
    """Emulated: both bounds hold there too, for a program of integers and for our own attention in float16."""
    arm = native("aarch64")
    for recipe in ("int4_xnnpack", "fp16_xnnpack"):
        ended = command(*EMULATED, arm, "--self-test", "--json", f"artifact={build('gqa2', recipe)}")
        assert measured(ended)["processor"] == "aarch64"


# ---- Programs that it does not open ----


def test_programs_that_are_refused(artifact: Path, run: Run, tmp_path: Path) -> None:
    pte = artifact / "model.pte"
    whole = pte.read_bytes()
    for content, words in (
        (whole[:20], "not an ExecuTorch program"),
        (b"x" * 200, "not an ExecuTorch program"),
        (whole[: len(whole) // 2], "truncated: "),
        (whole[:2000] + b"\xff" * 500 + whole[2500:], "damaged, or not an ExecuTorch program"),
    ):
        pte.write_bytes(content)
        reseal(artifact)
        refused(run("--self-test", f"artifact={artifact}"), 6, words)
    pte.write_bytes(whole.replace(b"llama::update_cache", b"llama::update_cashe"))
    reseal(artifact)
    refused(run("--self-test", f"artifact={artifact}"), 6, "OperatorMissing: it needs llama::update_cashe.out")


def test_too_little_memory_is_said(build: Build, run: Run) -> None:
    """Wherever it ends: the runtime says so in many ways, and some of them are none."""
    artifact = build("gqa2", "fp32_xnnpack")
    for mib in range(1, 100):
        ended = run("--self-test", f"artifact={artifact}", f"memory={mib}", "threads=1")
        if ended[0] == 0:
            break
        refused(ended, 8, "too little memory")
    assert 1 < mib < 50


def test_wrong_commands(run: Run) -> None:
    for words, said in (
        (["artefact=x"], "no key 'artefact'; did you mean 'artifact'?"),
        (["--selftest"], "no switch '--selftest'; did you mean '--self-test'?"),
        (["x"], "'x' is no key=value"),
        (["--self-test"], "give artifact="),
        (["chat=true"], "chat: chat templates are of Python alone"),
        (["artifact=x", "memory=0"], "memory 0: are MiB"),
        (["artifact=x", "memory=much"], "memory 'much': must be a whole number"),
        (["--self-test", "artifact=x", "load=disk"], "load 'disk': there are mmap, file"),
    ):
        refused(run(*words), 2, said)
    code, out, _ = run("--help")
    assert code == 0
    assert "usage: dreamedge-run" in out
    assert "executorch 1.5.1" in run("--version")[1]
