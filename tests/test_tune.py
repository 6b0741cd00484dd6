"""Formats matrix by matrix: the choice is the best there is, it is measured before it is taken, and `run` takes it."""

from __future__ import annotations

import itertools
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from pipeline.commands import COMMANDS
from pipeline.config import load_recipe
from pipeline.load import load
from pipeline.quantize import quantize
from pipeline.schema import TuneBudget
from pipeline.sensitivity import linears, mixed
from pipeline.tuning import FORMATS, ROOM, Option, Tried, choose, fitted, front_of, matrix_bytes, recipe_of, scaled
from recipes.options import Rounding
from recipes.quantization import quant_of
from runtime.artifact import read_manifest
from tests.checkpoints import BUNDLED, GOLDEN, ROOT
from validation.progress import silent

Pipeline = Callable[..., tuple[int, str, str]]
NEAREST = ("recipe.linear.rounding=nearest", "recipe.linear.scales=absmax")


def made_up(n_units: int, seed: int) -> dict[str, tuple[Option, ...]]:
    """Larger formats add less, by different amounts."""
    generator = torch.Generator().manual_seed(seed)
    units = {}
    for i in range(n_units):
        size = int(torch.randint(3, 40, (), generator=generator))
        worst = float(torch.rand((), generator=generator)) + 0.01
        middle = worst * float(torch.rand((), generator=generator))
        kls, sizes = (worst, middle, 0.0), (4 * size, 5 * size, 8 * size)
        units[f"layers.{i}.q_proj"] = tuple(Option(*of) for of in zip(FORMATS, sizes, kls, strict=True))
    return units


def of_all(units: dict[str, tuple[Option, ...]], formats: dict[str, str]) -> tuple[int, float]:
    chosen = [next(o for o in options if o.format == formats[name]) for name, options in units.items()]
    return sum(o.bytes for o in chosen), sum(o.kl for o in chosen)


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    units = made_up(6, seed)
    every = [(sum(o.bytes for o in chosen), sum(o.kl for o in chosen)) for chosen in itertools.product(*units.values())]
    front = front_of(units)
    for share in (0.0, 0.1, 0.35, 0.7, 1.0):
        budget_kl = share * max(kl for _, kl in every) + 1e-12
        smallest = front.smallest(budget_kl)
        assert smallest is not None
        n_bytes, kl = of_all(units, smallest)
        assert kl <= budget_kl
        assert n_bytes == min(n for n, other in every if other <= budget_kl)
        sizes = [n for n, _ in every]
        budget_bytes = min(sizes) + int(share * (max(sizes) - min(sizes)))
        nearest = front.nearest(budget_bytes)
        assert nearest is not None
        n_bytes, kl = of_all(units, nearest)
        assert n_bytes <= budget_bytes
        assert kl == pytest.approx(min(other for n, other in every if n <= budget_bytes), abs=1e-12)
    assert front.nearest(min(n for n, _ in every) - 1) is None
    assert front.smallest(-1.0) is None


def test_many_matrices_are_chosen_for_nearly_as_well() -> None:
    """200 of them have more sums than are kept: it is held against what no choice can be below (the dual's bound)."""
    units = made_up(200, 0)
    front = front_of(units)
    assert set((front.smallest(1e9) or {}).values()) == {FORMATS[0]}
    assert set((front.smallest(0.0) or {}).values()) == {FORMATS[-1]}
    for kl in (5.0, 20.0, 60.0):
        prices = [10 ** (i / 50) for i in range(-50, 200)]  # bytes a nat
        dual = [sum(min(o.bytes + p * o.kl for o in options) for options in units.values()) - p * kl for p in prices]
        assert max(dual) <= of_all(units, front.smallest(kl) or {})[0] <= 1.001 * max(dual)


def test_noise_is_fitted_to_what_was_measured() -> None:
    noise = torch.tensor([[1.0, 4.0], [2.0, 2.0], [3.0, 1.0]])
    kl = fitted(noise, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.25, 0.35]))
    assert kl.sum(0).tolist() == pytest.approx([0.25, 0.35])
    assert kl.sum(1).tolist() == pytest.approx([0.1, 0.2, 0.3], rel=1e-4)
    assert kl[0, 1] / kl[0, 0] > kl[1, 1] / kl[1, 0] > kl[2, 1] / kl[2, 0]  # as the noise says
    by_chance = fitted(torch.zeros(2, 2), torch.tensor([-0.1, 0.2]), torch.tensor([0.0, 0.3]))
    assert (by_chance > 0).all()


