"""`DreamEdgeConfig` by itself; what the loader says about a bad `config.json` is in `test_checkpoint.py`."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from model import ConfigError, DreamEdgeConfig
from pipeline.arguments import with_task
from runtime.artifact import SCHEMA_VERSION
from tests.checkpoints import BUNDLED

GOLDEN = Path(__file__).parent / "golden"

# What Dream-v0-Instruct-7B is, in the form of its config.json.
DREAM_7B: dict[str, Any] = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "mask_token_id": 151666,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name / "config.json").read_text(encoding="utf-8"))


def test_the_defaults_are_those_of_dream_7b() -> None:
    assert DreamEdgeConfig.from_hf(DREAM_7B) == DreamEdgeConfig()
    assert DreamEdgeConfig().head_dim == 128
    assert DreamEdgeConfig().max_seq_len == 2048


@pytest.mark.parametrize("name", ["gqa2", "mha-tied", "mqa4-sharded"])
def test_round_trip(name: str) -> None:
    """Through JSON and back: the same config, each value as the file had it."""
    config = DreamEdgeConfig.from_hf(golden(name))
    written = json.loads(json.dumps(config.to_hf()))
    assert DreamEdgeConfig.from_hf(written) == config
    assert written.items() <= golden(name).items()
    assert {field.name for field in dataclasses.fields(config)} <= written.keys()


def test_round_trip_of_values_that_are_not_the_defaults() -> None:
    config = DreamEdgeConfig(
        vocab_size=11,
        hidden_size=24,
        intermediate_size=7,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=99,
        rope_theta=500.5,
        rms_norm_eps=1e-3,
        tie_word_embeddings=True,
        mask_token_id=1,
        pad_token_id=2,
        bos_token_id=3,
        eos_token_id=4,
    )
    default = DreamEdgeConfig()
    assert all(getattr(config, f.name) != getattr(default, f.name) for f in dataclasses.fields(config))
    assert DreamEdgeConfig.from_hf(config.to_hf()) == config
    assert config.head_dim == 4
    assert config.max_seq_len == 99


def test_the_config_cannot_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DreamEdgeConfig().vocab_size = 5  # type: ignore[misc]


def test_from_hf_leaves_its_argument_alone() -> None:
    before = json.dumps(DREAM_7B)
    DreamEdgeConfig.from_hf(DREAM_7B)
    assert json.dumps(DREAM_7B) == before


def test_a_direct_config_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="num_attention_heads 28 is not a multiple of num_key_value_heads 5"):
        DreamEdgeConfig(num_key_value_heads=5)
    with pytest.raises(ConfigError, match="mask_token_id must be a token of the vocabulary"):
        DreamEdgeConfig(vocab_size=100)


def test_config_error_is_a_value_error() -> None:
    assert issubclass(ConfigError, ValueError)


def test_the_task_belongs_to_the_checkpoint(tmp_path: Path) -> None:
    """The bundled checkpoint brings its task; another has none unless it is asked for."""
    bundled = "checkpoint=" + os.path.relpath(BUNDLED)
    assert with_task("run", [], False) == ["task=sudoku"]
    assert with_task("run", [bundled], False) == [bundled, "task=sudoku"]
    assert with_task("run", ["task.n_solve=40"], False) == ["task.n_solve=40", "task=sudoku"]
    assert with_task("run", [f"checkpoint={tmp_path}"], False)[1:] == ["task=none"]
    assert with_task("run", [f"checkpoint={tmp_path}", "task=sudoku"], False)[1:] == ["task=sudoku"]
    assert with_task("run", ["task=none"], False) == ["task=none"]
    assert with_task("run", [f"checkpoint={tmp_path},{BUNDLED}"], True)[1:] == []  # each job its own
    assert with_task("run", [f"checkpoint={tmp_path},{tmp_path}"], True)[1:] == ["task=none"]
    assert with_task("validate", ["artifact=x"], False) == ["artifact=x"]
    (tmp_path / "manifest.json").write_text(json.dumps({"schema_version": SCHEMA_VERSION, "task": {"name": "sudoku"}}))
    assert with_task("evaluate", [f"artifact={tmp_path}"], False)[1:] == ["task=sudoku"]
    (tmp_path / "manifest.json").write_text(json.dumps({"schema_version": SCHEMA_VERSION, "task": {"name": "theirs"}}))
    assert with_task("evaluate", [f"artifact={tmp_path}"], False)[1:] == ["task=auto"]
