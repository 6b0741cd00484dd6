"""Recipes that fold and rotate, along the road: the keys, what they are held against, and float16 where it ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model import load_hf_model
from model.checkpoint import hf_name
from pipeline.calibrate import calibration_of
from pipeline.config import CALIBRATION_TEXT, load_recipe, load_task
from pipeline.load import load
from pipeline.quantize import cache_folder, done, plain, quantize
from recipes.options import Fold, Recipe, Rotate, Rounding
from recipes.quantization import quantize_model
from recipes.stored import Weights, open_stored, rewrite, store
from runtime.artifact import read_manifest
from scripts.make_checkpoint import write_checkpoint
from tests import outliers
from tests.checkpoints import BUNDLED, GOLDEN, ROOT
from tests.outliers import OUTLIERS
from validation.eager import run_by_layer
from validation.progress import silent
from validation.quantization_noise import KINDS
from validation.reference import Call
from validation.reference import Sequence as Asked

Pipeline = Callable[..., tuple[int, str, str]]
ALL = "recipe.fold=[norms,up_down,v_o]"
TURNED = "recipe.rotate=[r1,r2]"


def with_outliers(source: Path, folder: Path, kinds: Sequence[Fold]) -> Path:
    """A checkpoint that computes the same as `source`."""
    shutil.copytree(source, folder)
    model, _, _ = load_hf_model(source)
    for kind in kinds:
        OUTLIERS[kind](model)
    tensors = {hf_name(name): tensor for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("checkpoint", "recipe", "keys"),
    [
        ("gqa2", "int4_xnnpack", [ALL]),
        ("gqa2", "int8_xnnpack", [TURNED]),
        ("mha-tied", "fp32_xnnpack", [ALL, TURNED]),
    ],
)
def test_a_rewritten_network_is_a_valid_artifact(
    pipeline: Pipeline, tmp_path: Path, checkpoint: str, recipe: str, keys: list[str]
) -> None:
    output = tmp_path / "made"
    given = (f"checkpoint={GOLDEN / checkpoint}", f"output={output}", "export.max_seq_len=64", f"cache={tmp_path}/c")
    code, _, err = pipeline("run", f"recipe={recipe}", "validation.n_prompts=8", *given, *keys)
    assert code == 0, err
    manifest = read_manifest(output)
    assert manifest["recipe"]["fold"] == (["norms", "up_down", "v_o"] if ALL in keys else [])
    assert manifest["recipe"]["rotate"] == (["r1", "r2"] if TURNED in keys else [])
    figures = {figure["name"]: figure for figure in manifest["figures"]}
    assert figures["changed_weights"]["value"] == 0
    # Against the checkpoint's own network, which has other bases, noise would be as loud as the signal.
    noise = json.loads((output / "report.json").read_text())["noise"]
    for layer in noise["layers"] if noise else []:
        assert layer["stream_db"] > 10
        assert all(layer["matrices"][kind] > 10 for kind in KINDS)
    if recipe == "int4_xnnpack":
        code, out, err = pipeline("explain", f"artifact={output}", given[0], given[-1])
        assert (code, "is what was meant" in out) == (0, True), err


def test_a_size_that_cannot_be_rotated_is_one_line(pipeline: Pipeline, tmp_path: Path) -> None:
    config = load_hf_model(GOLDEN / "gqa2")[2]
    sizes = {"hidden_size": 8 * 131, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    write_checkpoint(replace(config, num_key_value_heads=4, **sizes), tmp_path / "odd", 0)  # type: ignore[arg-type]
    given = (f"checkpoint={tmp_path / 'odd'}", f"output={tmp_path / 'made'}", f"cache={tmp_path / 'cache'}")
    code, _, err = pipeline("run", "recipe=fp32_xnnpack", *given, "export.max_seq_len=64", TURNED)
    assert (code, err.count("\n")) == (4, 1)
    assert "rotate r1: hidden_size 1048 is a power of two times 131" in err
    assert not (tmp_path / "made").exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors")), "before anything is made"
    code, _, err = pipeline("run", *given, "recipe.fold=[norm]")
    assert (code, err.count("\n")) == (2, 1)
    assert "norms" in err


def test_what_decides_the_bytes(tmp_path: Path) -> None:
    loaded, made = load(GOLDEN / "gqa2"), load_recipe("int4_xnnpack")
    folded, turned = replace(made, fold=list(Fold)), replace(made, rotate=list(Rotate))
    assert len({cache_folder(loaded, recipe, tmp_path) for recipe in (made, folded, turned)}) == 3
    for recipe in (folded, turned):
        assert plain(recipe) == plain(made)
        assert not plain(recipe).fold
        assert not plain(recipe).rotate
        without = done(recipe, None)  # no text: nearest rounding of the rewritten network
        assert without.linear is not None
        assert without.linear.rounding is Rounding.nearest
        assert (without.fold, without.rotate) == (recipe.fold, recipe.rotate)


def test_outliers_cost_nothing_where_they_are_folded(tmp_path: Path) -> None:
    """As `run` makes the weights: a checkpoint's file, its calibration text, parts on disk, eager."""
    lines = (ROOT / "assets" / "tasks" / "sudoku.jsonl").read_text().splitlines()[:60]
    puzzles = [torch.tensor([*json.loads(line)["prompt"].encode()]) for line in lines]
    hidden = torch.full_like(puzzles[0], load(BUNDLED).config.mask_token_id)
    asked = tuple(
        Asked(f"{i}", (Call(torch.cat([p, hidden]), 0, 2 * len(p), torch.arange(2 * len(p))),))
        for i, p in enumerate(puzzles)
    )

    def cost(checkpoint: Path, recipe: Recipe) -> float:
        loaded = load(checkpoint)
        calibration = calibration_of(loaded, recipe, load_task("sudoku").calibration, CALIBRATION_TEXT)
        quantized = quantize(loaded, recipe, tmp_path / "cache", silent, calibration)
        found: dict[bool, dict[int, Tensor]] = {True: {}, False: {}}
        for exact, weights in ((True, Weights(loaded.model, {})), (False, quantized.weights)):
            kept = found[exact]
            run_by_layer(weights, asked, lambda i, _, logits_KV, kept=kept: kept.update({i: logits_KV}))  # type: ignore[misc]
        expected, actual = (torch.cat([*kept.values()]).double().log_softmax(-1) for kept in found.values())
        return float((expected.exp() * (expected - actual)).sum(-1).mean())

    recipe = plain(load_recipe("int4_xnnpack"))
    loud = with_outliers(BUNDLED, tmp_path / "loud", list(Fold))
    without = cost(BUNDLED, recipe)
    assert cost(loud, recipe) > 10 * without
    assert cost(loud, replace(recipe, fold=list(Fold))) < 1.2 * without


