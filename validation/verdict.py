"""What the figures mean for whoever releases the artifact, in a line."""

from __future__ import annotations

import math
from dataclasses import dataclass

from validation.figure import Figure
from validation.material import Material
from validation.settings import Budget

# A model that knows a text loses less on it than this share of what even chances would.
KNOWS = 0.9


@dataclass(frozen=True)
class Verdict:
    """is_judged: whether quality was, by the owner's budget or by a task; else it is reported."""

    is_judged: bool
    words: str


def verdict_of(
    figures: list[Figure], budget: Budget, material: Material, vocab_size: int, better: str | None
) -> Verdict:
    """better: the recipe to try where this one loses too much."""
    if wrong := [figure.name for figure in figures if not figure.ok]:
        return Verdict(True, f"out of bounds: {', '.join(wrong)}")
    value = {figure.name: figure.value for figure in figures}
    if material.is_random:
        return Verdict(
            False, "right; quality was not judged: the checkpoint reads no text, so its prompts were random tokens"
        )
    given = {name: bound for name, bound in vars(budget).items() if bound is not None}
    noise = ""
    if material.texts and not knows(value["loss"] - value["loss_increase"], vocab_size):
        nats = f"{value['loss'] - value['loss_increase']:.2f} nats a token"
        own = "give its own texts, validation.prompts=FILE"
        noise = f"to the float32 model {material.source} is as good as noise ({nats}): {own}"
    if noise and not given:
        return Verdict(False, f"right; quality was not judged: {noise}")
    solved = f"solves {value['solved_percent']:.1f}% of the task" if "solved_percent" in value else ""
    lost = f"diverges by {value['kl_divergence']:.3g} nats" + (
        f" and loses {value['loss_increase']:.3g}" if "loss_increase" in value else ""
    )
    if given:
        asked = ", ".join(f"budget.{name}={bound:g}" for name, bound in given.items())
        found = ", ".join(filter(None, (solved, lost)))
        return Verdict(True, f"right, and within its budget ({asked}): {found}{'; but ' * bool(noise)}{noise}")
    if solved:
        return Verdict(True, f"right, and {solved}, as it should: {lost}")
    next_step = f"budget.kl={_above(value['kl_divergence']):g} would judge it"
    less = f", recipe={better} loses less" if better else ""
    return Verdict(False, f"right; quality reported, not judged: {lost}; {next_step}{less}")


def knows(loss: float, vocab_size: int) -> bool:
    return loss < KNOWS * math.log(vocab_size)


def _above(kl: float) -> float:
    """A budget that this program meets with a tenth to spare, in two digits."""
    if kl <= 0:
        return 1e-9
    digits = 1 - math.floor(math.log10(1.1 * kl))
    return math.ceil(1.1 * kl * 10**digits) / 10**digits
