"""Validation can fail: wrong models, wrong programs and wrong formats are noticed, by the figure that should."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import DreamEdge, load_hf_model
from pipeline.config import DEFAULT_TEXT, load_recipe, names_of
from pipeline.load import load
from recipes.options import Backend
from recipes.stored import Weights, in_memory
from runtime.artifact import MODEL_FILE, REFERENCE_FILE, read_manifest
from runtime.errors import UsageError
from tests.checkpoints import GOLDEN, ROOT, Build
from tests.faults.judge import quantized, right
from validation import effort, stream, tied_calls
from validation.expected_format import expected_format
from validation.figure import TIE_MARGIN, Figure
from validation.figures import fidelity, metadata, program_format, quality, repeatability, sqnr_db
from validation.float32 import Float32, Request, logits_of, run_float32
from validation.format import read_format
from validation.judge import bounds_of, expectations, measure
from validation.logits import Summary, digest, summarize
from validation.material import Material, material_of
from validation.progress import silent
from validation.recording import make_reference, run_eager
from validation.reference import Call, Expected, Reference, Sequence, load_reference, save_reference
from validation.replay import Replay, replay
from validation.settings import Budget, TaskConfig, ValidationConfig, check_bounds
from validation.tasks import load_checker, read_prompts, wilson_interval
from validation.ties import TieMargins

Case = tuple[Path, Reference, Replay]


def quantized_model(name: str, recipe: str) -> DreamEdge:
    return quantized(GOLDEN / name, load_recipe(recipe))


@pytest.fixture(scope="module")
def int4(build: Build) -> Case:
    artifact = build("gqa2", "int4_xnnpack")
    reference_file = artifact / REFERENCE_FILE
    return artifact, load_reference(reference_file), replay(artifact / "model.pte", reference_file)


def failing(figures: list[Figure]) -> set[str]:
    return {figure.name for figure in figures if not figure.ok}


def against(case: Case, model: DreamEdge) -> set[str]:
    """The fidelity figures that fail when the program is held against this model in eager."""
    _, reference, replayed = case
    float32, _, _ = load_hf_model(GOLDEN / "gqa2")
    whole = tuple(sequence for sequence in reference.sequences if sequence.name.startswith("whole"))
    found = Float32(whole, {}, logits_of(in_memory(float32, Backend.xnnpack), whole, {}))
    again, _ = run_eager(in_memory(model, Backend.xnnpack), found, reference.sequences)
    # The margins of the right model: a wrong one must not choose its own examination.
    expected = tuple(
        tuple(dataclasses.replace(new, tie_margin=old.tie_margin) for new, old in zip(*pair, strict=True))
        for pair in zip(again, reference.expected, strict=True)
    )
    recorded = dataclasses.replace(reference, expected=expected)
    return failing(fidelity(recorded, replayed, bounds_of(load_recipe("int4_xnnpack"), Budget())))


def test_the_right_model_passes(int4: Case) -> None:
    assert against(int4, quantized_model("gqa2", "int4_xnnpack")) == set()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    "linear", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"]
)
def test_one_wrong_int4_weight_is_noticed(int4: Case, linear: str, layer: int) -> None:
    """One step of one weight of one matrix."""
    model = quantized_model("gqa2", "int4_xnnpack")
    weight = model.get_submodule(f"layers.{layer}.{linear}").weight.qdata  # type: ignore[union-attr]
    assert isinstance(weight, Tensor)
    row, column = divmod(int(weight.abs().argmax()), weight.shape[1])
    weight[row, column] -= int(weight[row, column].sign())
    assert "fidelity_exact_db" in against(int4, model)


def test_a_wrong_scale_and_a_missing_bias_are_noticed(int4: Case) -> None:
    scaled = quantized_model("gqa2", "int4_xnnpack")
    scale = scaled.get_submodule("layers.1.mlp.up_proj").weight.scale  # type: ignore[union-attr]
    scale[3, 0] *= 2  # type: ignore[index,operator]
    assert "fidelity_exact_db" in against(int4, scaled)
    unbiased = quantized_model("gqa2", "int4_xnnpack")
    bias = unbiased.get_submodule("layers.0.self_attn.v_proj").bias
    assert isinstance(bias, Tensor)
    bias.zero_()
    assert "fidelity_exact_db" in against(int4, unbiased)


def moved(case: Case, names: list[str], db: float) -> Replay:
    """The program's answers to the first calls of these sequences, with noise."""
    _, _, replayed = case
    logits, generator = dict(replayed.logits), torch.Generator().manual_seed(0)
    for name in names:
        first, *rest = logits[name]
        noise = torch.randn(first.vector.shape, generator=generator)
        vector = first.vector + noise * first.vector.norm() / noise.norm() * 10 ** (-db / 20)
        logits[name] = [dataclasses.replace(first, vector=vector), *rest]
    return dataclasses.replace(replayed, logits=logits)


