"""Quantized weights on disk: what comes from there is what would have been in memory, and a killed run goes on."""

from __future__ import annotations

import copy
import gc
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.backends.xnnpack.operators.node_visitor import NodeVisitor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchao.quantization import quantize_

from model import DreamEdge, DreamEdgeConfig, load_hf_model
from model.pages import release
from pipeline.config import load_recipe
from pipeline.export import export
from pipeline.load import load
from pipeline.lower import lower
from pipeline.quantize import Quantized, cache_folder, quantize
from pipeline.schema import ExportConfig
from recipes import packing, quantization
from recipes.options import Dtype
from recipes.packing import dequantized, pack_int4, unpack_int4
from recipes.quantization import quantize_model
from recipes.stored import Weights, in_memory, open_stored, store
from runtime.errors import OutputError
from runtime.memory import memory
from tests.checkpoints import GOLDEN, GOLDEN_NAMES, RECIPES
from validation.format import read_format
from validation.progress import silent

PART = "layers.1.safetensors"


def on_disk(checkpoint: str, recipe: str, folder: Path) -> Weights:
    model, _, _ = load_hf_model(GOLDEN / checkpoint, dtype=None)
    list(store(model, load_recipe(recipe), folder))
    return open_stored(folder, model, load_recipe(recipe))


def quantized_in_memory(checkpoint: str, recipe_name: str) -> DreamEdge:
    model, _, _ = load_hf_model(GOLDEN / checkpoint, dtype=None)
    recipe = load_recipe(recipe_name)
    quantize_model(model, recipe.dtype, recipe.linear, recipe.embedding)
    return model


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("checkpoint", GOLDEN_NAMES)
def test_the_same_weights_as_in_memory(checkpoint: str, recipe: str, tmp_path: Path) -> None:
    """Every parameter, and the sha256 that each one's bytes shall have in the program."""
    stored = on_disk(checkpoint, recipe, tmp_path)
    held = in_memory(quantized_in_memory(checkpoint, recipe), load_recipe(recipe).backend)
    names = [name for name, _ in held.model.named_parameters()]
    assert names == [name for name, _ in stored.model.named_parameters()]
    for name in names:
        assert torch.equal(stored.rows(name), held.rows(name)), name
        assert torch.equal(stored.rows(name, slice(1, 3)), held.rows(name)[1:3]), name
    if held.model.lm_head.weight is held.model.embed_tokens.weight:
        del held.digests["lm_head.weight"]  # stored once
    assert stored.digests == held.digests


@pytest.mark.parametrize("name", ["int4_xnnpack", "int4_fast_xnnpack", "int8_xnnpack"])
def test_slices_are_what_torchao_makes_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "SLICE", 1000)  # 15 rows, and a shorter slice at the end
    linear = torch.nn.Linear(64, 100, bias=False)
    whole = copy.deepcopy(linear)
    recipe = load_recipe(name)
    assert recipe.linear is not None
    quantization.quantize_module("lm_head", linear, recipe.dtype, recipe.linear, None)
    quantize_(whole, quantization.linear_config(recipe.linear))  # without a text nothing is rounded otherwise
    for part in ("qdata", "scale", "zero_point"):
        assert torch.equal(getattr(linear.weight, part), getattr(whole.weight, part)), part
    assert torch.equal(linear.weight.dequantize(), whole.weight.dequantize())


@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.float16])
@pytest.mark.parametrize("name", ["int4_xnnpack", "int4_fast_xnnpack", "int8_xnnpack"])
def test_dequantized_as_by_torchao(name: str, dtype: Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "AT_ONCE", 1000)  # 15 rows, and a shorter slice at the end
    linear, recipe = torch.nn.Linear(64, 100, bias=False), load_recipe(name)
    quantization.quantize_module("lm_head", linear, dtype, recipe.linear, None)
    held: Any = linear.weight.data
    assert torch.equal(dequantized(held.qdata, held.scale, held.dtype), held.dequantize())
    if "int4" in name:
        assert torch.equal(dequantized(pack_int4(held.qdata), held.scale, held.dtype, True), held.dequantize())


# The float recipes are tried in tests/extra.
@pytest.mark.parametrize("recipe", ["int8_xnnpack"])
def test_the_same_program_as_from_memory(recipe: str, tmp_path: Path) -> None:
    """Byte for byte; int4 is compared in test_export_model.py."""
    blocks, files = load_recipe(recipe), []
    for i, weights in enumerate(
        (on_disk("gqa2", recipe, tmp_path / "parts"), in_memory(quantized_in_memory("gqa2", recipe), blocks.backend))
    ):
        quantized = Quantized(weights, blocks)
        files.append(lower(export(quantized, ExportConfig(64)), quantized, tmp_path / f"{i}.pte").pte)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_integers_that_were_never_filled_in_are_never_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """executorch's own packing is not called for a stored matrix; without the adaptation it would be."""
    packed: list[torch.Tensor] = []
    pack = NodeVisitor.convert_to_qc4w

    def noted(integers: torch.Tensor) -> torch.Tensor:
        packed.append(integers)
        return pack(integers)

    monkeypatch.setattr(NodeVisitor, "convert_to_qc4w", staticmethod(noted))
    quantized = Quantized(on_disk("gqa2", "int4_xnnpack", tmp_path), load_recipe("int4_xnnpack"))
    exported = export(quantized, ExportConfig(64))
    lower(exported, quantized, tmp_path / "stored.pte")
    assert packed == []
    held = Quantized(in_memory(quantized_in_memory("gqa2", "int4_xnnpack"), quantized.recipe.backend), quantized.recipe)
    lower(export(held, ExportConfig(64)), held, tmp_path / "held.pte")
    assert len(packed) == 2 * 7 + 1


