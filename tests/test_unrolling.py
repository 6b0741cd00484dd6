"""A program whose equal layers were lowered once is, byte for byte, the one whose layers were all lowered."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch

from model import DreamEdge, DreamEdgeConfig
from pipeline import lower as stage
from recipes import lowering
from recipes.equal_layers import LeftOut, Run, runs_of, shortened, tensors_of
from recipes.lowering import lower_program
from recipes.options import Attention, Backend, Dtype, LinearQuant
from recipes.partitions import UnlikeError
from recipes.quantization import quantize_module
from recipes.static_program import StaticProgram, export_program, metadata

S = 16


def network(n_layers: int, quants: dict[int, LinearQuant], attention: Attention) -> StaticProgram:
    """quants: of the linear layers in some layers; the others stay float32."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": n_layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": S}
    ids = {"mask_token_id": 31, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    model = DreamEdge(DreamEdgeConfig(**sizes, **heads, **ids)).requires_grad_(False)  # type: ignore[arg-type]
    for i, quant in quants.items():
        for path, module in model.layers[i].named_modules(prefix=f"layers.{i}"):
            quantize_module(path, module, Dtype.float32, quant, None)
    return StaticProgram(model, S, Backend.xnnpack, attention)


def lowered(program: StaticProgram, runs: list[Run], attention: Attention, file: Path) -> bytes:
    exported = export_program(shortened(program, runs), S)
    methods = metadata(program.model, S, S, attention)
    made = lower_program(exported, Backend.xnnpack, methods, left_out=LeftOut(program, runs))
    with file.open("wb") as opened:
        made.write_to_file(opened)
    return file.read_bytes()


int4, int8 = LinearQuant(), LinearQuant(weight_bits=8, group_size=None)


@pytest.mark.parametrize(
    ("attention", "quants", "runs"),
    [
        (Attention.custom_sdpa, {}, [Run(1, 2, 4)]),
        pytest.param(
            Attention.delegated,
            {i: int8 if i < 6 else int4 for i in range(11)},
            [Run(1, 2, 5), Run(6, 7, 9)],
            marks=pytest.mark.extra,
        ),
    ],
)
def test_equal_layers_are_lowered_once(
    attention: Attention, quants: dict[int, LinearQuant], runs: list[Run], tmp_path: Path
) -> None:
    program = network(len(quants) or 6, quants, attention)
    assert runs_of(program) == runs
    once = lowered(program, runs, attention, tmp_path / "once.pte")
    assert once == lowered(program, [], attention, tmp_path / "each.pte")


@pytest.mark.extra
def test_a_layer_that_only_looks_equal_is_noticed(tmp_path: Path) -> None:
    program = network(6, {1: int8}, Attention.delegated)
    assert runs_of(program) == []  # three are left in a row
    with pytest.raises(UnlikeError, match=r"there is no model\.layers\.1\.self_attn"):
        lowered(program, [Run(1, 2, 4)], Attention.delegated, tmp_path / "unlike.pte")


def test_a_tensor_that_became_part_of_another_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = network(6, {}, Attention.custom_sdpa)
    missing = tensors_of(program) | {"model.layers.2.mlp.slope": torch.ones(1)}
    monkeypatch.setattr(lowering, "tensors_of", lambda _: missing)
    with pytest.raises(UnlikeError, match=r"model\.layers\.2\.mlp\.slope became part of another tensor"):
        lowered(program, runs_of(program), Attention.custom_sdpa, tmp_path / "folded.pte")


def test_what_makes_layers_equal() -> None:
    assert runs_of(network(5, {}, Attention.delegated)) == []
    assert runs_of(network(8, {7: int8}, Attention.delegated)) == [Run(1, 2, 6)]
    assert runs_of(network(8, {3: int8}, Attention.delegated)) == []
    program = network(8, {}, Attention.delegated)
    program.model.get_submodule("layers.3.mlp").slope = 0.5  # type: ignore[assignment]
    assert runs_of(program) == []
    assert runs_of(StaticProgram(program.model, S, Backend.portable, Attention.aten)) == []


def test_then_each_is_lowered_by_itself(tmp_path: Path) -> None:
    program = network(8, {}, Attention.delegated)
    asked: list[Any] = []

    def refusing(exported: Any, *_: Any) -> Any:
        asked.append(exported)
        if len(asked) == 1:
            raise UnlikeError("layer 2 became another")
        return Mock()

    exported = SimpleNamespace(
        program="short", left_out=LeftOut(program, runs_of(program)), max_rows=S, max_seq_len=S, constant_methods={}
    )
    with patch.object(stage, "lower_program", refusing), patch.object(stage, "export_program", lambda *given: given):
        stage.lower(exported, Mock(), tmp_path / "model.pte")  # type: ignore[arg-type]
    assert asked == ["short", (program, S)]
