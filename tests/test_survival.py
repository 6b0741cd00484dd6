"""`kill -9` in each stage leaves nothing that looks finished and what was there, and the next run works."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import package
from pipeline.__main__ import main
from runtime.artifact import read_manifest
from runtime.errors import OutputError
from tests.checkpoints import GOLDEN, ROOT, Build

STAGES = ("load", "quantize", "export", "lower", "validate", "package")


def test_kill_in_each_stage(build: Build, tmp_path: Path) -> None:
    output, cache = tmp_path / "out", tmp_path / "cache"
    earlier = build("gqa2", "fp32_xnnpack")
    shutil.copytree(earlier, output)
    arguments = ["run", "recipe=fp32_xnnpack", f"checkpoint={GOLDEN / 'gqa2'}", f"output={output}", f"cache={cache}"]
    arguments += ["export.max_seq_len=64", "validation.n_prompts=8", "overwrite=true"]
    for done, stage in zip((None, *STAGES), STAGES, strict=False):
        command = [sys.executable, "-u", "-m", "pipeline", *arguments]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
            assert run.stdout is not None
            if done is None:
                time.sleep(0.5)
            else:
                next(line for line in run.stdout if line.startswith(done))
            run.send_signal(signal.SIGKILL)
        assert run.returncode in (-signal.SIGKILL, 0), stage
        made = read_manifest(output)
        assert made["export"]["max_seq_len"] == 64 or made == read_manifest(earlier)
        if made["export"]["max_seq_len"] == 64:  # it was past the last moment
            break
        assert run.returncode == -signal.SIGKILL
        assert {path.name for path in tmp_path.iterdir()} <= {"cache", ".out.partial", "out"}
    assert main(arguments) == 0
    assert read_manifest(output)["export"]["max_seq_len"] == 64
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "out"}


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_earlier_artifact_is_never_missing(
    artifact: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any step of taking its place, one of the two is there, or the next run brings it back."""
    whole = read_manifest(artifact)
    if not can_exchange:
        monkeypatch.setattr(package, "_exchange", lambda *_: False)
    renamed = []
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        renamed.append(path)
        if len(renamed) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    with package.staging(artifact, overwrite=True) as folder:
        shutil.copytree(artifact, folder, dirs_exist_ok=True)
        (folder / "new").touch()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", killed)
            if can_exchange:
                package.place(folder, artifact)
                assert renamed == []
            else:
                with pytest.raises(KeyboardInterrupt):
                    package.place(folder, artifact)
                assert not artifact.exists()
    assert (artifact / "new").exists() == can_exchange
    with pytest.raises(OutputError, match="already there"), package.staging(artifact, overwrite=False):
        pass
    assert read_manifest(artifact) == whole
    assert [path.name for path in artifact.parent.iterdir()] == [artifact.name]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_quantization_is_taken_up(stop: signal.Signals, tmp_path: Path) -> None:
    """The parts that are whole stay; none is half."""
    from scripts.make_checkpoint import write_checkpoint
    from tests.test_fullsize import TALL

    write_checkpoint(TALL, tmp_path / "checkpoint", seed=0)
    cache = tmp_path / "cache"
    paths = [f"checkpoint={tmp_path / 'checkpoint'}", f"output={tmp_path / 'out'}", f"cache={cache}"]
    command = [sys.executable, "-m", "pipeline", "run", "task=none", *paths]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        deadline = time.monotonic() + 120
        while not list(cache.glob("*/layers.1.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.02)
        started = time.monotonic()
        run.send_signal(stop)
        _, said = run.communicate(timeout=30)
    assert time.monotonic() - started < 10
    assert (run.returncode, said) == (130, "error: interrupted\n")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "cache"}
    kept = {path.name for path in cache.glob("*/*")}
    assert {"embed_tokens.safetensors", "layers.0.safetensors", "made_of.json"} <= kept
    assert "lm_head.safetensors" not in kept
    assert not any(name.endswith(".partial") for name in kept)
