"""A sweep on a disk that is full in the middle of a job, and in a folder that goes away. Mounts take root."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.commands import COMMANDS
from pipeline.schema import RunConfig
from runtime.artifact import read_manifest
from tests.checkpoints import GOLDEN

Pipeline = Callable[..., tuple[int, str, str]]


@pytest.fixture
def third(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Callable[[Path], None], Callable[[Path], None]], None]:
    """third(breaks, mends): the third job is broken once it has begun to write, and mended when it has ended."""
    run, begun = COMMANDS["run"], list[str]()

    def plan(breaks: Callable[[Path], None], mends: Callable[[Path], None]) -> None:
        def go(config: RunConfig) -> None:
            begun.append(config.output)
            output = Path(config.output)
            if len(begun) != 3:
                run(config)
                return
            ended = threading.Event()

            def watch() -> None:
                while not output.with_name(f".{output.name}.partial").is_dir() and not ended.wait(0.001):
                    pass
                breaks(output.parent)

            thread = threading.Thread(target=watch)
            thread.start()
            try:
                run(config)
            finally:
                ended.set()
                thread.join()
                mends(output.parent)

        monkeypatch.setitem(COMMANDS, "run", go)

    return plan


def sweep(pipeline: Pipeline, folder: Path, lengths: list[int]) -> tuple[int, str, str]:
    jobs = [f"export.max_seq_len={','.join(map(str, lengths))}", "recipe=fp32_xnnpack", "task=none"]
    places = [f"cache={folder / 'cache'}", f"hydra.sweep.dir={folder / 'notes'}"]
    return pipeline("run", "-m", f"checkpoint={GOLDEN / 'gqa2'}", *jobs, *places)


def whole(folder: Path, lengths: list[int]) -> list[int]:
    made = [length for length in lengths if (folder / f"gqa2-fp32_xnnpack-{length}").exists()]
    for length in made:
        assert read_manifest(folder / f"gqa2-fp32_xnnpack-{length}")["export"]["max_seq_len"] == length
    assert len(list(folder.iterdir())) == len(made), "nothing half-written"
    return made


def test_a_full_disk_in_job_3_of_8(tmp_path: Path, pipeline: Pipeline, third, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    artifacts = tmp_path / "artifacts"
    artifacts.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", artifacts], check=True)

    def fill(folder: Path) -> None:
        with (folder / "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(2**16))
            except OSError:
                pass

    third(fill, lambda folder: (folder / "filler").unlink())
    lengths = [64, 72, 80, 88, 96, 104, 112, 120]
    try:
        code, out, err = sweep(pipeline, tmp_path, lengths)
        assert code == 7
        assert "7 done, 0 done before, 1 failed" in out
        assert err.count("error: ") == 1
        assert "No space left on device" in err
        assert whole(artifacts, lengths) == [64, 72, *lengths[3:]]
        code, out, _ = sweep(pipeline, tmp_path, lengths)
        assert code == 0
        assert "1 done, 7 done before, 0 failed" in out
        assert whole(artifacts, lengths) == lengths
    finally:
        subprocess.run(["umount", artifacts], check=True)


def test_a_shared_folder_goes_away(tmp_path: Path, pipeline: Pipeline, third, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """In the middle of the third of four jobs; what is on it stays as it was."""
    monkeypatch.chdir(tmp_path)
    share, artifacts = tmp_path / "share", tmp_path / "artifacts"
    share.mkdir()
    artifacts.mkdir()
    subprocess.run(["mount", "--bind", share, artifacts], check=True)
    third(lambda folder: subprocess.run(["umount", "-l", folder], check=True) and None, lambda _: None)
    lengths = [64, 72, 80, 88]
    code, out, err = sweep(pipeline, tmp_path, lengths)
    assert code == 7
    assert "1 failed" in out
    assert err.count("error: ") == 1
    (said,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "gqa2-fp32_xnnpack-80" in said
    made = [path.name for path in share.iterdir() if not path.name.startswith(".")]
    assert sorted(made) == [f"gqa2-fp32_xnnpack-{length}" for length in (64, 72)]
    for name in made:
        read_manifest(share / name)
    (rest,) = whole(artifacts, lengths)
    assert rest == 88