def test_how_far_ties_lead_is_measured_on_the_few_calls_that_are_far(
    int4: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, reference, replayed = int4
    bounds = bounds_of(load_recipe("int4_xnnpack"), Budget())
    weights = in_memory(quantized_model("gqa2", "int4_xnnpack"), Backend.xnnpack)
    whole = [sequence.name for sequence in reference.sequences if sequence.name.startswith("whole")]
    assert tied_calls.with_floors(reference, replayed, weights, bounds) is reference
    # A wrong program is wrong in more calls than a tie makes loud.
    many = moved(int4, whole[: tied_calls.MOST + 1], 25)
    assert tied_calls.with_floors(reference, many, weights, bounds) is reference
    far = moved(int4, whole[:1], 25)
    quiet = tied_calls.with_floors(reference, far, weights, bounds)
    floors = {e.floor_db for row in quiet.expected for e in row} - {math.inf}
    assert len(floors) == 1
    assert min(floors) > 30, "here no tie is as loud as that"
    assert "fidelity_db" in failing(fidelity(quiet, far, bounds))
    monkeypatch.setattr(tied_calls, "MOVED", 0.05)
    loud = tied_calls.with_floors(reference, far, weights, bounds)
    save_reference(loud, tmp_path / "reference.safetensors")
    kept = load_reference(tmp_path / "reference.safetensors")
    assert {e.floor_db for row in kept.expected for e in row} == {e.floor_db for row in loud.expected for e in row}
    assert failing(fidelity(kept, far, bounds)) == set()


def test_a_call_with_a_tie_that_was_not_seen_is_held_to_what_a_tie_makes_of_it(int4: Case) -> None:
    """A few of those that are free of ties; not where more are far, for a wrong weight is seen in all of them."""
    _, reference, _ = int4
    bounds = bounds_of(load_recipe("int4_xnnpack"), Budget())
    weights = in_memory(quantized_model("gqa2", "int4_xnnpack"), Backend.xnnpack)
    free = [s.name for s, row in zip(reference.sequences, reference.expected, strict=True) if row[0].tie_margin > 1e-4]
    assert len(free) > tied_calls.MOST
    far, wrong, many = moved(int4, free[:1], 100), moved(int4, free[:1], 60), moved(int4, free[:4], 100)
    assert failing(fidelity(reference, far, bounds)) == {"fidelity_exact_db"}
    floored = tied_calls.with_floors(reference, far, weights, bounds)
    assert failing(fidelity(floored, far, bounds)) == set()
    assert "fidelity_exact_db" in failing(fidelity(floored, wrong, bounds))
    assert tied_calls.with_floors(reference, many, weights, bounds) is reference


def test_wrong_attention_fails_the_long_calls_too(int4: Case) -> None:
    """No single weight, but a fault of structure: beyond what rounding ties explain."""
    model = quantized_model("gqa2", "int4_xnnpack")
    layer = model.layers[0]
    model.layers[0], model.layers[1] = model.layers[1], layer
    assert against(int4, model) == {"fidelity_db", "fidelity_exact_db"}


def test_calls_free_of_ties_agree_to_float32_rounding(int4: Case) -> None:
    """What the two bounds of fidelity rest on: far from a tie nothing is lost but float32 rounding."""
    _, reference, replayed = int4
    seen = 0
    for sequence, expected in zip(reference.sequences, reference.expected, strict=True):
        for call, actual in zip(expected, replayed.logits[sequence.name], strict=True):
            if call.tie_margin > TIE_MARGIN:
                assert sqnr_db(call.eager, actual.vector) > 100, sequence.name
                seen += 1
    assert seen >= 8


def test_tie_margins_see_a_tie() -> None:
    x = torch.zeros(2, 64)
    x[:, :3] = torch.tensor([-1.0, 1.55, 0.005])  # a step is 0.01: 0.005 lies in the middle
    x[1, 2] = 0.0062
    ties = TieMargins(3)
    ties.note(x, torch.tensor([0, 1]))
    assert ties.margin_N[0] < 1e-5
    assert ties.margin_N[1] == pytest.approx(0.12, abs=1e-4)
    assert ties.margin_N[2] == torch.inf
    one, two = (Call(torch.zeros(n, dtype=torch.int64), 0, n, torch.arange(n)) for n in (1, 2))
    # A call is as uncertain as those before it in its sequence.
    assert ties.by_call((Sequence("a", (two,)), Sequence("b", (one,)))) == [[ties.margin_N[0]], [float("inf")]]
    assert ties.by_call((Sequence("a", (one, two)),)) == [[ties.margin_N[0], ties.margin_N[0]]]


def test_a_program_that_diverges_more_than_its_model_fails(int4: Case) -> None:
    _, reference, replayed = int4
    bounds = bounds_of(load_recipe("int4_xnnpack"), Budget())
    torch.manual_seed(0)
    noise = {
        name: [summarize(kept.vector + kept.vector.std() * torch.randn_like(kept.vector)) for kept in calls]
        for name, calls in replayed.logits.items()
    }
    noisy = dataclasses.replace(replayed, logits=noise)
    assert failing(quality(reference, noisy, bounds)) == {"kl_divergence"}  # the others are reported


def test_no_program_has_to_come_nearer_than_rounding_leads(int4: Case) -> None:
    """What two orders of summation in eager differ by, no program can be blamed for."""
    _, reference, replayed = int4
    bounds = bounds_of(load_recipe("int4_xnnpack"), Budget())
    assert 98 < reference.floor_db < 138
    exact = [(e, a) for e, a in pairs(reference, replayed) if e.tie_margin > TIE_MARGIN]
    worst = min(sqnr_db(e.eager, a.vector) for e, a in exact)
    beyond = bounds | {"fidelity_exact_db": worst + 1}
    unrounded = dataclasses.replace(reference, floor_db=math.inf)
    assert failing(fidelity(unrounded, replayed, beyond)) == {"fidelity_exact_db"}
    rounded = dataclasses.replace(reference, floor_db=worst)
    (figure,) = (f for f in fidelity(rounded, replayed, beyond) if f.name == "fidelity_exact_db")
    assert (figure.ok, figure.bound) == (True, worst)


def pairs(reference: Reference, replayed: Replay) -> Iterator[tuple[Expected, Summary]]:
    for sequence, expected in zip(reference.sequences, reference.expected, strict=True):
        yield from zip(expected, replayed.logits[sequence.name], strict=True)


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("solved_percent", -1.0), ("solved_percent", 0.0), ("top1_agreement", 0.0), ("top1_agreement", 1.1),
        ("cosine", -1.0), ("fidelity_db", 0.0), ("kl_divergence", math.inf), ("kl_divergence", -1.0),
        ("max_abs_diff", math.nan), ("solved_drop", 100.0), ("planned_memory", -1.0),
    ],
)  # fmt: skip
def test_a_bound_that_decides_nothing_is_refused(name: str, bound: float) -> None:
    with pytest.raises(UsageError, match=rf"^bounds\.{name} .*no verdict could come of it"):
        check_bounds("bounds.", {name: bound})


