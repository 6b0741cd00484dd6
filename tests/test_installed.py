"""The package as a user has it: made into a wheel and installed, with nothing of this checkout beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from evidence.provenance import source_digest
from pipeline.__main__ import HELP
from pipeline.config import ROOMS, source_files
from runtime.artifact import PROVENANCE_FILE
from tests.checkpoints import GOLDEN, ROOT, Build

Run = Callable[..., str]  # (words of a command) -> what it printed
# What pip asks of a project to make its distributions, here without a network.
MAKE = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
PACKAGED = (*ROOMS, "runtime_tests", "serving", "assets")


def environment(path: Path | None = None) -> dict[str, str]:
    """Ours without what leads to this checkout; path: a folder of programs that come first."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "VIRTUAL_ENV"))}
    return kept | ({} if path is None else {"PATH": f"{path}:{kept['PATH']}"})


def make(what: str, source: Path, folder: Path) -> Path:
    """what: "build_wheel" or "build_sdist"."""
    command = [sys.executable, "-c", MAKE, what, str(folder)]
    done = subprocess.run(command, cwd=source, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="session")
def made(shared: Path) -> Path:
    """A folder with the wheel of a copy of this checkout, its sdist, and in `again` the wheel of that sdist."""
    folder = shared / "made"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            source = shared / "source"
            kept = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "artifacts", "build", "dist")
            shutil.copytree(ROOT, source, ignore=kept)
            left = source / "build" / "lib" / "pipeline" / "left.py"  # by a build of another day
            left.parent.mkdir(parents=True)
            left.touch()
            (folder / "again").mkdir(parents=True)
            with tarfile.open(make("build_sdist", source, folder)) as sdist:
                sdist.extractall(shared / "unpacked", filter="data")
            make("build_wheel", source, folder)
            make("build_wheel", next((shared / "unpacked").iterdir()), folder / "again")
    return folder


@pytest.fixture(scope="session")
def programs(made: Path, shared: Path) -> Path:
    """The `bin` of a virtual environment that has the wheel; all that it needs comes from the environment of the tests.

    A `.pth` file adds that one as a folder, so the checkout that is installed there in place is not found.
    """
    venv = shared / "venv"
    with FileLock(f"{venv}.lock"):
        if not venv.exists():
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
            pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python")]
            options = ["--quiet", "--no-index", "--no-deps", "--no-compile"]
            subprocess.run([*pip, "install", *options, *made.glob("*.whl")], env=environment(), check=True)
            packages = venv / "lib" / "python3.11" / "site-packages"
            (packages / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv / "bin"


@pytest.fixture
def run(programs: Path, tmp_path: Path) -> Run:
    """In an empty folder, as somebody who has installed DreamEdge."""

    def run(*words: str | Path) -> str:
        done = subprocess.run(
            words, cwd=tmp_path, env=environment(programs), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_sdist_holds_what_the_wheel_needs(made: Path) -> None:
    (wheel,), (again,), (sdist,) = made.glob("*.whl"), made.glob("again/*.whl"), made.glob("*.tar.gz")
    assert contents(wheel) == contents(again)
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert not [name for name in names if name.startswith(("tests/", "scripts/"))]
    assert {"LICENSE", "README.md", "constraints.txt", "conf/run.yaml", "assets/tasks/sudoku.py"} <= set(names)


def test_the_wheel_holds_the_rooms_and_no_more(made: Path) -> None:
    (wheel,) = made.glob("*.whl")
    names = {name for name in contents(wheel) if ".dist-info/" not in name}
    in_package = {"conf": "pipeline/conf", "assets": "pipeline/assets"}
    expected = set()
    for room in PACKAGED:
        for file in (ROOT / room).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                expected.add(f"{in_package.get(room, room)}/{file.relative_to(ROOT / room).as_posix()}")
    assert names == expected


def test_the_commands_are_those_of_the_checkout(run: Run, programs: Path) -> None:
    home = programs.parent.resolve()
    where = run("python", "-c", "import pipeline; print(pipeline.__file__)")
    assert Path(where.strip()).resolve().is_relative_to(home)
    for program in (["dreamedge"], ["python", "-m", "pipeline"]):
        assert run(*program, "--help") == HELP
    job = run("dreamedge", "run", "--cfg", "job", "--resolve")
    (checkpoint,) = (line for line in job.splitlines() if line.startswith("checkpoint:"))
    assert Path(checkpoint.partition(": ")[2]).resolve().is_relative_to(home)


def test_recipes_are_listed(run: Run, pipeline: Callable[..., tuple[int, str, str]]) -> None:
    assert run("dreamedge", "recipes") == pipeline("recipes")[1]


def test_bash_completes(run: Run) -> None:
    script = """
        eval "$(dreamedge --shell-completion install=bash)"
        COMP_LINE="dreamedge run recipe=int8" COMP_POINT=25 COMP_WORDS=($COMP_LINE) COMP_CWORD=2
        hydra_bash_completion
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    assert run("bash", "-c", script).split() == ["recipe=int8_xnnpack"]


def test_an_artifact_is_made_and_judged(run: Run, tmp_path: Path) -> None:
    """Among folders of the user's that have the names of rooms, and with code of his in them."""
    for name in PACKAGED:
        if name not in ("pipeline", "runtime_tests"):  # those he names himself, for Python and pytest to look for
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("raise SystemExit('this is not DreamEdge')\n")
    shutil.copytree(GOLDEN / "gqa2", tmp_path / "gqa2")
    settings = ["recipe=fp32_xnnpack", "task=none", "export.max_seq_len=64", "validation.n_prompts=8"]
    run("dreamedge", "run", "checkpoint=gqa2", "output=made", *settings)
    made_of = json.loads((tmp_path / "made" / PROVENANCE_FILE).read_text())["predicate"]["buildDefinition"]
    (code,) = (entry for entry in made_of["resolvedDependencies"] if entry["name"] == "dreamedge")
    assert code["digest"]["sha256"] == source_digest(source_files())
    assert "fp32_xnnpack" in run("python", "-m", "pipeline", "inspect", "artifact=made")
    run("python", "-m", "pipeline", "validate", "artifact=made")
    run("python", "-m", "pytest", "--pyargs", "runtime_tests", "--artifact", "made")


def test_text_is_written(run: Run, build: Build) -> None:
    artifact = build("dream_sudoku", "int4_xnnpack")
    written = run("dreamedge", "generate", f"artifact={artifact}", "prompt=1003\n0300\n3210\n4132", "threshold=0.9")
    assert written == "1423\n2341\n3214\n4132\n"