def test_float16_is_refused_where_activations_pass_its_end(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outliers, "TIMES", 1e7)
    loud = with_outliers(GOLDEN / "gqa2", tmp_path / "loud", [Fold.up_down])
    lengths = ("export.max_seq_len=64", "validation.n_prompts=8")
    given = (f"checkpoint={loud}", f"output={tmp_path / 'made'}", *lengths, "recipe=fp16_xnnpack")
    code, _, err = pipeline("run", *given)
    assert (code, err.count("\n")) == (4, 1)
    assert "activations pass 65,504, float16's largest, before layers.0.mlp.down_proj" in err
    assert "give recipe.fold=[norms,up_down,v_o] or recipe=fp32_xnnpack" in err
    code, _, err = pipeline("run", *given, "recipe.fold=[up_down]")
    assert code == 0, err
    names = {figure["name"] for figure in read_manifest(tmp_path / "made")["figures"]}
    assert "kl_beside_plain" not in names, "plain float16 is no network here"


def test_the_twin_in_memory_is_the_same(tmp_path: Path) -> None:
    """What `export_model` quantizes, and what is stored where there is no text; a tied one as well."""
    recipe = replace(plain(load_recipe("int4_xnnpack")), fold=list(Fold), rotate=list(Rotate))
    model, twin = (load_hf_model(GOLDEN / "mha-tied")[0] for _ in range(2))
    list(store(model, recipe, tmp_path))
    stored = open_stored(tmp_path, model, recipe)
    rewrite(twin, recipe)
    quantize_model(twin, recipe.dtype, recipe.linear, recipe.embedding)
    held = Weights(twin, {})
    assert twin.lm_head.weight is not twin.embed_tokens.weight
    for name, _ in twin.named_parameters():
        assert torch.equal(stored.rows(name), held.rows(name)), name
