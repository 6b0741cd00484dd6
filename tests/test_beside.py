"""What eager gives, computed in a copy of the process while the program is made."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import psutil
import pytest
import torch

from pipeline import beside, float32
from pipeline.beside import float32_begun, reference_begun
from pipeline.config import load_recipe
from pipeline.float32 import FILE, float32_of
from pipeline.load import Loaded, load
from pipeline.quantize import quantize
from tests.checkpoints import GOLDEN, ROOT
from validation.float32 import Float32, Request
from validation.material import material_of
from validation.progress import silent
from validation.recording import make_reference
from validation.reference import save_reference
from validation.settings import TaskConfig, ValidationConfig

S = 64
computed: Callable[..., Float32] = float32_of


@pytest.fixture
def asked() -> Request:
    """Of `float32_of`, behind the cache."""
    loaded, task, settings = loaded_golden(), TaskConfig(), ValidationConfig(n_prompts=8)
    material = material_of(loaded.folder, None, loaded.config, task, settings, S, Path())
    return Request(material, None, 8, settings, S, S)


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def loaded_golden() -> Loaded:
    return load(GOLDEN / "gqa2")


def refuse(*_: object) -> None:
    raise AssertionError("it is computed again")


def test_what_the_copy_leaves_is_what_this_process_computes(
    asked: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_golden()
    here = computed(loaded, tmp_path / "here", asked, silent)
    with float32_begun(loaded, tmp_path / "there", asked) as wait:
        wait(silent)
    monkeypatch.setattr(float32, "run_float32", refuse)
    there = computed(loaded, tmp_path / "there", asked, silent)
    for name, (summary, columns) in here.logits.items():
        assert torch.equal(columns, there.logits[name][1])
        for field in fields(summary):
            assert torch.equal(getattr(summary, field.name), getattr(there.logits[name][0], field.name))


def test_the_reference_of_the_copy_is_what_this_process_makes(
    asked: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_golden()
    quantized = quantize(loaded, load_recipe("int4_xnnpack"), tmp_path, silent)
    with reference_begun(loaded, quantized, tmp_path, asked, tmp_path) as take:
        there = take(silent)
    found = computed(loaded, tmp_path, asked, silent)
    here = make_reference(quantized.weights, found, quantized.plain, asked, silent)
    assert there is not None
    for name, reference in {"here": here, "there": there}.items():
        save_reference(reference, tmp_path / name)
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()
    monkeypatch.setattr(beside, "make_reference", refuse)
    with reference_begun(loaded, quantized, tmp_path, asked, tmp_path) as take:
        assert take(silent) is None
    assert not list(tmp_path.glob("begun.*"))


def test_a_copy_that_fails_or_is_killed_is_made_up_for(
    asked: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = loaded_golden()
    with monkeypatch.context() as broken:
        broken.setattr(beside, "float32_of", refuse)
        with float32_begun(loaded, tmp_path, asked) as wait:
            wait(silent)
        broken.setattr(beside, "float32_of", lambda *_: time.sleep(60))
        with float32_begun(loaded, tmp_path, asked) as wait:
            (copy,) = multiprocessing.active_children()
            copy.kill()
            wait(silent)
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.rglob(FILE))
    assert computed(loaded, tmp_path, asked, silent).logits


def test_a_copy_ends_with_what_began_it(asked: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "float32_of", lambda *_: time.sleep(60))
    with pytest.raises(KeyError), float32_begun(loaded_golden(), tmp_path, asked):
        raise KeyError
    assert not multiprocessing.active_children()


def test_a_copy_ends_with_a_process_that_is_killed() -> None:
    code = (
        "import sys, time, torch; from types import SimpleNamespace; from unittest.mock import patch\n"
        "from pathlib import Path; from pipeline import beside\n"
        "torch.set_num_threads(2)\n"
        "with patch.multiple(beside, float32_of=lambda *_: time.sleep(60), layer_weights=lambda _: 1):\n"
        "    with beside.float32_begun(SimpleNamespace(config=None), *range(2)):\n"
        "        print('begun', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "begun\n"
        (copy,) = psutil.Process(parent.pid).children()
        time.sleep(0.5)  # it asks the kernel first
        os.kill(parent.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs([copy], timeout=10)
    assert not alive


def test_on_one_processor_and_of_a_large_network_nothing_is_begun(
    asked: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    with float32_begun(loaded_golden(), tmp_path, asked):
        assert not multiprocessing.active_children()
    torch.set_num_threads(2)
    monkeypatch.setattr(beside, "layer_weights", lambda _: 2 * beside.SMALL)
    with float32_begun(loaded_golden(), tmp_path, asked):
        assert not multiprocessing.active_children()
