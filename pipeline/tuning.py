"""Which format each matrix gets: the choice itself, from bytes and from what each format adds to the divergence.

The approximation: divergences of matrices add up. The noise of a matrix is small and knows nothing of the others', so
its power adds to that of the logits, and the divergence is about proportional to that power. What a matrix adds is its
noise power relative to its output, fitted to the divergence that was measured of each layer and of each kind of matrix.
Nothing is accepted on these numbers alone: `pipeline/commands/tune.py` measures what was chosen.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.schema import TuneBudget
from recipes.options import LinearQuant, Recipe
from recipes.quantization import format_of, linear_bytes, quant_of, weight_type
from validation.progress import Report, within

FORMATS = ("int4_channel", "int4", "int8")  # from the smallest
BEST = FORMATS[-1]
STATES = 4096  # totals that are kept: with more of them, of 200 matrices, a choice would be 0.04% smaller
FITTING = 100  # rounds
ROUNDS = 4  # of choosing and measuring
ROOM = 0.02  # of budget.kl that a choice leaves: a program rounds some activations the other way than eager
AIM = 0.985  # of what may be lost: what is predicted is not hit exactly
LEAST = 0.01  # of the mean: what a matrix adds is never nothing, and a measured difference may be below 0 by chance


@dataclass(frozen=True)
class Option:
    """bytes: of the matrix with its scales. kl: nats that it adds to the divergence."""

    format: str
    bytes: int
    kl: float


@dataclass(frozen=True)
class Front:
    """Choices of which none is both larger and worse than another, from the smallest.

    bytes: int64 [S], kl: float64 [S], of all units together. picked: for each unit, which state [S'] of the units
    before it, and which of its options, as state * options + option.
    """

    units: Mapping[str, tuple[Option, ...]]
    bytes: Tensor
    kl: Tensor
    picked: tuple[Tensor, ...]

    def smallest(self, kl: float) -> dict[str, str] | None:
        """Formats by unit, with the fewest bytes that add at most so many nats; None where there are none."""
        fit = (self.kl <= kl).nonzero()[:, 0]
        return self.formats(int(fit[0])) if len(fit) else None

    def nearest(self, n_bytes: float) -> dict[str, str] | None:
        """Formats by unit, that add the fewest nats in at most so many bytes; None where there are none."""
        fit = (self.bytes <= n_bytes).nonzero()[:, 0]
        return self.formats(int(fit[-1])) if len(fit) else None

    def formats(self, state: int) -> dict[str, str]:
        formats = {}
        for (name, options), picked in reversed(list(zip(self.units.items(), self.picked, strict=True))):
            state, option = divmod(int(picked[state]), len(options))
            formats[name] = options[option].format
        return dict(reversed(formats.items()))


def front_of(units: Mapping[str, tuple[Option, ...]], states: int = STATES) -> Front:
    """Unit after unit, all sums of what is kept of those before and of its options; exact up to so many states."""
    bytes_S, kl_S = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    picked = []
    for options in units.values():
        bytes_T = (bytes_S[:, None] + torch.tensor([option.bytes for option in options])).flatten()
        kl_T = (kl_S[:, None] + torch.tensor([option.kl for option in options], dtype=torch.float64)).flatten()
        order_T = kl_T.argsort(stable=True)
        order_T = order_T[bytes_T[order_T].argsort(stable=True)]  # by bytes, and of equal ones by nats
        best_T = kl_T[order_T].cummin(0).values
        is_better_T = torch.cat([torch.ones(1, dtype=torch.bool), kl_T[order_T][1:] < best_T[:-1]])
        kept_S = order_T[is_better_T]
        if len(kept_S) > states:
            kept_S = kept_S[torch.linspace(0, len(kept_S) - 1, states).round().long()]
        bytes_S, kl_S = bytes_T[kept_S], kl_T[kept_S]
        picked.append(kept_S)
    return Front(units, bytes_S, kl_S, tuple(picked))


def fitted(noise_LK: Tensor, by_layer_L: Tensor, by_kind_K: Tensor) -> Tensor:
    """float64 [L, K], nats that each matrix of each layer adds: in proportion to its noise, but so that sums over kinds
    and over layers are as measured (iterative proportional fitting). Where both sums differ, the total is the kinds'.
    """
    noise_LK, by_layer_L, by_kind_K = (_positive(x) for x in (noise_LK, by_layer_L, by_kind_K))
    by_layer_L = by_layer_L * by_kind_K.sum() / by_layer_L.sum()
    for _ in range(FITTING):
        noise_LK = noise_LK * (by_layer_L / noise_LK.sum(1))[:, None]
        noise_LK = noise_LK * by_kind_K / noise_LK.sum(0)
    return noise_LK


def _positive(x: Tensor) -> Tensor:
    x = x.double()
    tiny = torch.finfo(torch.float64).tiny
    return x.clamp_min(max(LEAST * x.clamp_min(0).mean().item(), tiny))


def matrix_bytes(rows: int, columns: int, written: str) -> int:
    """Of a matrix in a program, with its scales."""
    return int(linear_bytes(rows, columns, LinearQuant(*format_of(written))))


def formats_that_fit(columns: int) -> tuple[str, ...]:
    """Of a matrix with so many inputs."""
    return FORMATS if columns % 32 == 0 else (BEST,)


def recipe_of(base: Recipe, formats: Mapping[str, str]) -> Recipe:
    """The recipe with these formats by the names of matrices: the commonest for all, and rules for the others, one for
    a kind of matrix where all layers have the same.
    """
    assert base.linear is not None
    counts = Counter(formats.values())
    common = max(FORMATS, key=lambda written: counts[written])
    bits, group_size = format_of(common)
    rules: dict[str, str] = {}
    for kind in dict.fromkeys(name.rpartition(".")[2] for name in formats):
        mine = {name: written for name, written in formats.items() if name.rpartition(".")[2] == kind}
        if len(set(mine.values())) == 1:
            mine = {kind: next(iter(mine.values()))}
        rules |= {name: written for name, written in mine.items() if written != common}
    linear: LinearQuant = replace(base.linear, weight_bits=bits, group_size=group_size, rules=rules)
    quants = [quant_of(name, linear) for name in formats]
    types = list(dict.fromkeys(weight_type(quant) for quant in quants if quant is not None))
    return replace(base, linear=linear, weight_types=types)


@dataclass(frozen=True)
class Tried:
    """Formats by matrix, measured. bytes: of all weights in a program. kl: nats, on held-out texts."""

    formats: dict[str, str]
    bytes: int
    kl: float


def scaled(
    added: Mapping[str, Mapping[str, float]], shapes: Mapping[str, tuple[int, int]], single: Mapping[str, Tried]
) -> dict[str, tuple[Option, ...]]:
    """The options of each matrix: nats so that their sums are what was measured of one format for all.

    added: by matrix and format, in any unit. shapes: (rows, columns).
    """
    factors = {}
    for written, one in single.items():
        total = sum(nats[one.formats[name]] for name, nats in added.items())
        factors[written] = max(0.0, one.kl - single[BEST].kl) / total if total > 0 else 0.0
    return {
        name: tuple(
            Option(written, matrix_bytes(*shapes[name], written), nats[written] * factors[written])
            for written in formats_that_fit(shapes[name][1])
        )
        for name, nats in added.items()
    }


def choose(
    budget: TuneBudget,
    units: Mapping[str, tuple[Option, ...]],
    single: Mapping[str, Tried],
    attempt: Callable[[dict[str, str], Report], Tried],
    report: Report,
) -> Tried:
    """The best of what was measured to meet the budget: nothing is taken that was only predicted to.

    Of a divergence, what is predicted is corrected by what was measured: on a line between the last choice that met the
    budget and the last that did not. `single` has at least one that meets it.
    """
    front, base, smallest = front_of(units), single[BEST], single[FORMATS[0]]
    good = [one for one in single.values() if meets(one, budget)]
    if budget.kl is None:
        rest = base.bytes - sum(options[-1].bytes for options in units.values())
        formats = front.nearest((budget.bytes or 0) - rest)
        tried = [] if formats is None else [attempt(formats, within("round 1", report))]
        return min([*good, *(one for one in tried if meets(one, budget))], key=lambda one: (one.kl, one.bytes))
    most = most_kl(budget)
    met, missed = (
        (0.0, base.kl),
        (_predicted(units, smallest.formats), smallest.kl),
    )  # (predicted to be added, measured)
    pull = 1.0  # where one choice after another does not meet it, steps become bolder
    for i in range(1, ROUNDS + 1):
        if not met[1] < AIM * most or missed[1] <= most:
            break  # it is used up, or no choice would be smaller
        share = pull * (AIM * most - met[1]) / (missed[1] - met[1])
        formats = front.smallest(met[0] + share * (missed[0] - met[0]))
        assert formats is not None, "the best format adds nothing"
        found = attempt(formats, within(f"round {i}", report))
        if (point := (_predicted(units, formats), found.kl)) in (met, missed):
            break
        if meets(found, budget):
            good.append(found)
            met, pull = point, 1.0
        else:
            missed, pull = point, pull if i == 1 else pull / 2
    return min(good, key=lambda one: (one.bytes, one.kl))


def _predicted(units: Mapping[str, tuple[Option, ...]], formats: Mapping[str, str]) -> float:
    return sum(o.kl for name, options in units.items() for o in options if o.format == formats[name])


def most_kl(budget: TuneBudget) -> float:
    """Nats that a choice may lose in eager."""
    return math.inf if budget.kl is None else (1 - ROOM) * budget.kl


def meets(tried: Tried, budget: TuneBudget) -> bool:
    return tried.kl <= most_kl(budget) and (budget.bytes is None or tried.bytes <= budget.bytes)