def one_for_all(units: dict[str, tuple[Option, ...]], kl_of: Callable[[dict[str, str]], float]) -> dict[str, Tried]:
    single = {}
    for written in FORMATS:
        formats = dict.fromkeys(units, written)
        single[written] = Tried(formats, 1000 + of_all(units, formats)[0], kl_of(formats))
    return single


@pytest.mark.parametrize("truth", [0.5, 1.0, 3.0])
def test_nothing_is_taken_that_was_only_predicted(truth: float) -> None:
    """Matrices that cost more, or less, than predicted: it is measured, corrected, and met; none of it is guessed."""
    units = made_up(40, 3)
    base = 0.01

    def kl_of(formats: dict[str, str]) -> float:
        return base + truth * of_all(units, formats)[1] ** 1.2  # nor is it a sum

    single = one_for_all(units, kl_of)
    tried: list[Tried] = []

    def attempt(formats: dict[str, str], _: Any) -> Tried:
        tried.append(Tried(formats, 1000 + of_all(units, formats)[0], kl_of(formats)))
        return tried[-1]

    budget = TuneBudget(kl=0.3 * single["int4_channel"].kl)
    chosen = choose(budget, units, single, attempt, silent)
    assert chosen in [*tried, *single.values()]
    assert len(tried) <= 4
    assert chosen.kl <= (1 - ROOM) * (budget.kl or 0)
    assert chosen.bytes < single["int8"].bytes
    assert chosen.kl > 0.8 * (budget.kl or 0)  # what may be lost is used
    budget = TuneBudget(bytes=single["int4"].bytes)
    chosen = choose(budget, units, single, attempt, silent)
    assert chosen.bytes <= single["int4"].bytes
    assert chosen.kl < single["int4"].kl


def test_what_is_measured_worse_than_one_format_is_not_taken() -> None:
    units = made_up(5, 1)
    single = one_for_all(units, lambda formats: of_all(units, formats)[1])

    def attempt(formats: dict[str, str], _: Any) -> Tried:
        return Tried(formats, 1000 + of_all(units, formats)[0], 100.0)

    assert choose(TuneBudget(kl=single["int4"].kl * 1.1), units, single, attempt, silent) is single["int4"]
    assert choose(TuneBudget(bytes=single["int4"].bytes), units, single, attempt, silent) is single["int4"]


def test_options_add_up_to_what_one_format_for_all_was_measured_with() -> None:
    shapes = {"layers.0.q_proj": (64, 64), "layers.0.k_proj": (32, 64), "layers.0.o_proj": (64, 40)}
    added = {name: {"int4_channel": 3.0 + i, "int4": 1.0, "int8": 0.0} for i, name in enumerate(shapes)}
    every = {f: {n: "int8" if n.endswith("o_proj") else f for n in shapes} for f in FORMATS}
    single = {f: Tried(every[f], 0, kl) for f, kl in zip(FORMATS, (0.5, 0.2, 0.1), strict=True)}
    units = scaled(added, shapes, single)
    for written, one in single.items():
        assert of_all(units, every[written])[1] == pytest.approx(one.kl - 0.1)
    assert [o.format for o in units["layers.0.o_proj"]] == ["int8"]  # 40 inputs: int4 does not fit
    assert matrix_bytes(64, 64, "int4") == 64 * 32 + 2 * 64 * 2
    assert matrix_bytes(64, 64, "int4_channel") == 64 * 32 + 2 * 64
    assert matrix_bytes(64, 64, "int8") == 64 * 64 + 4 * 64


def test_rules_say_what_was_chosen() -> None:
    names = [f"layers.{i}.{kind}" for i in range(12) for kind in ("self_attn.q_proj", "mlp.up_proj")]
    formats = dict.fromkeys([*names, "lm_head"], "int4")
    formats |= {name: "int8" for name in names if name.endswith("up_proj")} | {"lm_head": "int8"}
    formats |= {"layers.1.self_attn.q_proj": "int4_channel"}
    recipe = recipe_of(load_recipe("int4_xnnpack"), formats)
    assert recipe.linear is not None
    assert (recipe.linear.weight_bits, recipe.linear.rounding) == (8, Rounding.gptq)
    written = {(8, None): "int8", (4, None): "int4_channel", (4, 32): "int4"}
    for name, expected in formats.items():
        quant = quant_of(name, recipe.linear)
        assert quant is not None
        assert written[quant.weight_bits, quant.group_size] == expected, name
    assert set(recipe.weight_types) == {"qcint8", "qbint4"}
    assert recipe_of(recipe, dict.fromkeys(formats, "int8")).weight_types == ["qcint8"]