def test_the_recipes_have_bounds_that_decide() -> None:
    for name in names_of("recipe"):
        check_bounds("recipe.bounds.", vars(load_recipe(name).bounds))


def test_nan_is_never_within_bounds(int4: Case) -> None:
    _, reference, replayed = int4
    broken = {name: [summarize(kept.vector * torch.nan) for kept in calls] for name, calls in replayed.logits.items()}
    bounds = bounds_of(load_recipe("int4_xnnpack"), Budget())
    figures = fidelity(reference, dataclasses.replace(replayed, logits=broken), bounds)
    assert failing(figures) == {"fidelity_db", "fidelity_exact_db"}


def test_repeatability_sees_one_bit(int4: Case) -> None:
    _, _, replayed = int4
    name = next(iter(replayed.logits))
    logits = replayed.logits[name][0].vector.clone()  # a small vocabulary is kept whole
    assert digest(logits) == replayed.digests[name][0]
    logits.view(torch.int32)[0, 0] ^= 1
    other = replayed.digests | {name: [digest(logits), *replayed.digests[name][1:]]}
    assert repeatability(replayed, replayed).ok
    figure = repeatability(replayed, dataclasses.replace(replayed, digests=other))
    assert (figure.value, figure.where) == (1, f"{name}/0")


def test_a_second_run_of_a_large_program_is_over_the_shortest_calls(int4: Case) -> None:
    artifact, reference, replayed = int4
    lengths = {s.name: sum(len(call.tokens) for call in s.calls) for s in reference.sequences}
    kinds: dict[str, list[str]] = {}
    for name in sorted(lengths, key=lengths.__getitem__):
        kinds.setdefault(name.rstrip("-0123456789"), []).append(name)
    shorter = {names[0] for kind, names in kinds.items() if kind != "max-length"}
    spare = lengths[kinds["short"][1]]
    tokens = sum(lengths[name] for name in shorter) + spare
    again = replay(artifact / "model.pte", artifact / REFERENCE_FILE, solve=False, tokens=tokens)
    assert set(again.digests) > shorter, "one of each kind"
    assert {lengths[name] for name in set(again.digests) - shorter} == {spare}, "then the shortest of all"
    figure = repeatability(replayed, again)
    calls = [sum(map(len, run.digests.values())) for run in (again, replayed)]
    assert (figure.value, figure.where) == (0, f"{calls[0]} of {calls[1]} calls, the shortest")
    name = next(iter(shorter))
    assert not repeatability(replayed, dataclasses.replace(again, digests={name: [""]})).ok


