"""scripts/make_checkpoint.py: random checkpoints that load strictly, the same for the same seed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model import load_hf_model
from model.checkpoint_files import weight_files
from scripts.make_checkpoint import main, read_shape, write_checkpoint
from tests.checkpoints import ROOT

TINY = """
vocab_size: 64
hidden_size: 32
intermediate_size: 48
num_hidden_layers: 3
num_attention_heads: 4
num_key_value_heads: 2
max_position_embeddings: 16
mask_token_id: 63
pad_token_id: 62
bos_token_id: 62
eos_token_id: 62
"""


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    return file


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """refused(arguments): what the script says at its end."""

    def said(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["make_checkpoint.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return str(ended.value.code)

    return said


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_script_writes_a_checkpoint_that_loads(shape: Path, tmp_path: Path) -> None:
    command: list[str | Path] = [sys.executable, "scripts/make_checkpoint.py", shape, tmp_path / "out", "--seed", "3"]
    subprocess.run(command, cwd=ROOT, check=True, env={"PYTHONPATH": "."})
    model, _, config = load_hf_model(tmp_path / "out", dtype=None)
    assert config == read_shape(shape)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    logits, _ = model.float()(torch.arange(16)[None])
    assert 0.3 < logits.std() < 3


def test_a_seed_gives_the_same_bytes_and_another_seed_others(shape: Path, tmp_path: Path) -> None:
    config = read_shape(shape)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_checkpoint(config, tmp_path / name, seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert {name for name in a if a[name] != c[name]} == {"model-00001-of-00001.safetensors"}


def test_shards_are_small_and_hold_the_same_tensors(shape: Path, tmp_path: Path) -> None:
    config = read_shape(shape)
    write_checkpoint(config, tmp_path / "one", 0)
    write_checkpoint(config, tmp_path / "many", 0, shard_bytes=8192)
    shards = weight_files(tmp_path / "many")
    assert len(shards) >= 4
    assert all(file.stat().st_size < 8192 + 2048 for file in shards)  # and a header each
    one, many = (load_hf_model(tmp_path / name)[0].state_dict() for name in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_a_tied_output_layer_is_stored_once(shape: Path, tmp_path: Path) -> None:
    shape.write_text(TINY + "tie_word_embeddings: true\n")
    write_checkpoint(read_shape(shape), tmp_path / "out", 0)
    model, _, _ = load_hf_model(tmp_path / "out")
    assert model.lm_head.weight is model.embed_tokens.weight


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (TINY + "hidden_sise: 32\n", "no such size: hidden_sise"),
        (TINY.replace("hidden_size: 32", "hidden_size: 33"), "hidden_size 33 is not a multiple"),
        ("- 1\n", "keys and values are expected"),
        ("a: [1\n", "not readable as YAML"),
        (None, "No such file"),
    ],
)
def test_a_wrong_shape_is_one_line(
    content: str | None, said: str, shape: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    shape.write_text(content) if content is not None else shape.unlink()
    line = refused(shape, tmp_path / "out")
    assert said in line
    assert "\n" not in line
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(shape: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert f"{tmp_path} is not empty" in refused(shape, tmp_path)


@pytest.mark.parametrize("file", sorted((ROOT / "conf/shape").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_shapes_that_ship_are_valid(file: Path) -> None:
    assert read_shape(file).hidden_size
