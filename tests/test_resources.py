"""What a run needs is known before it starts, and what it keeps can be removed."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import estimate, road
from pipeline.config import load_recipe
from runtime.errors import InputError
from scripts.make_checkpoint import read_shape
from tests.checkpoints import GOLDEN, ROOT

Pipeline = Callable[..., tuple[int, str, str]]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    paths = {"checkpoint": GOLDEN / "gqa2", "output": tmp_path / "out", "cache": tmp_path / "cache"}
    return ["run", *(f"{key}={path}" for key, path in paths.items())]


@pytest.mark.parametrize(
    ("what", "said"),
    [("memory", r"MiB of memory are needed, 100 MiB are free"), ("disk", r"MiB of disk, 0.10 MiB are free")],
)
def test_too_little_is_found_before_the_work(
    what: str, said: str, pipeline: Pipeline, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "memory":
        monkeypatch.setattr(estimate, "available_memory", lambda: 100 * 2**20)
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**5))

    def started(*_: object) -> None:
        raise InputError("it started")

    monkeypatch.setattr(road, "load", started)
    code, _, err = pipeline(*arguments)
    assert code == 8
    assert said in err
    assert "force=true" in err
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    code, _, err = pipeline(*arguments, "force=true")
    assert (code, err.strip()) == (3, "error: it started")


@pytest.mark.parametrize("key", ["output", "cache"])
@pytest.mark.parametrize("place", ["/proc", "/sys", "/dev/null", "read-only"])
def test_what_cannot_be_written_is_not_a_full_disk(
    place: str, key: str, pipeline: Pipeline, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "read-only":  # root may write everywhere
        made = tempfile.mkdtemp

        def mkdtemp(dir: Path, prefix: str) -> str:
            if dir == tmp_path / "read-only":
                raise OSError(errno.EROFS, "Read-only file system")
            return made(dir=dir, prefix=prefix)

        monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
        (tmp_path / place).mkdir()
        place = str(tmp_path / place)
    code, _, err = pipeline(*arguments, f"{key}={place}/x", "force=true")
    assert code == 7
    assert err.startswith(f"error: {key} {place}/x cannot be written: nothing can be made in {place}: ")
    assert err.count("\n") == 1
    assert [path for path in tmp_path.iterdir() if path.name != "read-only"] == []


def test_the_estimate_of_a_large_model_is_shown(
    pipeline: Pipeline, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = estimate.Estimate({"load": 2**30, "export": 2**30, "lower": 9 * 2**30, "program": 2**30}, 2**32, 2**32)
    monkeypatch.setattr(road, "estimate", lambda _: needs)
    monkeypatch.setattr(estimate, "available_memory", lambda: 8 * 2**30)
    code, out, err = pipeline(*arguments)
    assert code == 8
    assert "9,216 MiB of memory are needed, 8,192 MiB are free" in err
    assert "8,192 MiB" in out  # of disk, and free


def test_the_ideal_of_dream_7b() -> None:
    """4.5 bits for a linear weight, 8 for the embedding and a float a row, floats for the rest."""
    config = read_shape(ROOT / "conf" / "shape" / "dream_7b.yaml")
    needs = estimate.of_sizes(config, 2 * 7_615_616_512, load_recipe("int4_xnnpack"), 2048, 110)
    D, F, V, L = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_hidden_layers
    kv = config.num_key_value_heads * config.head_dim
    linears = L * (2 * D * D + 2 * D * kv + 3 * D * F) + V * D
    floats = L * (D + 2 * kv + 2 * D) + D
    assert needs.output == linears * 4.5 / 8 + V * D + 4 * V + 4 * floats
    assert max(needs.memory.values()) < 6 * 2**30


def test_clean_removes_what_runs_kept_and_nothing_else(
    pipeline: Pipeline, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise InputError("stopped")

    monkeypatch.setattr(road, "export", stop)
    for begun in ("float32_begun", "reference_begun"):
        monkeypatch.setattr(road, begun, lambda *_: nullcontext(lambda _: None))
    cache = tmp_path / "cache"
    assert pipeline(*arguments)[0] == 3
    assert pipeline(*arguments, "recipe=int8_xnnpack")[0] == 3
    assert len(list(cache.iterdir())) == 2
    (cache / "float32-0").mkdir()
    (cache / "float32-0" / "made_of.json").touch()
    (cache / "mine").mkdir()
    (cache / "mine" / "notes.txt").write_text("keep")
    code, out, _ = pipeline("clean", f"cache={cache}")
    assert (code, out.split(" from ")[0]) == (0, "removed 2 quantized model(s) and 1 of float32's results")
    assert [path.name for path in cache.rglob("*")] == ["mine", "notes.txt"]
    shutil.rmtree(cache)
    assert pipeline("clean", f"cache={cache}")[0] == 0
