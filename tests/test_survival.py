"""`kill -9` in each stage leaves nothing that looks finished and what was there, and the next run works."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import lock, staging
from pipeline.__main__ import main
from pipeline.calibrate import calibration_of
from pipeline.config import CALIBRATION_TEXT, load_recipe
from pipeline.load import load
from pipeline.quantize import quantize
from runtime.artifact import read_manifest
from runtime.errors import OutputError
from scripts.make_checkpoint import write_checkpoint
from tests.checkpoints import GOLDEN, ROOT, Build
from validation.progress import silent

STAGES = ("load", "quantize", "export", "lower", "validate", "package")


def test_kill_in_each_stage(build: Build, tmp_path: Path) -> None:
    output, cache = tmp_path / "out", tmp_path / "cache"
    earlier, kept = build("gqa2", "fp32_xnnpack"), {"checkpoint", "cache", "out"}
    shutil.copytree(earlier, output)
    one_layer = replace(load(GOLDEN / "gqa2").config, num_hidden_layers=1)
    write_checkpoint(one_layer, tmp_path / "checkpoint", seed=0)
    paths = [f"checkpoint={tmp_path / 'checkpoint'}", f"output={output}", f"cache={cache}"]
    arguments = ["run", "recipe=fp32_xnnpack", *paths]
    arguments += ["export.max_seq_len=64", "validation.n_prompts=8", "overwrite=true"]
    for done, stage in zip((None, *STAGES), STAGES, strict=False):
        receives, sends = os.pipe()
        run = os.fork()  # all that it imports is there
        if run == 0:
            os.dup2(sends, 1)
            sys.stdout = os.fdopen(1, "w", buffering=1)
            os._exit(main(arguments))
        os.close(sends)
        with os.fdopen(receives) as stdout:
            if done is None:
                time.sleep(0.5)
            else:
                next(line for line in stdout if line.startswith(done))
            os.kill(run, signal.SIGKILL)
        returncode = os.waitstatus_to_exitcode(os.waitpid(run, 0)[1])
        assert returncode in (-signal.SIGKILL, 0), stage
        made = read_manifest(output)
        assert made["export"]["max_seq_len"] == 64 or made == read_manifest(earlier)
        if made["export"]["max_seq_len"] == 64:  # it was past the last moment
            break
        assert returncode == -signal.SIGKILL
        assert {path.name for path in tmp_path.iterdir()} <= {*kept, ".out.partial", ".out.lock"}
    assert main(arguments) == 0
    assert read_manifest(output)["export"]["max_seq_len"] == 64
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_earlier_artifact_is_never_missing(
    artifact: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any step of taking its place, one of the two is there, or the next run brings it back."""
    whole = read_manifest(artifact)
    if not can_exchange:
        monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    renamed = []
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        renamed.append(path)
        if len(renamed) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    with staging.staging(artifact, overwrite=True) as folder:
        shutil.copytree(artifact, folder, dirs_exist_ok=True)
        (folder / "new").touch()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", killed)
            if can_exchange:
                staging.place(folder, artifact)
                assert renamed == []
            else:
                with pytest.raises(KeyboardInterrupt):
                    staging.place(folder, artifact)
                assert not artifact.exists()
    assert (artifact / "new").exists() == can_exchange
    with pytest.raises(OutputError, match="already there"), staging.staging(artifact, overwrite=False):
        pass
    assert read_manifest(artifact) == whole
    assert [path.name for path in artifact.parent.iterdir()] == [artifact.name]