@pytest.mark.parametrize(
    ("built", "promised", "figures"),
    [
        ("int8_xnnpack", "int4_xnnpack", {"wrong_linear_weights", "bytes_per_weight", "changed_weights"}),
        (
            "fp32_xnnpack",
            "int4_xnnpack",
            {"unexpected_operators", "wrong_linear_weights", "bytes_per_weight", "changed_weights"},
        ),
        (
            "fp32_portable",
            "fp32_xnnpack",
            {"unexpected_operators", "wrong_linear_weights", "bytes_per_weight", "changed_weights", "planned_memory"},
        ),
    ],
)
def test_a_program_of_another_recipe_is_found_out(build: Build, built: str, promised: str, figures: set[str]) -> None:
    artifact = build("gqa2", built)
    model = quantized_model("gqa2", promised)
    recipe = load_recipe(promised)
    expected = expected_format(in_memory(model, recipe.backend), recipe, 256, 256, {})
    assert failing(program_format(read_format(artifact / "model.pte"), expected)) == figures


@pytest.mark.parametrize("recipe", ["int4_xnnpack", "fp32_xnnpack"])
def test_one_weight_of_any_kind_is_missed(build: Build, recipe: str) -> None:
    """Each tensor's bytes are in the program; with one element the least bit off they are not, and it is named."""
    artifact = build("gqa2", recipe)
    found = read_format(artifact / "model.pte")
    model, blocks = quantized_model("gqa2", recipe), load_recipe(recipe)

    def changed() -> Figure:
        expected = expected_format(in_memory(model, Backend.xnnpack), blocks, 256, 256, {})
        (figure,) = (f for f in program_format(found, expected) if f.name == "changed_weights")
        return figure

    assert changed().ok
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == 2 * 12 + 3
    for name, parameter in model.named_parameters():
        inner = [getattr(parameter, "qdata", parameter.data), getattr(parameter, "scale", parameter.data)]
        for kind, tensor in zip([name, f"{name}.scale"], inner, strict=True):
            element = tensor.view(-1)[-1:]
            before = element.clone()
            element.copy_(element + (1 if element.dtype == torch.int8 and before < 7 else -1))
            figure = changed()
            assert figure.value == 1
            assert figure.where == (kind if hasattr(parameter, "qdata") else name)
            element.copy_(before)


def test_wrong_metadata_is_named(int4: Case) -> None:
    artifact, _, replayed = int4
    _, expected = expectations(artifact, read_manifest(artifact))
    assert metadata(replayed, expected).ok
    wrong = dataclasses.replace(replayed, metadata=replayed.metadata | {"get_mask_id": 0, "logits_shift": 0})
    figure = metadata(wrong, expected)
    assert (figure.value, figure.where) == (2, "get_mask_id, logits_shift")


def test_reference_survives_a_round_trip(int4: Case, tmp_path: Path) -> None:
    artifact, reference, _ = int4
    again = tmp_path / REFERENCE_FILE
    save_reference(reference, again)
    assert again.read_bytes() == (artifact / REFERENCE_FILE).read_bytes()


