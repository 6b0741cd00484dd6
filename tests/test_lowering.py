"""The adaptations of executorch's lowering do what they say with the installed version, and leave nothing behind."""

from __future__ import annotations

import contextlib
import operator
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from executorch.backends.xnnpack import _passes, xnnpack_preprocess
from executorch.backends.xnnpack.partition.config import xnnpack_config
from executorch.exir.pass_base import _ExportPassBase
from ruamel.yaml import YAML
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram, _remove_auto_functionalized_pass
from torch.fx import Graph, GraphModule

from model import DreamEdge, DreamEdgeConfig
from recipes import exporter, lowering, retracing, xnnpack
from recipes.lowering import lower_program
from recipes.options import Attention, Backend, Dtype, LinearQuant
from recipes.quantization import quantize_model
from recipes.static_program import StaticProgram, export_program, metadata
from runtime import Program
from runtime.program import executorch_folder
from tests.checkpoints import ROOT
from validation.format import read_format

N_LAYERS = 2
Lower = Callable[[str], Path]


@pytest.fixture(scope="module")
def lower(tmp_path_factory: pytest.TempPathFactory) -> Lower:
    """lower(name): a `.pte` of a tiny int4 model, lowered anew if there is none of this name."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": N_LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
    ids = {"mask_token_id": 31, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    model = DreamEdge(DreamEdgeConfig(**sizes, **heads, **ids)).requires_grad_(False)  # type: ignore[arg-type]
    quantize_model(model, Dtype.float32, LinearQuant(), None)
    folder = tmp_path_factory.mktemp("lowered")

    def make(name: str) -> Path:
        if (folder / name).exists():
            return folder / name
        exported = export_program(StaticProgram(model, 16, Backend.xnnpack, Attention.delegated), 16)
        methods = metadata(model, 16, 16, Attention.delegated)
        with (folder / name).open("wb") as file:
            lower_program(exported, Backend.xnnpack, methods).write_to_file(file)
        return folder / name

    return make


def test_an_activation_is_quantized_once_and_all_attention_is_delegated(lower: Lower) -> None:
    found = read_format(lower("adapted.pte"))
    # Of qkv, o, gate and up, down; and the output layer.
    assert found.delegated_ops["Convert"] == 4 * N_LAYERS + 1
    assert found.delegated_ops["BatchMatrixMultiply"] == 2 * N_LAYERS
    assert len(found.delegates) == N_LAYERS + 1


def test_merging_and_fewer_passes_change_no_result(lower: Lower) -> None:
    adapted = lower("adapted.pte")
    with (
        patch.object(xnnpack, "PASSES_OF_OTHER_NETWORKS", ()),
        patch.object(lowering, "decomposed_once", nullcontext),
        patch.object(lowering, "shapes_computed_once", nullcontext),
    ):
        assert lower("all_passes.pte").read_bytes() == adapted.read_bytes()
    with patch.object(xnnpack, "merge_duplicates", lambda _: None):
        unmerged = lower("unmerged.pte")
    assert read_format(unmerged).delegated_ops["Convert"] == 7 * N_LAYERS + 1
    one, other = Program.open(adapted), Program.open(unmerged)
    for tokens, start, kv_len in (([1, 2, 3, 4, 5], 0, 5), ([6, 7], 5, 7), ([8], 2, 7)):
        assert torch.equal(one.forward(tokens, start, kv_len), other.forward(tokens, start, kv_len))


@pytest.mark.parametrize("keepdim", [True, False])
@pytest.mark.parametrize("shape", [(1, 5, 32), (7, 64)])
def test_shapes_are_those_that_torchao_computes(shape: tuple[int, ...], keepdim: bool) -> None:
    ops = torch.ops.torchao
    blocks = [*(1 for _ in shape[:-1]), shape[-1]]

    def through(x: torch.Tensor) -> list[torch.Tensor]:
        parameters = (blocks, torch.int8, -128, 127, 1e-6, torch.float32, torch.int8, keepdim)
        scale, zero_point = ops.choose_qparams_affine(x, "ASYMMETRIC", *parameters)
        integers = ops.quantize_affine(x, blocks, scale, zero_point, torch.int8, -128, 127)
        return [scale, zero_point, integers, ops.dequantize_affine(integers, blocks, scale, zero_point, torch.int8)]

    real = through(torch.randn(shape))
    with FakeTensorMode():
        fake = through(torch.randn(shape))
    assert real[0].unique().numel() > 1  # real tensors are computed with
    assert [(t.shape, t.dtype, t.stride()) for t in fake] == [(t.shape, t.dtype, t.stride()) for t in real]


def test_the_passes_that_are_left_out_exist() -> None:
    assert all(hasattr(_passes, name) for name in xnnpack.PASSES_OF_OTHER_NETWORKS)


def test_what_the_shape_of_a_result_goes_by() -> None:
    def looks(*values: object) -> list[object]:
        return [retracing._parts(value, retracing._look) for value in values]

    with FakeTensorMode():
        x, like, wide, turned = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3).double(), torch.zeros(3, 2).t()
    same = looks((x, [1, 2.0], {"dtype": torch.int8}), (like, [1, 2.0], {"dtype": torch.int8}))
    assert len({*same}) == 1
    others = looks((wide, [1, 2.0]), (turned, [1, 2.0]), (x, [1, 2]), (x, [True, 2.0]), (x, 1, 2.0), ([x, 1], 2.0))
    assert len({*same, *others}) == 7
    with FakeTensorMode():
        elsewhere = torch.zeros(2, 3)
    assert looks((x,)) != looks((elsewhere,))
    real = torch.zeros(2), torch.zeros(2)  # a result may go by what is in them
    assert len({*looks(*real)}) == 2


def test_what_writes_into_a_part_of_a_tensor_is_left_to_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says of a part of a tensor more than which tensor it is: sizes, strides or slices."""
    asked: list[Graph] = []
    monkeypatch.setattr(retracing, "by_inductor", asked.append)
    op = torch.ops.llama.update_cache.default
    for part in ({}, {"_cache_slice_dim": 0}):
        graph = Graph()
        value, cache = graph.placeholder("value"), graph.placeholder("cache")
        given: dict[str, Any] = {"value": value, "start_pos": 0, "_cache_base_index": 0, **part, "_all_bases": [cache]}
        written = graph.call_function(torch.ops.higher_order.auto_functionalized_v2, (op,), given)
        written.meta["val"] = (None, None)
        graph.output(graph.call_function(operator.getitem, (written, 1)))
        retracing._in_place_again(graph)
        if part:
            assert asked == [graph]
        else:
            made = graph.find_nodes(op="call_function", target=op)
            assert [node.args for node in made] == [(value, cache, 0)]
            assert graph.output_node().args == (cache,)
            assert not asked


