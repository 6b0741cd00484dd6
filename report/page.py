"""`report.html`: what an artifact's manifest and report.json hold, for a person to look at.

One file, no script, nothing from elsewhere: it opens offline, on a phone and in the dark.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from report.chart import HEIGHT, WIDTH, number
from report.plots import (
    PARTS,
    Plot,
    agreement_plot,
    difference_plot,
    fidelity_plot,
    memory_plan_plot,
    noise_plots,
    parts_plot,
    peak_plot,
    seconds_plot,
    size,
    speed_plot,
)
from runtime.artifact import figures_of, files_of

REPORT_FILE, PAGE_FILE = "report.json", "report.html"
MEANINGS = {
    "fidelity_db": "logits against the same quantized model in eager, the worst call",
    "fidelity_exact_db": "the same, over the calls in which no activation sits on a rounding tie",
    "top1_agreement": "masked positions where the float32 model prefers the same token",
    "kl_divergence": "from the float32 model's distribution, in nats",
    "sqnr_db": "signal to noise of the logits against the float32 model",
    "cosine": "of the logits with the float32 model's, the worst row",
    "max_abs_diff": "of a logit from the float32 model's, the largest",
    "kl_beside_plain": "the same, beside that of weights rounded to the nearest",
    "loss": "of the texts' hidden tokens, in nats",
    "loss_increase": "over the float32 model's, in nats",
    "order_agreement": "of the quarter of positions that would be written first with float32's",
    "same_answers": "greedy answers that are the float32 model's, token for token",
    "solved_percent": "prompts of the task that the program solves",
    "unexpected_operators": "operators outside the delegate that the recipe does not list",
    "wrong_linear_weights": "linear weights of another type or shape than the recipe's",
    "bytes_per_weight": "of the linear weights with their scales",
    "changed_weights": "weights whose bytes are not those of the quantized model",
    "planned_memory": "of the planned arenas, caches included",
    "wrong_metadata": "constant methods that are not what the program was made with",
    "calls_that_differ": "calls whose bits differ between two processes",
    "other_bits": "calls whose bits are not the first core's",
}
STEPS_SHADES = 8  # of the tint that says when a token was written


def render_report(manifest: dict[str, Any], report: dict[str, Any]) -> str:
    """The page. Raises `KeyError`, `TypeError` or `ValueError` for a manifest or report that is none."""
    figures, everywhere = {figure["name"]: figure for figure in manifest["figures"]}, figures_of(manifest)
    return page(
        "report.html.j2",
        manifest=manifest,
        report=report,
        files=files_of(manifest),
        wrong=[figure for figure in everywhere if not figure["ok"]],
        nearest=_nearest_to_its_bound(manifest["figures"]),
        all_figures=everywhere,
        groups=list(dict.fromkeys(figure["group"] for figure in everywhere)),
        features={core["core"]: core["features"] for core in manifest["cores"]},
        figures=figures,
        quality=[
            difference_plot({"": report["differences"]}),
            agreement_plot({"": report}, "masks"),
            agreement_plot({"": report}, "position"),
            fidelity_plot(report["calls"], figures),
            *noise_plots(report["noise"]),
        ],
        memory=[parts_plot(manifest["sizes"]), memory_plan_plot(manifest)],
        time=[seconds_plot(report), peak_plot(report), speed_plot({"": report["calls"]})],
    )


def page(template: str, **values: Any) -> str:
    """Values are escaped: an artifact may be anybody's."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"size": size, "number": number, "figure": figure_text, "bound": bound_text, "shade": _shade}
    return environment.get_template(template).render(meanings=MEANINGS, parts=PARTS, **values)


def picture(plots: list[Plot]) -> str:
    """Charts side by side, as an SVG file of its own."""
    return page("picture.svg.j2", plots=plots, width=WIDTH, height=HEIGHT)


def figure_text(figure: dict[str, Any]) -> str:
    return _with_unit(figure["name"], figure["value"])


def bound_text(figure: dict[str, Any]) -> str:
    if figure["bound"] is None:
        return "reported, not judged"
    return f"{'≥' if figure['at_least'] else '≤'} {_with_unit(figure['name'], figure['bound'])}"


def _nearest_to_its_bound(figures: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Of fidelity and quality: what would fail first."""

    def room(figure: dict[str, Any]) -> float:
        distance = figure["value"] - figure["bound"] if figure["at_least"] else figure["bound"] - figure["value"]
        return float(distance / abs(figure["bound"]))

    measured = [f for f in figures if f["group"] in ("fidelity", "quality") and f["bound"] and f["ok"]]
    return min(measured, key=room, default=None)


def _with_unit(name: str, value: float | str) -> str:
    """A value that is not finite is text already."""
    if isinstance(value, str):
        return value
    if name == "planned_memory":
        return size(value)
    if name.endswith("_db"):
        return f"{value:.4g} dB"
    return f"{value:.5g}{'%' if name.endswith('_percent') else ''}"


def _shade(step: int, steps: int) -> int:
    """0 for what was written first."""
    return step * STEPS_SHADES // max(1, steps)