PUZZLE, ANSWER = "1003\n0300\n3210\n4132", "1423\n2341\n3214\n4132"


@pytest.mark.parametrize(
    ("answer", "solves"),
    [
        (ANSWER, True),
        (ANSWER.replace("1423", "1243"), False),  # a column and a box hold a digit twice
        ("2413\n1342\n3214\n4132", False),  # a given was changed
        ("1423\n2341\n3214", False),
        ("1423\n2341\n3214\n4130", False),
        ("", False),
        (ANSWER + "\n", False),
    ],
)
def test_the_sudoku_checker(answer: str, solves: bool) -> None:
    assert load_checker(ROOT / "assets" / "tasks" / "sudoku.py")(PUZZLE, answer) == solves


def test_broken_prompts_name_their_line(tmp_path: Path) -> None:
    from runtime.errors import UsageError

    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "1"}\n{"prompt": \n')
    with pytest.raises(UsageError, match="line 2"):
        read_prompts(file)


def test_a_checker_is_a_file_with_a_check(tmp_path: Path) -> None:
    from runtime.errors import UsageError

    file = tmp_path / "checker.py"
    for content, said in [
        ("", "no function check"),
        ("check = 1", "no function check"),
        ("1 / 0", "ZeroDivisionError"),
    ]:
        file.write_text(content)
        with pytest.raises(UsageError, match=said):
            load_checker(file)


def test_wilson_intervals() -> None:
    """Against the values of Newcombe (1998), table I, method 3."""
    for k, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson_interval(k, n) == pytest.approx((low, high), abs=5e-5)


def test_float16_is_measured_against_its_exact_sums(build: Build) -> None:
    """Large activations round to as much as 50 dB: no right program is blamed for what float16 itself does."""
    artifact = build("gqa2", "fp16_xnnpack")
    reference = load_reference(artifact / REFERENCE_FILE)
    assert 45 < reference.floor_db < 70
    replayed = replay(artifact / "model.pte", artifact / REFERENCE_FILE)
    demanding = {"fidelity_db": 200.0, "fidelity_exact_db": 200.0}
    assert failing(fidelity(reference, replayed, demanding)) == set()


def test_of_a_large_network_the_longest_call_repeats_a_token(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager computes it once; a right program, which computes all, agrees."""
    monkeypatch.setattr(effort, "LARGE", 0)
    monkeypatch.setattr(stream, "LONG", 64)
    artifact = build("gqa2", "int4_xnnpack")
    it = right(artifact, GOLDEN / "gqa2")
    model, _, _ = load_hf_model(GOLDEN / "gqa2", dtype=None)
    material = Material([torch.arange(5, 29) + i for i in range(8)], is_random=True)
    request = Request(material, None, 8, ValidationConfig(n_prompts=8), it.max_seq_len, it.max_rows)
    float32 = run_float32(Weights(model, {}), request, silent)
    reference = make_reference(it.weights, float32, None, request, silent)
    longest = next(sequence for sequence in reference.sequences if sequence.name == "max-length")
    assert [len(call.tokens) for call in longest.calls] == [it.max_seq_len, 64]
    save_reference(reference, tmp_path / "reference.safetensors")
    bounds, expected = expectations(artifact, read_manifest(artifact))
    measured = measure(artifact / MODEL_FILE, tmp_path / "reference.safetensors", reference, bounds, expected)
    assert [str(figure) for figure in measured.figures if not figure.ok] == []


def test_of_a_large_network_less_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effort, "LARGE", 0)
    english, nobody = load(ROOT / "assets" / "dream_english"), load(GOLDEN / "gqa2")
    settings = (TaskConfig(), ValidationConfig(), 256, DEFAULT_TEXT)
    read = material_of(english.folder, english.tokenizer, english.config, *settings)
    assert {len(text) for text in read.texts} == {24}
    assert len(read.texts) == 32
    drawn = material_of(nobody.folder, None, nobody.config, *settings)
    assert len(drawn.prompts) == 8
    request = Request(drawn, None, 8, ValidationConfig(), 64, 64)
    found = run_float32(Weights(nobody.model, {}), request, silent)
    shares = [(sequence.calls[0].tokens == nobody.config.mask_token_id).double().mean() for sequence in found.whole]
    assert shares[0] > 2 * shares[-1] > 0, "all of the answer is hidden in the first, little in the last"
    assert found.greedy is None
