"""The rooms of the house: who imports whom, how long a file is, and that each room says what it is for."""

from __future__ import annotations

import ast
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import ROOT, Build

# What each room may import of the others.
ALLOWED = {
    "model": set[str](),
    "runtime": set[str](),
    "recipes": {"model"},
    "validation": {"model", "recipes", "runtime"},
    "evidence": {"recipes", "runtime", "validation"},
    "report": {"recipes", "runtime", "validation"},
    "serving": {"runtime"},
    "pipeline": {"model", "recipes", "runtime", "validation", "evidence", "report", "serving"},
    "runtime_tests": {"runtime", "validation"},
}
LONGEST = 300  # lines of a file
LONGER = {"runtime/generation.py": "one algorithm, read from top to bottom"}

# What makes programs, and no judge needs: reading one back takes executorch's schema alone.
EXPORTER = (
    *(f"recipes.{name}" for name in ("exporter", "lowering", "static_program", "xnnpack")),
    *(f"executorch.exir.{name}" for name in ("program", "dialects", "emit", "backend.backend_api")),
    "executorch.backends.xnnpack",
)


def files_of(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(file: Path) -> Iterator[str]:
    """The modules that a file names anywhere, also inside functions and for types alone."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_go_one_way(room: str) -> None:
    found: dict[str, str] = {}
    for file in files_of(room):
        others = {name.partition(".")[0] for name in imports(file)} & (ALLOWED.keys() | {"tests", "scripts"}) - {room}
        found |= {other: str(file.relative_to(ROOT)) for other in others}
    assert {other: file for other, file in found.items() if other not in ALLOWED[room]} == {}
    assert found.keys() == ALLOWED[room], "what is allowed is what is needed"


def test_what_calibration_goes_by_is_in_the_name_of_its_weights() -> None:
    """All of validation that it computes with, but for what a call is, how far it is, and how near a tie.

    Of how many tokens is noted besides.
    """
    from pipeline.quantize import READERS

    known = {module.__name__ for module in READERS}
    used = {name for part in known for name in imports(ROOT / f"{part.replace('.', '/')}.py")}
    rooms = {".".join(name.split(".")[:2]) for name in used if name.startswith("validation.")}
    others = {f"validation.{name}" for name in ("effort", "progress", "reference", "ties")}
    assert rooms - others <= known


def test_no_stage_imports_a_command() -> None:
    """Commands stand on the stages, and the command line on them."""
    for file in (ROOT / "pipeline").glob("*.py"):
        named = {name for name in imports(file) if name.startswith("pipeline.commands")}
        assert not named or file.name == "cli.py", file.name


def test_judging_takes_no_exporter(build: Build) -> None:
    code = f"""
import importlib, json, pkgutil, sys, validation
for module in pkgutil.iter_modules(validation.__path__):
    importlib.import_module(f"validation.{{module.name}}")
from pathlib import Path
from validation.judge import check_artifact
figures = check_artifact(Path({str(build("gqa2", "fp32_xnnpack"))!r})).figures
print(json.dumps([len(figures), all(figure.ok for figure in figures), sorted(sys.modules)]))
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    n, ok, modules = json.loads(child.stdout.splitlines()[-1])
    assert n > 5
    assert ok
    assert [name for name in modules if name.startswith(EXPORTER)] == []


def test_what_is_done_with_an_artifact_takes_no_torch(build: Build, tmp_path: Path) -> None:
    """It takes a second to import: `verify` and the like answer before."""
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(tmp_path / "key.pem")], check=True)
    public = ["openssl", "pkey", "-in", str(tmp_path / "key.pem"), "-pubout", "-out", str(tmp_path / "key.pub.pem")]
    subprocess.run(public, check=True)
    artifact, kept = tmp_path / "artifact", f"registry={tmp_path / 'kept'}"
    shutil.copytree(build("gqa2", "fp32_xnnpack"), artifact)
    commands = [
        ["sign", f"artifact={artifact}", f"key={tmp_path / 'key.pem'}"],
        ["verify", f"artifact={artifact}", f"key={tmp_path / 'key.pub.pem'}"],
        ["compare", str(artifact), str(artifact), f"html={tmp_path / 'compare.html'}"],
        ["release", str(artifact), f"notes={tmp_path / 'notes.md'}"],
        ["publish", str(artifact), kept],
        ["fetch", "artifact", kept, f"output={tmp_path / 'fetched'}"],
        ["inspect", f"artifact={artifact}"],
        ["recipes"],
        ["clean", f"cache={tmp_path / 'cache'}"],
    ]
    code = (
        "import json, sys; from pipeline.__main__ import main\n"
        "codes = [main(command) for command in json.loads(sys.argv[1])]\n"
        'sys.exit(f\'{codes} {sys.modules.keys() & {"torch", "numpy"}}\')'
    )
    words = [sys.executable, "-c", code, json.dumps(commands)]
    child = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.stderr == f"{[0] * len(commands)} set()\n"


def test_files_are_short() -> None:
    longer = {}
    for room in ALLOWED:
        for file in files_of(room):
            n = len(file.read_text().splitlines())
            if n > LONGEST:
                longer[str(file.relative_to(ROOT))] = n
    assert longer.keys() == LONGER.keys()
    native = [file for pattern in ("*.cpp", "*.h") for file in (ROOT / "runner").rglob(pattern)]
    assert native
    assert [file.name for file in native if len(file.read_text().splitlines()) > LONGEST] == []


@pytest.mark.parametrize("room", ALLOWED)
def test_each_room_says_what_it_is_for(room: str) -> None:
    said = importlib.import_module(room).__doc__ or ""
    assert len([line for line in said.splitlines() if line.strip()]) == 2
    table = (ROOT / "CONTRIBUTING.md").read_text()
    assert f"| `{room}/` |" in table
