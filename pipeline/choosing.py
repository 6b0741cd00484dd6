"""Which of several artifacts may ship, and which of these does."""

from __future__ import annotations

import math
from dataclasses import dataclass

from evidence.integrity import check_packaged
from pipeline.choice_schema import Preference, ReleaseBudget
from report.candidate import MEASURES, Candidate, Unusable
from report.overview import cell
from runtime.errors import BadArtifactError, UsageError

LOST = ("kl", "loss", "solved")  # budgets of what is lost; the others are of what it costs
BY_LOSS = [Preference.kl, Preference.bytes, Preference.ms]
BY_SIZE = [Preference.bytes, Preference.kl, Preference.ms]


@dataclass(frozen=True)
class Choice:
    """ranked: those that may ship, the best first. refused: why not, by name. why: of the first, and of each other that
    may ship, by name."""

    ranked: list[Candidate]
    refused: dict[str, str]
    why: dict[str, str]


def check_budget(budget: ReleaseBudget) -> None:
    """Raises `UsageError` for one that nothing, or everything, could meet."""
    for name, given in vars(budget).items():
        if given is not None and not (0 < given < math.inf or (given == 0 and name in ("loss", "solved"))):
            raise UsageError(f"budget.{name} {given:g}: must be above 0")


def preference_of(given: list[Preference] | None, budget: ReleaseBudget) -> list[Preference]:
    """As `tune`: within a budget of what is lost the fewest bytes, else what loses least. Raises `UsageError`."""
    if given is not None:
        if not given or len(set(given)) < len(given):
            raise UsageError(f"prefer [{', '.join(one.value for one in given)}]: give one figure or more, each once")
        return given
    held = [name for name, bound in vars(budget).items() if bound is not None]
    return BY_SIZE if held and set(held) <= set(LOST) else BY_LOSS


def choose(
    opened: list[Candidate], unusable: list[Unusable], budget: ReleaseBudget, prefer: list[Preference]
) -> Choice:
    """Raises `UsageError` where what they lose is to decide, and cannot be compared."""
    refused = {one.name: one.why for one in unusable}
    may_ship = []
    for one in opened:
        if reason := _why_not(one, budget):
            refused[one.name] = reason
        else:
            may_ship.append(one)
    first = prefer[0].value
    if len({one.basis.get(first) for one in may_ship}) > 1:
        what = {"ms": "on different machines", "memory": "on different machines"}.get(first, "on different inputs")
        raise UsageError(
            f"prefer={first}: {', '.join(one.name for one in may_ship)} were measured {what}: they cannot be compared; "
            f"give artifacts of one checkpoint that were validated alike, or prefer=[bytes]"
        )
    names = [name.value for name in prefer if len({one.basis.get(name.value) for one in may_ship}) < 2]
    ranked = sorted(may_ship, key=lambda one: [_cost(one, name) for name in names])
    why = {one.name: _behind(one, ranked[0], names) for one in ranked[1:]}
    if ranked:
        among = f"of {len(ranked)} that may ship" if len(ranked) > 1 else "the only one that may ship"
        best = {"bytes": "the smallest", "kl": "loses least", "ms": "the fastest", "memory": "takes the least memory",
                "solved": "solves most", "length": "the longest"}  # fmt: skip
        decided = next((name for name in names if len({_cost(one, name) for one in ranked}) > 1), None)
        words = best[decided] if decided is not None else "as good as any, and given first,"
        why[ranked[0].name] = f"{words} {among}" if len(ranked) > 1 else among
    return Choice(ranked, refused, why)


def _why_not(one: Candidate, budget: ReleaseBudget) -> str:
    """Empty where it may ship."""
    try:
        check_packaged(one.folder)
    except BadArtifactError as error:
        return str(error)
    if one.wrong:
        return f"out of bounds when it was made: {', '.join(one.wrong)}"
    over = []
    for name, bound in vars(budget).items():
        if bound is None:
            continue
        value = solved_lost(one) if name == "solved" else one.values.get(name)
        if value is None:
            over.append(f"budget.{name}: {one.missing.get(name, 'not measured')}")
        elif value > bound:
            over.append(f"over budget.{name}={exactly(bound)}: {exactly(value)}")
    return "; ".join(over)


def solved_lost(one: Candidate) -> float | None:
    """Points of 100 that the program solves less than the float32 model."""
    solved = one.manifest["solved"]
    return None if solved is None else round(100 * (float(solved["float32"]) - float(solved["program"])), 9)


def exactly(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _cost(one: Candidate, name: str) -> float:
    """The less the better; what was not measured is the worst."""
    if name not in one.values:
        return math.inf
    return -one.values[name] if MEASURES[name].at_least else one.values[name]


def _behind(one: Candidate, best: Candidate, names: list[str]) -> str:
    name = next((name for name in names if _cost(one, name) != _cost(best, name)), None)
    if name is None:
        return f"as good as {best.name}, which was given first"
    unit = "" if MEASURES[name].unit in ("bytes", "%") else f" {MEASURES[name].unit}"
    return f"{MEASURES[name].title} {cell(one, name)}{unit}, {best.name} has {cell(best, name)}{unit}"
