"""Which layer of a program is wrong: each against eager's, on the very input that the program gave it.

So an error does not travel: what a wrong layer passes on is right for the next one.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from recipes.bounds import Bounds
from recipes.stored import Weights
from runtime.processor import native_float16
from runtime.program import ProgramError
from validation.eager import embed, keys_and_values, run_layers
from validation.figure import TIE_MARGIN, Figure
from validation.figures import sqnr_db
from validation.output_layer import run_head
from validation.progress import Report, silent, within
from validation.reference import Reference, Sequence, n_tokens
from validation.stream import places
from validation.ties import TieMargins
from validation.trace import Trace, trace
from validation.trace_places import TraceError

SHORT = "short"  # sequences of a few tokens, chosen for being free of rounding ties: validation/recording.py
SAME_DB = 10.0  # of keys or values: only the very layer comes so near, whatever else is wrong with it
# What may be wrong where these parts are: keys are recorded rotated, both as they are given to the cache.
CAUSES = {
    ("keys",): "RoPE or k_proj",
    ("values",): "v_proj",
    ("keys", "values"): "its input norm, or k_proj and v_proj",
    (): "attention (its scale, what it sees of the cache, the order of heads), q_proj, o_proj, the MLP or its norm",
}


@dataclass(frozen=True)
class Fidelity:
    """The worst call, in decibels: over calls that no rounding tie came near in this layer, if there is one.

    output: the residual stream after the layer; of the last layer the logits.
    wrong: what is out of bounds.
    """

    keys_db: float
    values_db: float
    output_db: float
    is_exact: bool
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class WrongLayers:
    """layer: the first that is wrong, None if none is. message: which are wrong, and in what; empty if none is.

    layers: as the program runs them. order: which of the model's each of them is. Both empty if that cannot be told.
    """

    layer: int | None
    message: str
    embedding_db: float
    layers: tuple[Fidelity, ...]
    order: tuple[int, ...]


def find_wrong_layers(
    pte: Path,
    weights: Weights,
    sequences: tuple[Sequence, ...],
    bounds: Bounds,
    report: Report = silent,
) -> WrongLayers:
    """Run the short ones of `sequences` through a program, and hold its layers against the weights it was made of.

    bounds: of the recipe; those of this processor are taken.

    Raises `TraceError`, a `ProgramError`, for a program that has other layers than the model or crashes.
    """
    report(f"{pte.name}, each layer recorded")
    traced = trace(pte, tuple(sequence for sequence in sequences if sequence.name.startswith(SHORT)))
    return compare_layers(traced, weights, bounds.on(native_float16()), report)


def compare_layers(traced: Trace, weights: Weights, bounds: Bounds, report: Report = silent) -> WrongLayers:
    """`find_wrong_layers` with what was recorded already."""
    config = weights.model.config
    sizes = [config.hidden_size, config.num_key_value_heads, config.head_dim, config.vocab_size]
    found = [traced.x_1ND[0].shape[2], *traced.k_1NGd[0].shape[2:], traced.logits[0].shape[1]]
    if found != sizes:
        raise TraceError(f"width, kv heads, head_dim, vocabulary of the program are {found}, the model's are {sizes}")
    L, recorded = config.num_hidden_layers, len(traced.x_1ND)
    order = list(range(L))
    layers = _held(traced, weights, order, bounds, report) if recorded == L else []
    if recorded != L or any(layer.wrong for layer in layers):
        order = _aligned(traced, weights, report)
        if order != list(range(L)):
            layers = _held(traced, weights, order, bounds, report)
    moved, said = _structure(order, recorded, L)
    embedding_db = sqnr_db(embed(weights, traced.sequences, None), traced.x_1ND[0])
    if not embedding_db >= bounds.fidelity_exact_db:
        said.append(f"the embedding is wrong: {embedding_db:.1f} dB, must be at least {bounds.fidelity_exact_db:g}")
    wrong = [order[i] for i, layer in enumerate(layers) if layer.wrong]
    said += _wrong_layers(order, layers)
    return WrongLayers(next(iter(moved + wrong), None), ". ".join(said), embedding_db, tuple(layers), tuple(order))


def _held(traced: Trace, weights: Weights, order: list[int], bounds: Bounds, report: Report) -> list[Fidelity]:
    """What was recorded against these of the model's layers."""
    sequences, recorded = traced.sequences, len(traced.x_1ND)
    ties = TieMargins(n_tokens(sequences))
    layers: list[Fidelity] = []
    given = dict(enumerate(traced.x_1ND))
    runs = run_layers(weights, sequences, None, ties, within("program", report), given.get, order=order)
    for i, run in enumerate(runs):
        parts = {
            "keys": _db(_by_call(sequences, run.k_1NGd), _by_call(sequences, traced.k_1NGd[i])),
            "values": _db(_by_call(sequences, run.v_1NGd), _by_call(sequences, traced.v_1NGd[i])),
        }
        if i + 1 < recorded:
            parts["output"] = _db(_by_call(sequences, run.x_1ND), _by_call(sequences, traced.x_1ND[i + 1]))
        else:
            parts["output"] = _db(_logits(weights, sequences, run.x_1ND, ties), list(traced.logits))
        margins = [margin for row in ties.by_call(sequences) for margin in row]
        ties.margin_N.fill_(torch.inf)  # of the next layer alone
        layers.append(_judged(parts, margins, bounds))
    return layers