def test_a_mixed_model_is_what_quantization_makes_of_its_rules(tmp_path: Path) -> None:
    loaded, base = load(GOLDEN / "gqa2"), load_recipe("int8_xnnpack")
    shapes = linears(loaded.config)
    assert list(shapes)[-1] == "lm_head"
    assert len(shapes) == 7 * loaded.config.num_hidden_layers + 1
    plain = {f: quantize(loaded, recipe_of(base, dict.fromkeys(shapes, f)), tmp_path, silent).weights for f in FORMATS}
    few = {"layers.1.mlp.down_proj": "int4", "lm_head": "int4_channel"}
    made = quantize(loaded, recipe_of(base, dict.fromkeys(shapes, "int8") | few), tmp_path, silent).weights
    found = mixed(plain, few)
    for name, _ in made.model.named_parameters():
        assert torch.equal(found.rows(name), made.rows(name)), name
    assert torch.equal(plain["int8"].rows("lm_head.weight"), mixed(plain, {}).rows("lm_head.weight"))


def test_the_command_tunes_and_run_takes_what_it_wrote(pipeline: Pipeline, tmp_path: Path) -> None:
    """The bundled checkpoint: the budget is met by measured divergence, in eager and in the program."""
    file, plot = tmp_path / "dream_sudoku-mixed.yaml", tmp_path / "plot.svg"
    keys = [f"cache={tmp_path / 'cache'}", "task.n_solve=8", "validation.n_prompts=12"]
    code, out, err = pipeline("tune", "budget.kl=0.0002", f"output={file}", f"plot={plot}", *keys, *NEAREST)
    assert (code, err) == (0, "")
    rows = re.findall(r"^ +(\w+) .* MiB +([\d,]+) +([\d.]+)", out, flags=re.MULTILINE)
    sizes = {name: (int(n_bytes.replace(",", "")), float(kl)) for name, n_bytes, kl in rows}
    assert list(sizes) == [*FORMATS, "chosen"]
    assert sizes["chosen"][1] <= 0.0002 < sizes["int4_channel"][1]
    assert sizes["int4_channel"][0] < sizes["chosen"][0] < sizes["int8"][0]
    assert ET.parse(plot).getroot().tag.endswith("svg")
    recipe: Any = OmegaConf.load(file)
    assert recipe.name == "mixed"
    assert recipe.linear.rules
    command = out.splitlines()[-1].removeprefix("next: python -m pipeline ").split()
    assert command == ["run", f"recipe={file}", f"checkpoint={BUNDLED}", "budget.kl=0.0002"]
    artifact = tmp_path / "artifact"
    code, out, err = pipeline(*command, f"output={artifact}", *keys)
    assert (code, err) == (0, ""), out
    manifest = read_manifest(artifact)
    assert manifest["recipe"]["linear"]["rules"] == OmegaConf.to_container(recipe.linear.rules)
    (kl,) = [figure for figure in manifest["figures"] if figure["name"] == "kl_divergence"]
    assert kl["value"] <= kl["bound"] <= 0.0002
    assert kl["value"] == pytest.approx(sizes["chosen"][1], rel=0.1)
    program = (artifact / "model.pte").stat().st_size
    assert sizes["chosen"][0] < program < 1.3 * sizes["chosen"][0]  # and a graph


def test_a_budget_that_cannot_be_met_names_the_nearest(pipeline: Pipeline, tmp_path: Path) -> None:
    keys = [f"output={tmp_path / 'r.yaml'}", f"cache={tmp_path / 'cache'}", "validation.n_prompts=8", *NEAREST]
    for given, low, high in (("budget.bytes=1", 1e5, 1e6), ("budget.kl=1e-9", 1e-7, 1e-3)):
        name, _, value = given.partition("=")
        code, _, err = pipeline("tune", given, *keys)
        start, _, nearest = err.rpartition(f"{name}=")
        assert (code, start) == (2, f"error: {name} {float(value):g}: the smallest that can be met is ")
        assert low < float(nearest) < high
    assert not (tmp_path / "r.yaml").exists()


