"""Which layer of a program is wrong: each against eager's, on the very input that the program gave it.

So an error does not travel: what a wrong layer passes on is right for the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from pipeline.eager import TieMargins, embed, n_tokens, run_head, run_layers
from recipes.blocks import Bounds
from recipes.stored import Weights
from runtime.figures import TIE_MARGIN, sqnr_db
from runtime.reference import Sequence
from runtime.trace import Trace, trace

SHORT = "short"  # sequences of a few tokens, chosen for being free of rounding ties: pipeline/record.py


@dataclass(frozen=True)
class Fidelity:
    """The worst call, in decibels: over calls that no rounding tie came near in this layer, if there is one.

    output: the residual stream after the layer; of the last layer the logits, None where the program has no such.
    wrong: what is out of bounds.
    """

    keys_db: float
    values_db: float
    output_db: float | None
    is_exact: bool
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Located:
    """layer: the first that is wrong, None if none is. message: which are wrong, and in what; empty if none is."""

    layer: int | None
    message: str
    embedding_db: float
    layers: tuple[Fidelity, ...]


def locate(
    pte: Path,
    weights: Weights,
    sequences: tuple[Sequence, ...],
    bounds: Bounds,
    report: Callable[[str], None] = lambda _: None,
) -> Located:
    """Run the short ones of `sequences` through a program, and hold its layers against the weights it was made of.

    Raises `runtime.trace.TraceError`, a `ProgramError`, for a program that has other layers than the model or crashes.
    """
    report("model.pte, each layer recorded")
    traced = trace(pte, tuple(sequence for sequence in sequences if sequence.name.startswith(SHORT)))
    return compare(traced, weights, bounds, report)


def compare(traced: Trace, weights: Weights, bounds: Bounds, report: Callable[[str], None] = lambda _: None) -> Located:
    """`locate` with what was recorded already."""
    L, recorded = weights.model.config.num_hidden_layers, len(traced.x_1ND)
    sequences = traced.sequences
    embedding_db = sqnr_db(embed(weights, sequences, None), traced.x_1ND[0])
    ties = TieMargins(n_tokens(sequences))
    layers: list[Fidelity] = []
    given = dict(enumerate(traced.x_1ND))
    runs = run_layers(weights, sequences, None, ties, lambda at: report(f"program, {at}"), given.get)
    for i, run in enumerate(islice(runs, recorded)):
        parts = {
            "keys": _db(_by_call(sequences, run.k_1NGd), _by_call(sequences, traced.k_1NGd[i])),
            "values": _db(_by_call(sequences, run.v_1NGd), _by_call(sequences, traced.v_1NGd[i])),
        }
        if i + 1 < recorded:
            parts["output"] = _db(_by_call(sequences, run.x_1ND), _by_call(sequences, traced.x_1ND[i + 1]))
        elif recorded == L:
            parts["output"] = _db(_logits(weights, sequences, run.x_1ND, ties), list(traced.logits))
        margins = [margin for row in ties.by_call(sequences) for margin in row]
        ties.margin_N.fill_(torch.inf)  # of the next layer alone
        layers.append(_judged(parts, margins, bounds))
    layer, said = _verdict(embedding_db, layers, bounds)
    if recorded != L:
        layer, said = min(recorded, L) if layer is None else layer, [f"it runs {recorded} layers of {L}", *said]
    return Located(layer, ". ".join(said), embedding_db, tuple(layers))


def _by_call(sequences: tuple[Sequence, ...], of_tokens: Tensor) -> list[Tensor]:
    return list(of_tokens[0].split([len(call.tokens) for sequence in sequences for call in sequence.calls]))


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
    return Fidelity(worst["keys"], worst["values"], worst.get("output"), any(exact), tuple(wrong))


def _least(values: list[float]) -> float:
    return min(values, key=lambda value: -math.inf if math.isnan(value) else value)


def _verdict(embedding_db: float, layers: list[Fidelity], bounds: Bounds) -> tuple[int | None, list[str]]:
    said = []
    if not embedding_db >= bounds.fidelity_exact_db:
        said.append(f"the embedding is wrong: {embedding_db:.1f} dB, must be at least {bounds.fidelity_exact_db:g}")
    wrong = [i for i, layer in enumerate(layers) if layer.wrong]
    if wrong == list(range(len(layers))) and len(layers) > 1:
        said.append(f"every layer is wrong: {'; '.join(layers[0].wrong)} in the first")
    else:
        for i in wrong:
            last = " (or the norm and output layer after it)" if _may_be_head(layers, i) else ""
            said.append(f"layer {i}{last} is wrong: {'; '.join(layers[i].wrong)}")
    return (wrong[0] if wrong else None), said


def _may_be_head(layers: list[Fidelity], i: int) -> bool:
    """The program shows nothing between its last attention and the logits."""
    return i == len(layers) - 1 and all(part.startswith("output") for part in layers[i].wrong)
