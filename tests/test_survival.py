"""`kill -9` in each stage leaves nothing that looks finished, and the next run works."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.__main__ import main
from runtime.artifact import read_manifest
from tests.checkpoints import GOLDEN, ROOT

STAGES = ("load", "quantize", "export", "lower", "validate", "package")


def test_kill_in_each_stage(tmp_path: Path) -> None:
    output, cache = tmp_path / "out", tmp_path / "cache"
    arguments = ["run", "recipe=fp32_xnnpack", f"checkpoint={GOLDEN / 'gqa2'}", f"output={output}", f"cache={cache}"]
    arguments.append("export.max_seq_len=64")
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
        if run.returncode == 0:  # it was past the last moment
            read_manifest(output)
            break
        assert not output.exists() or read_manifest(output)
        assert {path.name for path in tmp_path.iterdir()} <= {"cache", ".out.partial", "out"}
    assert main([*arguments, "overwrite=true"]) == 0
    read_manifest(output)
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "out"}


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
