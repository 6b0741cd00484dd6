"""What the tests share: checkpoints, and artifacts that are built once in a run."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from pipeline.__main__ import main
from runtime.limits import alone_in_a_copy
from runtime.memory import collect_seldom
from tests.checkpoints import ROOT, Build, arguments

os.register_at_fork(after_in_child=alone_in_a_copy)

if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker has one core to itself, and so have the processes that it starts, unless somebody tries more threads.
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    # What is freed is taken again, not given back and asked for anew: a tenth of a build's time.
    collect_seldom()
    ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD of mallopt(3), at its most


# What takes minutes comes first, so that both workers end together (`make test` lets an idle one steal).
LONG = (
    "fullsize", "survival", "road", "explain", "lowering", "stored", "evidence", "docs", "installed", "cli",
    "export_model",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return LONG.index(name) if name in LONG else len(LONG)

    items.sort(key=rank)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the workers of one run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def build(shared: Path) -> Build:
    """build(checkpoint name, recipe): an artifact by `python -m pipeline run`, made once. Do not change it."""
    folder = shared / "artifacts"
    folder.mkdir(exist_ok=True)

    def make(checkpoint: str, recipe: str) -> Path:
        output = folder / f"{checkpoint}-{recipe}"
        with FileLock(f"{output}.lock"):
            if not output.exists():
                paths = [f"output={output}", f"cache={folder / 'cache'}"]
                assert main(["run", f"recipe={recipe}", *paths, *arguments(checkpoint, recipe)]) == 0
        return output

    return make


@pytest.fixture(scope="session")
def native() -> Callable[..., Path]:
    """native(processor): `dreamedge-run` built for it, once; what is there and has not changed is not built again."""

    def made(processor: str = platform.machine()) -> Path:
        make("runner", f"ARCH={processor}")
        return ROOT / "build" / f"runner-{processor}" / "dreamedge-run"

    return made


@pytest.fixture(scope="session")
def check() -> Path:
    """`dreamedge-check`: the parts of the runner that read foreign bytes, under sanitizers."""
    make("runner-check")
    return ROOT / "build" / "runner-check" / "dreamedge-check"


def make(*words: str) -> None:
    (ROOT / "build").mkdir(exist_ok=True)
    with FileLock(ROOT / "build" / f"{'-'.join(words)}.lock"):
        # The environment is there: it runs this.
        command = ["make", "-o", ".venv/.ready", *words, "JOBS=1"]
        made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert made.returncode == 0, made.stdout + made.stderr


@pytest.fixture
def artifact(build: Build, tmp_path: Path) -> Path:
    """A copy of a float32 artifact of gqa2, to be damaged."""
    folder = tmp_path / "artifact"
    shutil.copytree(build("gqa2", "fp32_xnnpack"), folder)
    return folder


@pytest.fixture
def pipeline(
    capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[int, str, str]]:
    """Runs `python -m pipeline` in this process: (exit code, stdout, stderr)."""
    cache = tmp_path_factory.mktemp("cache")

    def run(*arguments: str) -> tuple[int, str, str]:
        if arguments[:1] == ("run",) and not any(argument.startswith("cache=") for argument in arguments):
            arguments = (*arguments, f"cache={cache}")
        capsys.readouterr()
        exit_code = main(list(arguments))
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return exit_code, captured.out, captured.err

    return run