def _aligned(traced: Trace, weights: Weights, report: Report) -> list[int]:
    """Which of the model's layers each recorded one is, told by what it makes of its input; empty if some is none.

    Of one short sequence, and by keys and values alone: of a wide model their matrices are a tenth of a layer.
    """
    L, sequence = weights.model.config.num_hidden_layers, traced.sequences[0]
    N = n_tokens((sequence,))
    x_RND, k_RNGd, v_RNGd = (torch.cat(parts)[:, :N] for parts in (traced.x_1ND, traced.k_1NGd, traced.v_1NGd))
    found: list[set[int]] = [set() for _ in x_RND]
    for i in range(L):
        report("which layer is which", i, L)
        expected = zip(*keys_and_values(weights, i, sequence, x_RND), strict=True)
        for n, (k_NGd, v_NGd) in enumerate(expected):
            if sqnr_db(k_NGd, k_RNGd[n]) >= SAME_DB or sqnr_db(v_NGd, v_RNGd[n]) >= SAME_DB:
                found[n].add(i)
    order: list[int] = []
    for layers in found:
        following = order[-1] + 1 if order else 0
        order.append(following if following in layers or not layers else min(layers))
    # One that is like no layer is the one that belongs there, if what comes after it says so.
    known = all(layers or after == i + 1 for layers, i, after in zip(found, order, [*order[1:], L], strict=True))
    return order if known else list(range(L)) if len(order) == L else []


def _structure(order: list[int], recorded: int, L: int) -> tuple[list[int], list[str]]:
    """(the layers that are not where they belong, what is wrong with them)"""
    if not order:
        return [min(recorded, L)], [f"it runs {recorded} layers of {L}, and not all of them are the model's"]
    times = Counter(order)
    missing = [i for i in range(L) if i not in times]
    repeated = [i for i in sorted(times) if times[i] > 1]
    moved = [i for i, there in zip(order, sorted(order), strict=True) if i != there]
    said = []
    if missing:
        said.append(f"{_named(missing)} missing")
    said += [f"layer {i} is run {'twice' if times[i] == 2 else f'{times[i]} times'}" for i in repeated]
    if len(moved) == 2 and not missing and not repeated:
        said.append(f"{_named(sorted(moved))} swapped")
    elif moved:
        said.append(f"layers are run in the order {', '.join(map(str, order))}")
    return sorted({*missing, *repeated, *moved}), said


def _named(layers: list[int]) -> str:
    *first, last = map(str, layers)
    return f"layers {', '.join(first)} and {last} are" if first else f"layer {last} is"


def _by_call(sequences: tuple[Sequence, ...], of_tokens: Tensor) -> list[Tensor]:
    return [of_tokens[0, tokens] for in_stream in places(sequences) for tokens in in_stream]


def _logits(weights: Weights, sequences: tuple[Sequence, ...], x_1ND: Tensor, ties: TieMargins) -> list[Tensor]:
    found: dict[tuple[int, int], Tensor] = {}

    def take(i: int, j: int, logits_KV: Tensor) -> None:
        found[i, j] = logits_KV

    run_head(weights, sequences, x_1ND, take, None, ties)
    return [found[key] for key in sorted(found)]


def _db(expected: list[Tensor], actual: list[Tensor]) -> list[float]:
    return [sqnr_db(*pair) for pair in zip(expected, actual, strict=True)]


def _judged(parts: dict[str, list[float]], margins: list[float], bounds: Bounds) -> Fidelity:
    exact = [margin > TIE_MARGIN for margin in margins]
    worst: dict[str, float] = {}
    wrong = []
    for part, by_call in parts.items():
        free = [db for db, is_free in zip(by_call, exact, strict=True) if is_free]
        worst[part] = _least(free or by_call)
        bound = bounds.fidelity_exact_db if free else bounds.fidelity_db
        if not worst[part] >= bound:  # NaN is never in bounds
            wrong.append(f"{part} {worst[part]:.1f} dB, must be at least {bound:g}")
        elif not _least(by_call) >= bounds.fidelity_db:
            wrong.append(f"{part} {_least(by_call):.1f} dB in some call, must be at least {bounds.fidelity_db:g}")
    return Fidelity(worst["keys"], worst["values"], worst["output"], any(exact), tuple(wrong))


def _least(values: list[float]) -> float:
    return min(values, key=lambda value: -math.inf if math.isnan(value) else value)


def _wrong_layers(order: list[int], layers: list[Fidelity]) -> list[str]:
    wrong = [i for i, layer in enumerate(layers) if layer.wrong]
    if len(wrong) == len(layers) > 1:
        first = layers[0].wrong
        return [f"every layer is wrong: {'; '.join(first)} in the first; look at {_causes(first)}"]
    said = []
    for i in wrong:
        head = " (or the norm and output layer after it)" if _may_be_head(layers, i) else ""
        parts = layers[i].wrong
        said.append(f"layer {order[i]}{head} is wrong: {'; '.join(parts)}; look at {_causes(parts)}")
    return said


def _causes(wrong: tuple[str, ...]) -> str:
    """The output follows from keys and values."""
    return CAUSES[tuple(part for part in ("keys", "values") if any(said.startswith(part) for said in wrong))]


def _may_be_head(layers: list[Fidelity], i: int) -> bool:
    """The program shows nothing between its last attention and the logits."""
    return i == len(layers) - 1 and all(part.startswith("output") for part in layers[i].wrong)


def name_wrong_layer(
    figures: list[Figure],
    pte: Path,
    weights: Weights,
    reference: Reference,
    bounds: Bounds,
    report: Report = silent,
) -> list[Figure]:
    """The first figure of fidelity that failed says in which layer of the program the fault is."""
    failed = next((i for i, f in enumerate(figures) if f.group == "fidelity" and not f.ok), None)
    if failed is None:
        return figures
    try:
        said = find_wrong_layers(pte, weights, reference.sequences, bounds, report).message
    except ProgramError as error:
        said = str(error)
    where = f"{figures[failed].where}; {said or 'in short calls no layer is wrong'}"
    return [replace(f, where=where) if i == failed else f for i, f in enumerate(figures)]
