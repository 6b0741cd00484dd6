"""Quality is measured on text, and judged by what the owner of a checkpoint allows."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from model import DreamEdge, load_hf_model
from pipeline.calibrate import calibration_of
from pipeline.config import CALIBRATION_TEXT, DEFAULT_TEXT, load_recipe
from pipeline.load import load
from pipeline.road import _warn_unused
from recipes.gptq import LayerInputs, add_squares, gptq, hessian_blocks, inputs_by_layer, inverse_factor
from recipes.options import Dtype, LinearQuant, Rounding, Scales
from recipes.quantization import QuantizationError, check_sizes, quant_of, quantize_module
from recipes.threads import one_thread_each
from runtime.artifact import REFERENCE_FILE, read_manifest
from runtime.errors import UsageError
from runtime.tokenizer import load_tokenizer
from tests.checkpoints import GOLDEN, ROOT, Build
from validation.figure import Figure
from validation.figures import quality
from validation.judge import bounds_of
from validation.logits import SKETCH, confidence, log_probability, summarize, top_columns
from validation.material import Material, hidden_texts, material_of
from validation.reference import load_reference
from validation.replay import replay
from validation.settings import Budget, TaskConfig, ValidationConfig, check_budget
from validation.texts import hidden_of, read_texts, tokens_of
from validation.verdict import Verdict, _above, verdict_of

ENGLISH = ROOT / "assets" / "dream_english"
Pipeline = Callable[..., tuple[int, str, str]]


def few_texts(folder: Path) -> Path:
    """Enough to see that rounding goes by them: all take a minute."""
    few = folder / "few.jsonl"
    few.write_text("".join(CALIBRATION_TEXT.read_text().splitlines(keepends=True)[:40]))
    return few


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of the English checkpoint: what everybody with a trained one gets."""
    from pipeline.__main__ import main

    folder = tmp_path_factory.mktemp("english")
    lengths = ["export.max_seq_len=64", "validation.n_prompts=12", f"calibration={few_texts(folder)}"]
    paths = [f"checkpoint={ENGLISH}", f"output={folder / 'artifact'}", f"cache={folder / 'cache'}"]
    assert main(["run", "recipe=int4_fast_xnnpack", *paths, *lengths, "budget.kl=0.05"]) == 0
    return folder / "artifact"


def listening(caplog: pytest.LogCaptureFixture) -> logging.Logger:
    """A logger that is heard here, whatever the command line did to the others."""
    log = logging.Logger("listening")
    log.addHandler(caplog.handler)
    return log


def figures_of(artifact: Path) -> dict[str, dict[str, float]]:
    return {figure["name"]: figure for figure in read_manifest(artifact)["figures"]}


def test_rounding_on_text_loses_less_than_rounding_to_the_nearest(english: Path) -> None:
    figures, manifest = figures_of(english), read_manifest(english)
    plain = float(str(figures["kl_beside_plain"]["where"]).rpartition(" ")[2])
    assert figures["kl_divergence"]["value"] < 0.75 * plain
    assert abs(figures["loss_increase"]["value"]) < 0.05
    assert figures["loss"]["value"] < 0.9 * math.log(manifest["model"]["vocab_size"])
    assert 0.5 < figures["order_agreement"]["value"] < 1
    assert figures["kl_divergence"]["bound"] <= manifest["budget"]["kl"] == 0.05
    assert manifest["calibration"]["source"] == "few.jsonl"
    assert manifest["verdict"]["is_judged"]
    assert "within its budget (budget.kl=0.05)" in manifest["verdict"]["words"]


def test_the_budget_is_kept(english: Path, pipeline: Pipeline) -> None:
    """`validate` holds what the manifest says; a bound of its own counts more."""
    code, _, err = pipeline("validate", f"artifact={english}", "bounds.loss=1", "bounds.kl_divergence=1e-6")
    assert code == 5
    assert "loss is" in err
    assert "kl_divergence is" in err