def test_one_budget_is_given_and_the_rest_fits(pipeline: Pipeline, tmp_path: Path) -> None:
    output = f"output={tmp_path / 'r.yaml'}"
    for given, said in (
        ([], "no budget: give one of budget.kl=NATS and budget.bytes=N"),
        (["budget.kl=0.1", "budget.bytes=100"], "two budgets: give one of"),
        (["budget.kl=-1"], "budget.kl -1: must be above 0"),
        (["budget.kl=0.1", "recipe=fp32_xnnpack"], "recipe fp32_xnnpack: it leaves matrices as floats"),
        (["budget.kl=0.1", "+recipe.linear.rules.lm_head=int8"], "recipe.linear.rules are what `tune` chooses"),
        (["budget.kl=0.1", f"checkpoint={GOLDEN / 'gqa2'}"], "it reads no text"),
        (["budget.kl=0.1", "plot=x.png"], "plot x.png: its name must end in .svg"),
        (["budget.kl=0.1", "output=x.json"], "output x.json: its name must end in one of .yaml, .yml"),
        (["budget.klx=0.1"], "did you mean 'budget.kl'?"),
    ):
        code, _, err = pipeline("tune", output, *given)
        assert (code, err.count("\n")) == (2, 1), err
        assert said in err
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_may_be_a_file_of_the_users(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read as those of conf/recipe/ are, rules with dots in them included; what is wrong is one line."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "my, own.yaml"
    text = (ROOT / "conf" / "recipe" / "int4_xnnpack.yaml").read_text().replace("name: int4_xnnpack", "name: mine")
    file.write_text(text.replace("  weight_bits: 4", "  rules: {layers.3.mlp.down_proj: int8}\n  weight_bits: 4"))
    configs: list[Any] = []
    monkeypatch.setitem(COMMANDS, "run", configs.append)
    assert pipeline("run", "recipe=my, own.yaml", "recipe.linear.group_size=64") == (0, "", "")
    (config,) = configs
    assert (config.recipe.name, config.recipe.linear.group_size) == ("mine", 64)
    assert config.recipe.linear.rules == {"layers.3.mlp.down_proj": "int8"}
    assert Path(config.output).name == "dream_sudoku-mine"
    (tmp_path / "b.yaml").write_text(text.replace("mine", "other"))
    assert pipeline("run", "-m", "recipe=my\\, own.yaml,b.yaml,int8_xnnpack")[0] == 0
    assert [config.recipe.name for config in configs[1:]] == ["mine", "other", "int8_xnnpack"]
    for content, said in (
        (text.replace("weight_bits", "weight_bit"), "did you mean 'recipe.linear.weight_bits'?"),
        (text.replace("rounding: gptq", "rounding: gpqt"), "no value 'gpqt'; did you mean 'gptq'?"),
        ("- a\n", "holds no keys and values"),
        ("a: [", "is not YAML"),
        ("backend: xnnpack\n", "recipe.description is not given"),
    ):
        file.write_text(content)
        code, _, err = pipeline("run", "recipe=my, own.yaml")
        assert (code, err.count("\n")) == (2, 1), err
        assert err.startswith("error: recipe my, own.yaml")
        assert said in err
    file.write_bytes(b"\xff")
    assert "is not UTF-8" in pipeline("run", "recipe=my, own.yaml")[2]
    assert "No such file or directory; did you mean 'int4_xnnpack'?" in pipeline("run", "recipe=int4_xnpack.yaml")[2]
    _, _, err = pipeline("run", "recipe=int4_xnpack")
    assert "did you mean 'int4_xnnpack'?" in err
    assert "file_" not in err


def test_the_page_shows_what_was_measured() -> None:
    """At each budget the choice beats every single format: none is as small and as near."""
    from scripts.compare_tuned import draw, table_of

    result = json.loads((ROOT / "docs" / "tuned.json").read_text())
    assert table_of(result) in (ROOT / "docs" / "tune.md").read_text()
    assert draw(result) == (ROOT / "docs" / "tuned.svg").read_text()
    assert len(result["chosen"]) == 3
    for one in result["chosen"]:
        budget = one["budget"]
        assert one["kl"] <= (budget["kl"] or 1e9)
        assert one["bytes"] <= (budget["bytes"] or 1e12)
        rivals = [s for s in result["single"].values() if s["kl"] <= (budget["kl"] or 1e9)]
        rivals = [s for s in rivals if s["bytes"] <= (budget["bytes"] or 1e12)]
        assert rivals
        for rival in rivals:
            assert one["bytes"] < rival["bytes"] if budget["kl"] else one["kl"] < rival["kl"]