def test_inductor_is_not_imported() -> None:
    code = "import sys, recipes.lowering; print('torch._inductor.lowering' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.strip() == "False"


def test_the_table_of_operators_is_what_executorchs_own_reader_reads() -> None:
    text = (executorch_folder() / "exir" / "dialects" / "edge" / "edge.yaml").read_text(encoding="utf-8")
    assert exporter._read(YAML(), text) == YAML(typ="safe").load(text)


def test_nothing_stays_adapted() -> None:
    def adapted() -> list[object]:
        return [
            ExportedProgram.run_decompositions,
            _ExportPassBase._fx,
            GraphModule.recompile,
            vars(_remove_auto_functionalized_pass)["decompose_auto_functionalized"],
            xnnpack_config.has_free_unbacked_symbols,
            xnnpack_preprocess.XnnpackBackend.copy_exported_program_for_preprocess,
            xnnpack_preprocess.XNNPACKPassManager,
        ]

    before = adapted()
    once = (retracing.decomposed_once(), retracing.shapes_computed_once())
    with contextlib.suppress(RuntimeError), xnnpack.adapted_lowering(), once[0], once[1]:
        assert all(a != b for a, b in zip(before, adapted(), strict=True))
        raise RuntimeError("a lowering that fails")
    assert before == adapted()