def test_calibration_text_is_asked_for(english: Path, pipeline: Pipeline) -> None:
    """With the checkpoint the program is made again, and by another text it would be another."""
    code, _, err = pipeline("validate", f"artifact={english}", f"checkpoint={ENGLISH}")
    assert (code, "was calibrated with another few.jsonl: give calibration=FILE" in err) == (2, True)


def test_a_budget_that_is_not_met_fails(build: Build) -> None:
    artifact = build("gqa2", "int4_xnnpack")
    reference = load_reference(artifact / REFERENCE_FILE)
    replayed = replay(artifact / "model.pte", artifact / REFERENCE_FILE)
    recipe = load_recipe("int4_xnnpack")
    for budget, failing in ((Budget(), set()), (Budget(kl=1.0), set()), (Budget(kl=1e-7), {"kl_divergence"})):
        figures = quality(reference, replayed, bounds_of(recipe, budget))
        assert {figure.name for figure in figures if not figure.ok} == failing


def test_a_recipe_may_not_lose_more_than_plain_rounding(build: Build) -> None:
    artifact = build("dream_sudoku", "int4_xnnpack")
    reference = load_reference(artifact / REFERENCE_FILE)
    replayed = replay(artifact / "model.pte", artifact / REFERENCE_FILE, solve=False)
    bounds = bounds_of(load_recipe("int4_xnnpack"), Budget())
    assert "kl_beside_plain" in {figure.name for figure in quality(reference, replayed, bounds) if figure.ok}
    better = tuple(
        tuple(e if e.plain is None else replace(e, plain=e.plain / 100) for e in expected)
        for expected in reference.expected
    )
    figures = quality(replace(reference, expected=better), replayed, bounds | {"kl_slack": 0.0})
    assert "kl_beside_plain" in {figure.name for figure in figures if not figure.ok}


def test_no_text_no_verdict_on_quality(build: Build, pipeline: Pipeline, tmp_path: Path) -> None:
    verdict = read_manifest(build("gqa2", "int4_xnnpack"))["verdict"]
    assert not verdict["is_judged"]
    assert "quality was not judged" in verdict["words"]
    assert "random tokens" in verdict["words"]
    given = (f"checkpoint={GOLDEN / 'gqa2'}", f"output={tmp_path / 'a'}")
    code, _, err = pipeline("run", *given, "budget.kl=0.1", "budget.solved=1", "budget.loss=1")
    assert code == 2
    assert all(key in err.splitlines()[-1] for key in ("budget.kl", "budget.loss", "budget.solved"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"\xff\xfe\x00", "is not UTF-8: byte 0 is 0xff"),
        (b'{"words": "no"}\n', 'line 1: expected a JSON object with a "text"'),
        (b'{"text": "a", "prompt": "b"}\n', "line 1"),
        (b'{"text": 7}\n', "line 1"),
        (b'{"messages": [{"role": "user"}]}\n', "line 1"),
        (b"too short\n", "0 of 1 texts have 8 tokens or more"),
    ],
)
def test_a_text_that_cannot_be_used(content: bytes, says: str, pipeline: Pipeline, tmp_path: Path) -> None:
    """One line, before the long work, whether it is to be calibrated with or measured on."""
    file = tmp_path / "texts"
    file.write_bytes(content)
    for key in ("validation.prompts", "calibration"):
        code, _, err = pipeline("run", f"checkpoint={ENGLISH}", f"output={tmp_path / 'a'}", f"{key}={file}")
        assert code == 2, err
        assert says in err.splitlines()[-1]
        assert not (tmp_path / "a").exists()


def test_texts_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text(
        '{"text": "one"}\n\n{"prompt": "two"}\n{"messages": [{"role": "user", "content": "x"}]}'
    )
    (tmp_path / "plain").write_text("first\nparagraph\n\n\nsecond\n")
    one, two, said = read_texts(tmp_path / "lines", "calibration", ENGLISH)
    assert (one, two) == ("one", "two")
    assert "x" in said
    assert read_texts(tmp_path / "plain", "calibration", ENGLISH) == ["first\nparagraph", "second\n"]


