"""Where an error comes from: a fault is located in its layer, noise in its matrix, and a right program has neither."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import weakref
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model import load_hf_model
from pipeline.calibrate import calibration_of
from pipeline.config import CALIBRATION_TEXT, load_recipe, load_task, task_of_checkpoint
from pipeline.load import load
from pipeline.quantize import quantize
from recipes.options import Backend
from recipes.stored import Weights, in_memory
from runtime.artifact import MANIFEST_FILE, MODEL_FILE, REFERENCE_FILE
from runtime.processor import native_float16
from tests.checkpoints import BUNDLED, GOLDEN, ROOT, Build
from tests.resealing import reseal
from validation import eager, ties
from validation.output_layer import run_head
from validation.progress import silent
from validation.quantization_noise import KINDS, quantization_noise
from validation.reference import Sequence, load_reference, n_tokens
from validation.trace import Trace, trace
from validation.trace_places import TraceError
from validation.wrong_layers import CAUSES, WrongLayers, compare_layers, find_wrong_layers

Pipeline = Callable[..., tuple[int, str, str]]
Change = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Made:
    """An artifact and the weights that it was made of."""

    artifact: Path
    weights: Weights
    sequences: tuple[Sequence, ...]

    def find_wrong_layers(self, pte: Path, recipe: str) -> WrongLayers:
        return find_wrong_layers(pte, self.weights, self.sequences, load_recipe(recipe).bounds)


@pytest.fixture(scope="module")
def made(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Made]:
    cache = tmp_path_factory.mktemp("cache")

    def make(checkpoint: str, recipe: str) -> Made:
        artifact = build(checkpoint, recipe)
        folder = BUNDLED if checkpoint == BUNDLED.name else GOLDEN / checkpoint
        loaded, blocks = load(folder), load_recipe(recipe)
        text = load_task(task_of_checkpoint(folder)).calibration
        quantized = quantize(loaded, blocks, cache, silent, calibration_of(loaded, blocks, text, CALIBRATION_TEXT))
        return Made(artifact, quantized.weights, load_reference(artifact / REFERENCE_FILE).sequences)

    return make


def with_fault(made: Made, name: str, change: Change, to: Path) -> Path:
    """The program with the bytes of one weight, or of its scales, changed."""
    weight, _, part = name.partition(":")
    parameter = made.weights.model.get_parameter(weight).data
    right: Tensor = getattr(parameter, part) if part else parameter
    right = right.detach().clone()
    program = (made.artifact / MODEL_FILE).read_bytes()
    # XNNPACK may hold a scale wider than it was chosen.
    forms = [form for form in (right, right.float()) if program.count(raw(form)) == 1]
    to.write_bytes(program.replace(raw(forms[0]), raw(change(forms[0]))))
    return to


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("checkpoint", "recipe"),
    [
        ("dream_sudoku", "int4_xnnpack"),
        ("gqa2", "fp32_xnnpack"),
        ("gqa2", "fp16_xnnpack"),
        ("gqa2", "fp32_portable"),
        ("mqa4-sharded", "int8_xnnpack"),
    ],
)
def test_a_right_program_raises_no_alarm(made: Callable[[str, str], Made], checkpoint: str, recipe: str) -> None:
    case = made(checkpoint, recipe)
    located = case.find_wrong_layers(case.artifact / MODEL_FILE, recipe)
    assert (located.layer, located.message) == (None, "")
    config = case.weights.model.config
    assert len(located.layers) == config.num_hidden_layers
    exact = load_recipe(recipe).bounds.on(native_float16()).fidelity_exact_db
    assert located.embedding_db >= exact
    for layer in located.layers:
        assert layer.is_exact
        assert min(layer.keys_db, layer.values_db, layer.output_db) >= exact


@pytest.mark.parametrize(
    ("layer", "weight", "parts", "cause"),
    [
        (0, "input_layernorm.weight", ["keys", "values", "output"], "its input norm, or k_proj and v_proj"),
        (1, "self_attn.k_proj.weight:scale", ["keys", "output"], "RoPE or k_proj"),
        (2, "self_attn.v_proj.bias", ["values", "output"], "v_proj"),
        (3, "mlp.down_proj.weight:scale", ["output"], CAUSES[()]),
    ],
)
def test_a_fault_in_one_layer_is_located(
    made: Callable[[str, str], Made], tmp_path: Path, layer: int, weight: str, parts: list[str], cause: str
) -> None:
    """A tenth more in one weight of the program: its layer is wrong, in what depends on it, and no other is."""
    case = made("dream_sudoku", "int4_xnnpack")
    pte = with_fault(case, f"layers.{layer}.{weight}", lambda right: right * 1.125, tmp_path / MODEL_FILE)
    located = case.find_wrong_layers(pte, "int4_xnnpack")
    assert located.layer == layer
    assert located.message.startswith(f"layer {layer} ")
    assert located.message.count("wrong") == 1
    assert located.message.endswith(f"; look at {cause}")
    for i, found in enumerate(located.layers):
        assert [wrong.split()[0] for wrong in found.wrong] == (parts if i == layer else []), i


def test_a_fault_of_a_float_program_is_located(made: Callable[[str, str], Made], tmp_path: Path) -> None:
    case = made("gqa2", "fp32_xnnpack")

    def one_weight(right: Tensor) -> Tensor:
        right[3, 5] += 0.01
        return right

    pte = with_fault(case, "layers.0.self_attn.k_proj.weight", one_weight, tmp_path / "k.pte")
    assert case.find_wrong_layers(pte, "fp32_xnnpack").message.startswith("layer 0 is wrong: keys ")
    pte = with_fault(case, "embed_tokens.weight", lambda right: right * 1.001, tmp_path / "embedding.pte")
    located = case.find_wrong_layers(pte, "fp32_xnnpack")
    assert located.layer is None
    assert located.message.startswith("the embedding is wrong: 60.0 dB")
    pte = with_fault(case, "norm.weight", lambda right: right * 1.01, tmp_path / "norm.pte")
    message = case.find_wrong_layers(pte, "fp32_xnnpack").message
    assert message.startswith("layer 1 (or the norm and output layer after it) is wrong: output 40.")


def recorded(weights: Weights, sequences: tuple[Sequence, ...], order: list[int]) -> Trace:
    """What a program would give that runs these layers, and does right what they do."""
    margins = ties.TieMargins(n_tokens(sequences))
    runs = list(eager.run_layers(weights, sequences, None, margins, order=order))
    x_1ND = [eager.embed(weights, sequences, None), *(run.x_1ND for run in runs)]
    logits: list[Tensor] = []
    run_head(weights, sequences, x_1ND[-1], lambda i, j, logits_KV: logits.append(logits_KV), None, margins)
    k_1NGd, v_1NGd = (tuple(getattr(run, name) for run in runs) for name in ("k_1NGd", "v_1NGd"))
    return Trace(sequences, tuple(x_1ND[:-1]), k_1NGd, v_1NGd, tuple(logits))


@pytest.mark.parametrize(
    ("order", "layer", "message"),
    [
        ([0, 1, 2, 3], None, ""),
        ([0, 1, 3], 2, "layer 2 is missing"),
        ([1, 2, 3], 0, "layer 0 is missing"),
        ([0, 1, 2], 3, "layer 3 is missing"),
        ([0], 1, "layers 1, 2 and 3 are missing"),
        ([0, 1, 2, 2, 3], 2, "layer 2 is run twice"),
        ([0, 1, 2, 3, 3, 3], 3, "layer 3 is run 3 times"),
        ([0, 1, 1, 3], 1, "layer 2 is missing. layer 1 is run twice"),
        ([0, 2, 1, 3], 1, "layers 1 and 2 are swapped"),
        ([0, 2, 3, 1], 1, "layers are run in the order 0, 2, 3, 1"),
    ],
)
def test_layers_that_are_not_where_they_belong_are_named(
    made: Callable[[str, str], Made], order: list[int], layer: int | None, message: str
) -> None:
    case = made("dream_sudoku", "int4_xnnpack")
    bounds = load_recipe("int4_xnnpack").bounds
    short = tuple(sequence for sequence in case.sequences if sequence.name.startswith("short"))[:2]
    traced = recorded(case.weights, short, order)
    located = compare_layers(traced, case.weights, bounds)
    assert (located.layer, located.message, located.order) == (layer, message, tuple(order))
    assert all(found.wrong == () for found in located.layers)


def test_a_wrong_layer_among_moved_ones_is_still_found(made: Callable[[str, str], Made]) -> None:
    case = made("dream_sudoku", "int4_xnnpack")
    bounds = load_recipe("int4_xnnpack").bounds
    short = tuple(sequence for sequence in case.sequences if sequence.name.startswith("short"))[:2]
    traced = recorded(case.weights, short, [0, 1, 3])
    noise = torch.randn(traced.k_1NGd[0].shape, generator=torch.Generator().manual_seed(0))

    def with_noise(*layers: int) -> Trace:
        """Their keys and values say nothing of which layer they are."""
        k, v = (
            tuple(noise if i in layers else part for i, part in enumerate(parts))
            for parts in (traced.k_1NGd, traced.v_1NGd)
        )
        return dataclasses.replace(traced, k_1NGd=k, v_1NGd=v)

    located = compare_layers(with_noise(0), case.weights, bounds)
    assert (located.layer, located.order) == (2, (0, 1, 3))
    assert re.fullmatch(r"layer 2 is missing\. layer 0 is wrong: keys .*; values .*", located.message)
    # Beside the gap it cannot be told which of the two is missing.
    located = compare_layers(with_noise(1), case.weights, bounds)
    assert (located.layers, located.order) == ((), ())
    assert located.message == "it runs 3 layers of 4, and not all of them are the model's"


def test_faults_of_all_layers_are_told_apart(made: Callable[[str, str], Made]) -> None:
    """As a program would be recorded that swaps the keys of two layers, or rotates them by another position."""
    case = made("dream_sudoku", "int4_xnnpack")
    bounds = load_recipe("int4_xnnpack").bounds
    short = tuple(sequence for sequence in case.sequences if sequence.name.startswith("short"))
    traced = trace(case.artifact / MODEL_FILE, short[:4])
    assert traced.sequences == short[:4]
    assert compare_layers(traced, case.weights, bounds).message == ""
    swapped = dataclasses.replace(traced, k_1NGd=tuple(traced.k_1NGd[i] for i in (0, 2, 1, 3)))
    located = compare_layers(swapped, case.weights, bounds)
    assert located.layer == 1
    assert re.fullmatch(r"layer 1 is wrong: keys [^.]*\.\d dB[^.]*\. layer 2 is wrong: keys .*", located.message)
    turned = dataclasses.replace(traced, k_1NGd=tuple(k_1NGd.roll(1, 1) for k_1NGd in traced.k_1NGd))
    message = compare_layers(turned, case.weights, bounds).message
    assert message.startswith("every layer is wrong: keys ")
    assert message.endswith(" in the first; look at RoPE or k_proj")
    broken = dataclasses.replace(traced, v_1NGd=tuple(v_1NGd * torch.nan for v_1NGd in traced.v_1NGd))
    assert compare_layers(broken, case.weights, bounds).layer == 0
    other = dataclasses.replace(traced, logits=tuple(logits_KV[:, 1:] for logits_KV in traced.logits))
    with pytest.raises(TraceError, match="of the program are"):
        compare_layers(other, case.weights, bounds)


@pytest.fixture(scope="module")
def golden(build: Build) -> tuple[Weights, tuple[Sequence, ...]]:
    """gqa2 in float32, with the recorded sequences of its artifact."""
    model, _, _ = load_hf_model(GOLDEN / "gqa2", dtype=torch.float32)
    return in_memory(model, Backend.xnnpack), load_reference(build("gqa2", "fp32_xnnpack") / REFERENCE_FILE).sequences


def test_noise_is_found_in_its_matrix(golden: tuple[Weights, tuple[Sequence, ...]]) -> None:
    """A model that differs from float32 in one matrix: noise of known size there, and in no other."""
    float32, sequences = golden
    model, _, _ = load_hf_model(GOLDEN / "gqa2", dtype=torch.float32)
    weight = model.get_parameter("layers.0.mlp.up_proj.weight")
    weight.data = weight.data * 1.01
    noise = quantization_noise(float32, in_memory(model, Backend.xnnpack), sequences, silent)
    exact = 200.0
    assert noise.embedding_db == noise.lm_head_db == exact
    first, second = noise.layers
    assert first.matrices == dict.fromkeys(KINDS, exact) | {"up_proj": pytest.approx(40, abs=0.01)}
    assert second.matrices == dict.fromkeys(KINDS, exact)
    assert (first.share, second.share) == (1, 0)
    assert first.stream_db == first.alone_db < exact
    assert second.stream_db < exact == second.alone_db  # it carries noise, and adds none
    assert 20 < noise.logits_db < exact


def test_the_floats_of_one_layer_are_in_memory(
    golden: tuple[Weights, tuple[Sequence, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers: list[weakref.ref[Any]] = []
    make = eager._layer

    def watched(*arguments: Any) -> Any:
        assert all(layer() is None for layer in layers)
        made = make(*arguments)
        layers.append(weakref.ref(made))
        return made

    monkeypatch.setattr(eager, "_layer", watched)
    float32, sequences = golden
    quantization_noise(float32, float32, sequences, silent)
    assert len(layers) == 2 * 2


def test_the_command_explains_and_locates(pipeline: Pipeline, build: Build, made: Any, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    shutil.copytree(build("gqa2", "int4_xnnpack"), artifact)
    keys = ["explain", f"artifact={artifact}", f"checkpoint={GOLDEN / 'gqa2'}", f"cache={tmp_path / 'cache'}"]
    code, out, _ = pipeline(*keys, f"output={tmp_path / 'out.json'}")
    assert code == 0
    assert out.splitlines()[-1].endswith("; the program is what was meant, layer by layer")
    result = json.loads((tmp_path / "out.json").read_text())
    layers = result["quantization"]["layers"]
    assert sum(layer["share"] for layer in layers) == pytest.approx(1)
    for layer, recorded in zip(layers, result["program"]["layers"], strict=True):
        assert all(5 < db < 60 for db in [layer["stream_db"], layer["alone_db"], *layer["matrices"].values()])
        assert recorded["wrong"] == []
    # What reaches the logits is about what validation found: over fewer tokens, and over all of their rows.
    figures = json.loads((artifact / MANIFEST_FILE).read_text())["figures"]
    (sqnr,) = [figure["value"] for figure in figures if figure["name"] == "sqnr_db"]
    assert result["quantization"]["logits_db"] == pytest.approx(sqnr, abs=2)

    case = made("gqa2", "int4_xnnpack")
    name = "layers.1.self_attn.k_proj.weight:scale"
    with_fault(case, name, lambda right: right * 2, artifact / MODEL_FILE)
    reseal(artifact)
    code, out, err = pipeline(*keys, f"output={tmp_path / 'out.html'}")
    assert code == 5
    assert re.fullmatch(r"error: artifact: layer 1 is wrong: keys -?\d+\.\d dB, .*\n", err)
    page = (tmp_path / "out.html").read_text()
    assert "Not the program that was meant" in page
    assert "Layer 1 is wrong" in page
    assert not re.search(r"""(src|href)=|url\(|@import""", page)
    pictures = [ET.fromstring(found) for found in re.findall(r"<svg.*</svg>", page)]
    titles = [[title.text for title in picture.iter("title")] for picture in pictures]
    db = layers[1]["alone_db"]
    assert f"layer 1, the layer alone: {db:.1f} dB" in titles[0]
    assert f"down, layer 1: {layers[1]['matrices']['down_proj']:.1f}" in titles[1]
    assert [len(found) for found in titles] == [2 * len(layers), len(KINDS) * len(layers)]


def test_wrong_keys_are_one_line(pipeline: Pipeline, build: Build, tmp_path: Path) -> None:
    artifact = build("gqa2", "fp32_xnnpack")
    keys = ["explain", f"artifact={artifact}", f"cache={tmp_path}"]
    for code, given, said in (
        (2, [], "checkpoint is not given"),
        (2, [f"checkpoint={GOLDEN / 'gqa2'}", "output=x.png"], ".json, .svg, .html"),
        (7, [f"checkpoint={GOLDEN / 'gqa2'}", f"output={tmp_path}/no/x.svg"], "there is no folder"),
        (3, [f"checkpoint={GOLDEN / 'mha-tied'}"], "is not the checkpoint"),
        (3, [f"checkpoint={tmp_path / 'none'}"], "no such folder"),
    ):
        found, _, err = pipeline(*keys, *given)
        assert (found, err.count("\n")) == (code, 1), err
        assert said in err
    assert pipeline("explain", f"artifact={tmp_path}", f"checkpoint={BUNDLED}")[0] == 6


def test_the_page_shows_what_the_command_does(pipeline: Pipeline, build: Build, tmp_path: Path) -> None:
    artifact = build("dream_sudoku", "int4_xnnpack")
    picture = tmp_path / "explain.svg"
    keys = [f"artifact={artifact}", f"checkpoint={BUNDLED}", f"cache={tmp_path}", f"output={picture}"]
    code, out, _ = pipeline("explain", *keys)
    assert code == 0
    page = (ROOT / "docs" / "explain.md").read_text()
    shown = [line for line in re.findall(r"```text\n(.*?)```", page, flags=re.DOTALL)[0].splitlines() if line.strip()]
    printed = [line for line in out.splitlines() if line.strip() and " s   peak " not in line]
    assert len(shown) == len(printed)
    for mine, theirs in zip(shown, printed, strict=True):
        _same(mine, theirs)
    kept = (ROOT / "docs" / "explain.svg").read_text()
    _same(*(" ".join(ET.fromstring(svg).itertext()).partition("q")[2] for svg in (kept, picture.read_text())))


def _same(mine: str, theirs: str) -> None:
    """The same words, and numbers that differ no more than machines do."""
    number = r"\d+\.?\d*"
    assert re.sub(number, "0", mine).split() == re.sub(number, "0", theirs).split()
    for a, b in zip(re.findall(number, mine), re.findall(number, theirs), strict=True):
        assert float(a) == pytest.approx(float(b), rel=0.1, abs=1.0), (mine, theirs)