def test_a_second_run_leaves_the_first_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    command = ["run", f"checkpoint={GOLDEN / 'gqa2'}", f"output={output}", f"cache={tmp_path / 'cache'}"]
    with staging.staging(output, overwrite=True) as folder:
        (folder / "half").touch()
        for overwrite in ("overwrite=true", "overwrite=false"):
            assert main([*command, overwrite]) == 7
            said = capsys.readouterr().err
            assert said.startswith(f"error: output {output} cannot be written: another run is writing to it, process ")
            assert f" {os.getpid()} on " in said
            assert said.count("\n") == 1
        assert [path.name for path in folder.iterdir()] == ["half"]
        staging.place(folder, output)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_killed_run_is_in_nobodys_way(tmp_path: Path) -> None:
    output = tmp_path / "out"
    entered, enters = os.pipe()
    killed = os.fork()
    if killed == 0:
        with staging.staging(output, overwrite=False) as folder:
            (folder / "half").touch()
            os.write(enters, b"x")
            signal.pause()
    os.read(entered, 1)
    with pytest.raises(OutputError, match=f"process {killed} on"), staging.staging(output, overwrite=False):
        pass
    os.kill(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    assert {path.name for path in tmp_path.iterdir()} == {".out.lock", ".out.partial"}
    with staging.staging(output, overwrite=False) as folder:
        assert list(folder.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    """Also where the lock's file is removed at the moment at which another process opens it."""
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            entered = 0
            deadline = time.monotonic() + 30
            try:
                while entered < 100 and time.monotonic() < deadline:
                    with contextlib.suppress(OutputError), lock.locked(tmp_path / "lock", "it") as is_alone:
                        (tmp_path / "inside").mkdir()  # fails if another is inside
                        (tmp_path / "inside").rmdir()
                        entered += is_alone
            finally:
                os._exit(0 if entered == 100 else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is removed that may be another's."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with staging.staging(tmp_path / "out", overwrite=False) as folder:
        (folder / "half").touch()
        with pytest.raises(OutputError, match="remove it"), staging.staging(tmp_path / "out", overwrite=False):
            pass
        assert (folder / "half").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_quantization_is_taken_up(stop: signal.Signals, tmp_path: Path) -> None:
    """The parts that are whole stay; none is half."""
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


def test_rounding_by_text_is_taken_up_after_a_kill(tmp_path: Path) -> None:
    """What is there already is what the text goes through to the next layer: the bytes are those of a whole run."""
    english = load(ROOT / "assets" / "dream_english").config
    narrow = replace(english, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    write_checkpoint(replace(narrow, num_hidden_layers=4), tmp_path / "checkpoint", seed=0)
    for file in (ROOT / "assets" / "dream_english").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "checkpoint")
    loaded, recipe = load(tmp_path / "checkpoint"), load_recipe("int4_xnnpack")
    few = tmp_path / "few.jsonl"
    few.write_text("".join(CALIBRATION_TEXT.read_text().splitlines(keepends=True)[:8]))
    calibration = calibration_of(loaded, recipe, str(few), CALIBRATION_TEXT)
    assert calibration is not None
    killed = os.fork()
    if killed == 0:

        def kill(what: str, done: int = 0, total: int = 0, share: float | None = None) -> None:
            if (what, done) == ("parts", 3):  # the embedding and two layers; those of plain rounding are named so
                os.kill(os.getpid(), signal.SIGKILL)

        quantize(loaded, recipe, tmp_path / "killed", kill, calibration)
    assert os.waitstatus_to_exitcode(os.waitpid(killed, 0)[1]) == -signal.SIGKILL
    heard: list[str] = []

    def hear(what: str, done: int = 0, total: int = 0, share: float | None = None) -> None:
        heard.append(what)

    quantize(loaded, recipe, tmp_path / "killed", hear, calibration)
    quantize(loaded, recipe, tmp_path / "whole", silent, calibration)
    assert heard.count("parts from the cache") == 3
    made = {}
    for cache in ("killed", "whole"):
        files = sorted((tmp_path / cache).glob("*/*"))
        made[cache] = [(file.name, file.read_bytes()) for file in files]
    assert made["killed"] == made["whole"]
    assert len(made["whole"]) == 2 * (4 + 3 + 1)  # plainly and by text: layers, embedding, norm, output, and the key