def test_a_language_that_is_torn_to_bytes(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(ENGLISH)
    assert tokenizer is not None
    monkeypatch.setattr("validation.texts.log", listening(caplog))
    with caplog.at_level(logging.WARNING):
        tokens_of(tokenizer, ["ꦲꦏ꧀ꦱꦫꦗꦮ" * 4], "calibration: x", 1)
    assert "tokens a character" in caplog.text
    caplog.clear()
    tokens_of(tokenizer, ["The tokenizer knows all of these words well enough."], "calibration: x", 1)
    assert not caplog.text


def test_masks_of_all_ratios() -> None:
    generator = torch.Generator().manual_seed(0)
    for kind in (0, 1, 2):
        for ratio in (0.0, 0.3, 1.0):
            hidden = hidden_of(20, ratio, kind, generator)
            assert not hidden[0]
            assert hidden.sum() == max(1, round(ratio * 19))
            if kind == 1:
                assert hidden[-int(hidden.sum()) :].all()
    texts = [torch.arange(1, 41) + i for i in range(9)]
    sequences, targets = hidden_texts(texts, 999, 0, 16)
    for text, sequence in zip(texts, sequences, strict=True):
        (call,) = sequence.calls
        assert (call.tokens[call.rows + 1] == 999).all()
        assert torch.equal(text[call.rows + 1], targets[sequence.name])
        assert len(call.rows) <= 16
    assert (sequences[0].calls[0].tokens == 999).sum() == 4
    assert (sequences[-1].calls[0].tokens == 999).sum() == 39


@pytest.mark.parametrize("V", [SKETCH, 3 * SKETCH])
def test_the_loss_is_that_of_whole_logits(V: int) -> None:
    logits_KV = 3 * torch.randn(5, V, generator=torch.Generator().manual_seed(0))
    targets_K = torch.tensor([0, V - 1, 7, 9, 11])
    columns_KC = top_columns(logits_KV, targets_K)
    summary = summarize(logits_KV, columns_KC)
    found = log_probability(summary, columns_KC, targets_K)
    torch.testing.assert_close(found, logits_KV.double().log_softmax(-1)[torch.arange(5), targets_K])
    torch.testing.assert_close(confidence(summary), logits_KV.double().log_softmax(-1).amax(-1))


def test_verdicts_in_words() -> None:
    def figures(loss: float, kl: float = 0.03) -> list[Figure]:
        values = {"kl_divergence": kl, "loss": loss, "loss_increase": 0.01}
        return [Figure("quality", name, value, None, False) for name, value in values.items()]

    texts = Material([], [torch.arange(9)], "mine.jsonl")
    knows, chance = figures(4.0), figures(math.log(8192))
    assert verdict_of(knows, Budget(), texts, 8192, "int8_xnnpack") == Verdict(
        False,
        "right; quality reported, not judged: diverges by 0.03 nats and loses 0.01; budget.kl=0.033 would judge it, "
        "recipe=int8_xnnpack loses less",
    )
    assert verdict_of(knows, Budget(kl=0.04), texts, 8192, None).is_judged
    noise = verdict_of(chance, Budget(), texts, 8192, None)
    assert not noise.is_judged
    assert "mine.jsonl is as good as noise (9.00 nats a token): give its own texts" in noise.words
    both = verdict_of(chance, Budget(kl=0.04), texts, 8192, None)
    assert both.is_judged
    assert "within its budget (budget.kl=0.04)" in both.words
    assert "but to the float32 model mine.jsonl is as good as noise" in both.words
    solved = [Figure("quality", "kl_divergence", 0.1, None, False), Figure("quality", "solved_percent", 99.5, 98, True)]
    assert verdict_of(solved, Budget(), Material([]), 288, None).words.startswith("right, and solves 99.5%")
    wrong = [Figure("fidelity", "fidelity_db", 3, 30, True)]
    assert verdict_of(wrong, Budget(), texts, 288, None).words == "out of bounds: fidelity_db"


def of_hessian(hessian: torch.Tensor) -> LayerInputs:
    return inputs_by_layer({"a": [hessian.clone()]})["a"]


def test_a_factor_is_of_the_inverse() -> None:
    torch.manual_seed(0)
    x_KN = torch.randn(3000, 1300)
    hessian = x_KN.T @ x_KN
    factor = inverse_factor(hessian).double()
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(1300)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(1300).double(), rtol=0, atol=1e-4)
    parts = {"wide": [hessian[:700, :700].clone(), hessian[700:, 700:].clone()], "other": [hessian.clone()]}
    found = inputs_by_layer(parts)
    assert [len(part) for part in found["wide"].factors] == [700, 600]
    assert torch.equal(found["other"].factors[0].double(), factor)
    assert torch.equal(found["wide"].importance_N, hessian.diagonal())
    assert parts == {"wide": [], "other": []}