def test_what_is_quantized_in_slices_waits_for_no_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "SLICE", 1000)
    gc.collect()
    gc.disable()
    try:
        made = quantized_in_memory("gqa2", "int8_xnnpack")
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = [thing for thing in gc.garbage if isinstance(thing, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert made.lm_head.weight.shape[0] > 1000 // made.lm_head.weight.shape[1], "in one slice"
    assert left == []


def test_int4_is_packed_as_executorch_packs_it() -> None:
    integers = torch.randint(-8, 8, (300, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    assert torch.equal(pack_int4(integers), NodeVisitor.convert_to_qc4w(integers))
    assert torch.equal(unpack_int4(pack_int4(integers)), integers)


def test_parts_that_are_there_are_taken_as_they_are_and_damaged_ones_are_made_again(tmp_path: Path) -> None:
    on_disk("gqa2", "int4_xnnpack", tmp_path)
    made = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(made) == {f"{part}.safetensors" for part in ("embed_tokens", "layers.0", "layers.1", "norm", "lm_head")}
    model, _, _ = load_hf_model(GOLDEN / "gqa2", dtype=None)
    recipe = load_recipe("int4_xnnpack")
    assert all(was_there for _, was_there in store(model, recipe, tmp_path))
    flipped = bytearray(made[PART])
    flipped[-1] ^= 1
    for damaged in (bytes(flipped), made[PART][:-1], made[PART][:20], b"", b"\xff" * 64, b"\2" + bytes(7) + b"[]"):
        (tmp_path / PART).write_bytes(damaged)
        again = {name for name, was_there in store(model, recipe, tmp_path) if not was_there}
        assert again == {"layers.1"}
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == made
    (tmp_path / PART).unlink()
    assert [name for name, was_there in store(model, recipe, tmp_path) if not was_there] == ["layers.1"]


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    loaded, recipe = load(GOLDEN / "gqa2"), load_recipe("int4_xnnpack")
    quantize(loaded, recipe, tmp_path, silent)
    folder = cache_folder(loaded, recipe, tmp_path)
    left, busy = folder / "layers.0.99999999.partial", folder / "layers.0.1.partial"
    for file in (left, busy):
        file.write_bytes(b"half")
    quantize(loaded, recipe, tmp_path, silent)
    assert not left.exists()
    assert busy.exists()  # process 1 runs


def test_the_key_is_all_that_decides_the_bytes(tmp_path: Path) -> None:
    def key(checkpoint: str, recipe: str) -> str:
        return cache_folder(load(GOLDEN / checkpoint), load_recipe(recipe), tmp_path).name

    keys = [key("gqa2", "int4_xnnpack"), key("gqa2", "int8_xnnpack"), key("mha-tied", "int4_xnnpack")]
    assert len(set(keys)) == 3
    assert key("gqa2", "int4_xnnpack") == keys[0]
    changed = tmp_path / "changed"
    shutil.copytree(GOLDEN / "gqa2", changed)
    tensors = load_file(changed / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, changed / "model.safetensors")
    assert cache_folder(load(changed), load_recipe("int4_xnnpack"), tmp_path).name not in keys


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cache .* cannot be written"):
        quantize(load(GOLDEN / "gqa2"), load_recipe("int4_xnnpack"), tmp_path / "file", silent)


def test_release_drops_mapped_pages_and_nothing_else(tmp_path: Path) -> None:
    save_file({"x": torch.arange(2**24, dtype=torch.float32)}, tmp_path / "x.safetensors")

    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        mapped = opened.get_tensor("x")
    held = torch.arange(2**20)
    save_file({str(i): torch.arange(2**17, dtype=torch.float32) for i in range(64)}, tmp_path / "small.safetensors")
    with safe_open(tmp_path / "small.safetensors", framework="pt") as opened:
        small = [opened.get_tensor(str(i)) for i in range(64)]
    sums = [one.sum() for one in small]
    before = memory()["file"]
    release(*small)  # half a megabyte each
    assert before - memory()["file"] > 24 * 2**20
    assert [one.sum() for one in small] == sums
    release(*small)
    before = memory()["file"]
    total = mapped.sum()
    assert memory()["file"] - before > 60 * 2**20
    release(mapped, held)
    assert memory()["file"] - before < 8 * 2**20
    assert torch.equal(held, torch.arange(2**20))
    assert mapped.sum() == total


def test_constants_of_any_length_are_found(tmp_path: Path) -> None:
    """Constants are padded to 16 bytes in the program: a vocabulary of 103 has 412 bytes of scales."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 103, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
    ids = {"mask_token_id": 31, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    model = DreamEdge(DreamEdgeConfig(**sizes, **heads, **ids)).requires_grad_(False)  # type: ignore[arg-type]
    recipe = load_recipe("int4_xnnpack")
    list(store(model, recipe, tmp_path))
    quantized = Quantized(open_stored(tmp_path, model, recipe), recipe)
    lowered = lower(export(quantized, ExportConfig()), quantized, tmp_path / "model.pte")
    found = read_format(lowered.pte).constants
    assert [name for name, digests in quantized.weights.digests.items() if found.keys().isdisjoint(digests)] == []
