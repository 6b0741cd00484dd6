"""Rescaled and rotated networks compute the same function, and outliers cost them nothing when they are rounded."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from model import DreamEdge, load_hf_model
from recipes.factors import WeightGrid, channel_factors
from recipes.options import Fold, Rotate
from recipes.quantization import QuantizationError
from recipes.rescaling import transformed
from recipes.rotation import check_rotation, rotate_rows
from recipes.stored import parts
from tests.checkpoints import BUNDLED, GOLDEN, GOLDEN_NAMES, ROOT
from tests.outliers import OUTLIERS, cost_of_int4, input_rms, logits, rewritten

ALL = list(Fold)
WAYS: list[tuple[Sequence[Fold], Sequence[Rotate]]] = [
    *(([fold], []) for fold in Fold),
    *(([], [rotate]) for rotate in Rotate),
    (ALL, list(Rotate)),
]


def golden(name: str, dtype: torch.dtype) -> DreamEdge:
    """With norms and biases that are none of them alike, as a trained network's, and an output layer of its own."""
    model, _, _ = load_hf_model(GOLDEN / name, dtype)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.data, requires_grad=False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model


def tokens(model: DreamEdge) -> Tensor:
    return torch.randint(0, model.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("fold", "rotate"), WAYS, ids=lambda kinds: "+".join(kind.value for kind in kinds) or "-")
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_the_function_is_the_same(name: str, fold: Sequence[Fold], rotate: Sequence[Rotate]) -> None:
    model = golden(name, torch.float64)
    for outliers in OUTLIERS.values():  # so that no factor is 1
        outliers(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    ids = tokens(model)
    expected = logits(model, ids)
    for inputs in (None, input_rms(model, ids)):
        made = rewritten(model, fold, rotate, inputs)
        error = (logits(made, ids) - expected).norm() / expected.norm()
        assert float(error) < 1e-10
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()), "changed in place"
    changed = {key.split(".")[-2] for key, tensor in made.state_dict().items() if not torch.equal(tensor, before[key])}
    norms = {"input_layernorm", "post_attention_layernorm", "norm"}
    norm_readers = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"}
    moved: dict[Fold | Rotate, set[str]] = {
        Fold.norms: norms | norm_readers,
        Fold.up_down: {"up_proj", "down_proj"},
        Fold.v_o: {"v_proj", "o_proj"},
        Rotate.r1: norms | norm_readers | {"embed_tokens", "o_proj", "down_proj"},
        Rotate.r2: {"v_proj", "o_proj"},
    }
    assert changed == set().union(*(moved[kind] for kind in fold), *(moved[kind] for kind in rotate))


def test_parts_become_float32() -> None:
    model = golden("gqa2", torch.bfloat16)
    ids = tokens(model)
    expected = logits(copy.deepcopy(model).float(), ids)
    made = DreamEdge(model.config).eval()
    for name, part in parts(model).items():
        made.get_submodule(name).load_state_dict(
            (new := transformed(name, part, model, ALL, list(Rotate))).state_dict()
        )
        assert {parameter.dtype for parameter in new.parameters()} == {torch.float32}
    assert float((logits(made, ids) - expected).norm() / expected.norm()) < 1e-5


@pytest.fixture(scope="module")
def sudoku() -> tuple[DreamEdge, Tensor, Tensor]:
    """The bundled network; tokens [N, 38] of puzzles and hidden answers: to choose by, and to measure on."""
    lines = (ROOT / "assets" / "tasks" / "sudoku.jsonl").read_text().splitlines()[:150]
    puzzles = torch.tensor([list(json.loads(line)["prompt"].encode()) for line in lines])
    model, _, config = load_hf_model(BUNDLED)
    ids = torch.cat([puzzles, torch.full_like(puzzles, config.mask_token_id)], dim=1)
    return model, ids[:50], ids[50:]


@pytest.mark.parametrize("fold", [*([fold] for fold in Fold), ALL], ids=lambda kinds: "+".join(k.value for k in kinds))
def test_outliers_are_folded_away(sudoku: tuple[DreamEdge, Tensor, Tensor], fold: list[Fold]) -> None:
    model, calibration, ids = sudoku
    expected = logits(model, ids)
    without = cost_of_int4(copy.deepcopy(model), ids, expected)
    loud = copy.deepcopy(model)
    for kind in fold:
        OUTLIERS[kind](loud)
    assert float((logits(loud, ids) - expected).norm() / expected.norm()) < 1e-5
    folded = rewritten(loud, fold, [], input_rms(loud, calibration))
    assert cost_of_int4(loud, ids, expected) > 10 * without
    assert cost_of_int4(folded, ids, expected) < 1.2 * without


def test_factors_of_silent_channels() -> None:
    """Zeros, and what is no number, of what is heard and of what reads it."""
    reader = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    reader[:, 3] = 0
    written, rms = torch.rand(64) + 0.1, torch.rand(64) + 0.1
    written[5], rms[7], rms[9], rms[11] = 0, 0, torch.inf, 1e30
    for heard in (None, rms):
        for matrix in (reader, torch.zeros_like(reader)):
            for rounding in (None, WeightGrid(), WeightGrid(8, None)):
                factors = channel_factors(written, [matrix], heard, rounding)
                assert factors.isfinite().all()
                assert (factors > 0).all()
                if rounding is None:
                    assert (factors[[3, 5, 7, 9]] == 1).all(), "silence does not stand out"


def test_dead_channels_of_a_norm_stay_dead() -> None:
    model = golden("gqa2", torch.float64)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data[:3] = 0
    ids = tokens(model)
    for fold, rotate in WAYS:
        made = logits(rewritten(model, fold, rotate), ids)
        assert float((made - logits(model, ids)).norm() / made.norm()) < 1e-10


@pytest.mark.parametrize("n", [1, 7, 16, 96, 128, 896, 3584])
def test_a_rotation_is_orthogonal_and_spreads(n: int) -> None:
    rows = min(n, 64)
    made = torch.eye(n, dtype=torch.float64)[-rows:]
    rotate_rows(made)
    assert torch.allclose(made @ made.T, torch.eye(rows, dtype=torch.float64), atol=1e-12)
    assert n == 1 or float(made.abs().max()) <= (2 / n) ** 0.5 + 1e-12
    columns = torch.eye(n, dtype=torch.float64)[-rows:].T  # the same rows, with other strides
    rotate_rows(columns.T)
    assert torch.allclose(columns.T, made, atol=1e-12)


def test_sizes_that_cannot_be_rotated() -> None:
    config = load_hf_model(GOLDEN / "gqa2")[2]
    odd = replace(config, hidden_size=8 * 131, num_attention_heads=4)
    for kind, name, size in ((Rotate.r1, "hidden_size", 1048), (Rotate.r2, "head_dim", 262)):
        with pytest.raises(QuantizationError) as caught:
            check_rotation(odd, [kind])
        assert str(caught.value) == (
            f"rotate {kind.value}: {name} {size} is a power of two times 131; "
            "a rotation needs an odd factor of at most 127"
        )
    check_rotation(odd, [])
    for good in (256, 512, 896, 3584):
        check_rotation(replace(config, hidden_size=good), list(Rotate))


def test_a_tied_output_layer_is_refused() -> None:
    model, _, _ = load_hf_model(GOLDEN / "mha-tied")
    for fold, rotate in (([Fold.norms], []), ([], [Rotate.r1])):
        with pytest.raises(
            QuantizationError, match=r"^fold norms, rotate r1: the output layer needs a weight of its own"
        ):
            transformed("norm", model.norm, model, fold, rotate)