def test_gptq_loses_less_on_its_inputs() -> None:
    torch.manual_seed(0)
    x_ND = torch.randn(400, 64) @ torch.randn(64, 64)  # inputs that go together, as a network's do
    weight = torch.randn(24, 64)
    hessian = x_ND.T @ x_ND

    def loss(integers: torch.Tensor, scale: torch.Tensor) -> float:
        wide = integers.float() * scale.float().repeat_interleave(64 // scale.shape[1], 1)
        return ((wide - weight) @ x_ND.T).square().sum().item()

    for group_size in (32, None):
        found = gptq(weight, of_hessian(hessian), 4, group_size, torch.bfloat16, True)
        nearest = gptq(weight, of_hessian(torch.eye(64)), 4, group_size, torch.bfloat16, False)
        assert loss(*found) < 0.5 * loss(*nearest)
        assert found[0].abs().max() <= 8
        threads = torch.get_num_threads()
        torch.set_num_threads(3)
        again = gptq(weight, of_hessian(hessian), 4, group_size, torch.bfloat16, True)
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_squares_are_summed_alike_by_any_number_of_threads() -> None:
    torch.manual_seed(0)
    x_KN, threads, found = torch.randn(300, 1100), torch.get_num_threads(), []
    for n in (1, 3):
        torch.set_num_threads(n)
        hessian = torch.ones(1100, 1100)
        add_squares(hessian, x_KN)
        found.append(hessian)
    torch.set_num_threads(threads)
    assert torch.equal(*found)
    assert torch.equal(found[0], found[0].T)
    torch.testing.assert_close(found[0].double(), 1 + x_KN.double().T @ x_KN.double(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("group_size", [32, None])
def test_fitted_scales_are_alike_by_any_number_of_threads(group_size: int | None) -> None:
    """Of a weight that is being trained, too. Each scale loses no more than that of the largest weight."""
    weight = torch.randn(1500, 896, generator=torch.Generator().manual_seed(0), requires_grad=True)
    quant = LinearQuant(4, group_size, Rounding.nearest, Scales.least_squares)
    threads, found = torch.get_num_threads(), []
    for n in (1, 3):
        torch.set_num_threads(n)
        linear = nn.Linear(896, 1500, bias=False)
        linear.weight = nn.Parameter(weight.detach().clone())
        quantize_module("layer", linear, Dtype.float32, quant, None)
        made = cast(IntxUnpackedToInt8Tensor, linear.weight.data)
        found.append((made.qdata, made.scale))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    scale = found[0][1]

    def loss(scale: torch.Tensor) -> torch.Tensor:
        groups, wide = weight.detach().view(scale.numel(), -1), scale.float().view(-1, 1)
        return ((groups / wide).round().clamp(-8, 7) * wide - groups).square().sum(1)

    largest = (weight.detach().view(scale.numel(), -1).abs().amax(1) / 7.5).bfloat16()
    assert (loss(scale) <= loss(largest) + 1e-5).all()
    assert loss(scale).sum() < 0.9 * loss(largest).sum()


def test_a_map_inside_another_has_as_many_threads() -> None:
    """Squares are summed while a layer runs, in which torch has one."""
    threads, together = torch.get_num_threads(), threading.Barrier(3, timeout=10)
    torch.set_num_threads(3)
    with one_thread_each(), one_thread_each() as workers:
        assert torch.get_num_threads() == 1
        list(workers(lambda _: together.wait(), range(3)))
    assert torch.get_num_threads() == 3
    torch.set_num_threads(threads)


def test_inputs_that_are_never_there_and_wide_layers() -> None:
    weight = torch.randn(4, 64)
    hessian = torch.zeros(64, 64)
    errors = []
    for fitted in (True, False):
        integers, scale = gptq(weight, of_hessian(hessian), 4, 32, torch.bfloat16, fitted)
        errors.append((integers.float() * scale.float().repeat_interleave(32, 1) - weight).square().mean())
    assert errors[0] < errors[1] < 0.01
    assert hessian_blocks(18944, 32) == [slice(i, i + 4736) for i in range(0, 18944, 4736)]
    assert hessian_blocks(3584, None) == [slice(0, 3584)]


def test_rules_by_name() -> None:
    linear = LinearQuant(rules={"lm_head": "int8", "layers.1.*": "int4_64", "down_proj": "int4_channel"})
    chosen = {
        name: (quant.weight_bits, quant.group_size)
        for name in ("lm_head", "layers.1.mlp.down_proj", "layers.0.mlp.down_proj", "layers.0.mlp.up_proj")
        if (quant := quant_of(name, linear)) is not None
    }
    assert list(chosen.values()) == [(8, None), (4, 64), (4, None), (4, 32)]
    model = load_hf_model(GOLDEN / "gqa2")[0]
    with pytest.raises(QuantizationError, match=r"'down_prj' matches no linear layer; did you mean 'down_proj'\?"):
        check_sizes(model, LinearQuant(rules={"down_prj": "int8"}), None)
    with pytest.raises(QuantizationError, match="no format 'int5'; there are int8, int4"):
        check_sizes(model, LinearQuant(rules={"lm_head": "int5"}), None)


def test_a_program_of_several_formats(pipeline: Pipeline, tmp_path: Path) -> None:
    rules = "recipe.linear.rules={lm_head: int8, v_proj: int8}"
    given = (f"checkpoint={GOLDEN / 'gqa2'}", f"output={tmp_path / 'a'}", "export.max_seq_len=64")
    assert pipeline("run", "recipe=int4_xnnpack", *given, rules)[0] == 0
    manifest = read_manifest(tmp_path / "a")
    assert set(manifest["expected_format"]["weight_types"]) == {"qbint4", "qcint8"}
    code, _, err = pipeline(
        "run", "recipe=int4_xnnpack", *given, "overwrite=true", "recipe.linear.rules={lm_haed: int8}"
    )
    assert code == 4
    assert "did you mean 'lm_head'" in err


def test_budgets_that_contradict() -> None:
    with pytest.raises(UsageError, match=r"budget\.kl 0: .*; budget\.solved: there is no task"):
        check_budget(Budget(kl=0.0, solved=1.0), has_text=True, has_task=False)
    check_budget(Budget(kl=0.1, loss=0.2), has_text=True, has_task=False)
    for wrong in (Budget(kl=math.nan), Budget(kl=math.inf), Budget(loss=-1.0), Budget(loss=math.nan)):
        with pytest.raises(UsageError, match=r"budget\.(kl|loss) (nan|inf|-1): "):
            check_budget(wrong, has_text=True, has_task=False)
    for kl in (0.0143, 1e-9, 3.2, 0.099):
        assert kl < _above(kl) < 1.3 * kl


def test_without_a_tokenizer_rounding_is_plain(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(GOLDEN / "gqa2")
    monkeypatch.setattr("pipeline.calibrate.log", listening(caplog))
    with caplog.at_level(logging.INFO):
        assert calibration_of(loaded, load_recipe("int4_xnnpack"), None, CALIBRATION_TEXT) is None
    assert "no tokenizer" in caplog.text


def test_the_bundled_text_serves_whoever_reads_it() -> None:
    def material(folder: Path) -> tuple[int, bool]:
        loaded = load(folder)
        asked = (TaskConfig(name="none"), ValidationConfig(), 128, DEFAULT_TEXT)
        found = material_of(folder, loaded.tokenizer, loaded.config, *asked)
        return len(found.texts), found.is_random

    assert material(ENGLISH) == (32, False)
    assert material(GOLDEN / "gqa2") == (0, True)


@pytest.mark.parametrize(
    ("checkpoint", "options", "code", "said"),
    [
        ("dream_english", ["recipe.linear.rules.lm_head=int9"], 4, "no format 'int9'; there are int8, int4"),
        ("dream_english", ["recipe=int8_xnnpack", "calibration=/no/such"], 2, "calibration: /no/such cannot be read"),
        ("gqa2", ["calibration=/no/such"], 2, "calibration: /no/such cannot be read"),
        ("gqa2", ["budget.loss=0.1"], 2, "takes a checkpoint with a tokenizer"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_before_the_long_work(
    checkpoint: str, options: list[str], code: int, said: str, pipeline: Pipeline, tmp_path: Path
) -> None:
    folder = GOLDEN / checkpoint if checkpoint == "gqa2" else ROOT / "assets" / checkpoint
    found, out, err = pipeline("run", f"checkpoint={folder}", f"output={tmp_path / 'out'}", *options)
    assert found == code, err
    assert said in err.splitlines()[-1]
    assert "quantize" not in out
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_short_or_not_used_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    few = tmp_path / "few.txt"
    few.write_text("A text of eight words, and some more of them.\n")
    loaded = load(ENGLISH)
    with caplog.at_level(logging.WARNING):
        assert calibration_of(loaded, load_recipe("int4_xnnpack"), str(few), CALIBRATION_TEXT) is not None
        assert "so few may be worse than none" in caplog.text
        _warn_unused(str(few), loaded, "int8_xnnpack")
        assert "is not used: recipe int8_xnnpack goes by no text" in caplog.text


def test_a_network_that_fits_nowhere_is_named_in_one_line() -> None:
    config = replace(load(GOLDEN / "gqa2").config, hidden_size=72, num_attention_heads=4, num_key_value_heads=2)
    with torch.device("meta"):
        model = DreamEdge(config)
    recipe = load_recipe("int4_xnnpack")
    with pytest.raises(QuantizationError, match=r"q_proj is 72 wide.*; and \d+ others$"):
        check_sizes(model, recipe.linear, None)


def test_a_warning_is_a_line_in_each_job(pipeline: Pipeline, tmp_path: Path) -> None:
    """Hydra silences the loggers that there are, which a second job, and a second command, would be without."""
    few = tmp_path / "few.txt"
    few.write_text("A text.")
    for _ in range(2):
        code, _, err = pipeline(
            "run", f"checkpoint={GOLDEN / 'gqa2'}", f"calibration={few}", f"output={tmp_path / 'out'}",
            "validation.n_prompts=1",
        )  # fmt: skip
        assert code == 2
        code, _, err = pipeline(
            "run", f"checkpoint={GOLDEN / 'gqa2'}", f"calibration={few}", f"output={tmp_path / 'out'}", "budget.kl=0.1"
        )
        assert code == 2
        assert err.splitlines()[0] == (
            f"warning: calibration: {few} is not used: {GOLDEN / 'gqa2'} has no tokenizer to read it with"
        )
