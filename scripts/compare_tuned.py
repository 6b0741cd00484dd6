"""What `tune` chooses for `assets/dream_english` at three budgets, beside one format for all: docs/tuned.json and .svg.

    python -m scripts.compare_tuned [--rounding nearest] [--cache DIR]

Four and a half minutes on two virtual processors with gptq, two with `--rounding nearest`.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.commands.tune import Measured, measure
from pipeline.config import ASSETS, load_recipe, load_task
from pipeline.display import Display
from pipeline.schema import TuneBudget, TuneConfig
from pipeline.tuning import FORMATS, Tried, choose
from recipes.options import Rounding, Scales
from report.files import write_json, write_text
from report.front import tuned_plot
from report.page import picture

DOCS = Path(__file__).resolve().parent.parent / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounding", default="gptq", choices=[rounding.value for rounding in Rounding])
    parser.add_argument("--cache", default="artifacts/.cache", help="where quantized weights are kept")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    recipe, rounding = load_recipe("int4_xnnpack"), Rounding(args.rounding)
    assert recipe.linear is not None
    scales = Scales.least_squares if rounding is Rounding.gptq else Scales.absmax
    recipe = replace(recipe, linear=replace(recipe.linear, rounding=rounding, scales=scales))
    config = TuneConfig(
        checkpoint=str(ASSETS / "dream_english"), output="", cache=args.cache, recipe=recipe, task=load_task("none")
    )
    started, display = time.perf_counter(), Display(Console())
    with display.live():
        measured = measure(config, display)
        chosen = []
        for budget in budgets(measured):
            with display.stage("choose") as report:
                of = (measured.units, measured.single, measured.attempt, report)
                chosen.append((budget, choose(budget, *of)))
    result = {
        "checkpoint": "assets/dream_english",
        "rounding": rounding.value,
        "matrices": len(measured.units),
        "single": {name: {"bytes": one.bytes, "kl": one.kl} for name, one in measured.single.items()},
        "chosen": [noted(budget, tried) for budget, tried in chosen],
        "seconds": round(time.perf_counter() - started),
    }
    write_json(DOCS / "tuned.json", result)
    write_text(DOCS / "tuned.svg", draw(result))


def budgets(measured: Measured) -> list[TuneBudget]:
    """The bytes of int4 for all, and a half and an eighth of its divergence."""
    int4 = measured.single["int4"]
    return [TuneBudget(bytes=int4.bytes), *(TuneBudget(kl=float(f"{part * int4.kl:.1g}")) for part in (0.5, 0.125))]


def noted(budget: TuneBudget, tried: Tried) -> dict[str, object]:
    return {
        "budget": {"kl": budget.kl, "bytes": budget.bytes},
        "bytes": tried.bytes,
        "kl": tried.kl,
        "formats": dict(Counter(tried.formats.values())),
    }


def draw(result: dict[str, Any]) -> str:
    """As SVG."""
    single = {f"{name} for all": (one["bytes"], one["kl"]) for name, one in result["single"].items()}
    chosen = {asked(one["budget"]): (one["bytes"], one["kl"]) for one in result["chosen"]}
    return picture([tuned_plot(single, chosen)])


def table_of(result: dict[str, Any]) -> str:
    """As Markdown: what each costs, from the smallest, and what of its matrices has which format."""
    rows = [(one["bytes"], one["kl"], f"{name} for all", "") for name, one in result["single"].items()]
    for one in result["chosen"]:
        counts = ", ".join(f"{one['formats'][name]} {name}" for name in FORMATS if name in one["formats"])
        rows.append((one["bytes"], one["kl"], f"`{asked(one['budget'])}`", counts))
    lines = [f"| {what} | {n / 2**20:.2f} | {kl:.5f} | {counts} |" for n, kl, what, counts in sorted(rows)]
    return "\n".join(["| formats | weights, MiB | KL, nats | matrices |", "|---|---|---|---|", *lines])


def asked(budget: dict[str, Any]) -> str:
    (name, value), *_ = [(name, value) for name, value in budget.items() if value is not None]
    return f"budget.{name}={value}"


if __name__ == "__main__":
    main()
