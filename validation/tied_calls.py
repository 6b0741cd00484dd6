"""Calls that rounding ties bring far from eager: how far rounding alone may lead, measured on these very calls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from recipes.stored import Weights
from validation.eager import run_by_layer
from validation.figure import TIE_MARGIN
from validation.figures import sqnr_db
from validation.logits import summarize
from validation.products import product
from validation.progress import Report, silent, within
from validation.reference import Expected, Reference, Sequence
from validation.replay import Replay

RUNS = 12
# Of the size of a token's products: ten times what another order of summation moves, since a dozen runs see few ties.
MOVED = 1e-5
MARGIN_DB = 3.0  # a program may meet a worse tie than all runs did
MOST = 3  # sequences. A wrong program is wrong in more of them, and then nothing is excused


def with_floors(
    reference: Reference, replay: Replay, quantized: Weights, bounds: Mapping[str, float], report: Report = silent
) -> Reference:
    """The reference with `Expected.floor_db` for the few calls that the program does not answer within bounds.

    In some networks a single activation that falls to its other side is as loud as all rounding of the others; in those
    with outliers float32's rounding moves an activation by more than `TIE_MARGIN`, so that a call has a tie that was
    not seen. Then eager, its products moved as float32's rounding may move them, is as far from itself.
    """
    exact_db = min(bounds["fidelity_exact_db"], reference.floor_db)

    def bound_of(e: Expected) -> float:
        return (
            bounds["fidelity_db"] if e.tie_margin <= TIE_MARGIN else exact_db if e.tie_margin < math.inf else -math.inf
        )

    def is_far(i: int, sequence: Sequence) -> bool:
        calls = zip(reference.expected[i], replay.logits[sequence.name], strict=True)
        return any(sqnr_db(e.eager, actual.vector) < bound_of(e) for e, actual in calls)

    asked = [i for i, sequence in enumerate(reference.sequences) if is_far(i, sequence)]
    if not 0 < len(asked) <= MOST:
        return reference
    expected = list(reference.expected)
    for n, i in enumerate(asked):
        report("how far ties lead", n, len(asked))
        worst = _moved(quantized, reference.sequences[i], [e.eager for e in expected[i]], within("ties", report))
        floors = zip(expected[i], worst, strict=True)
        expected[i] = tuple(replace(e, floor_db=db - MARGIN_DB) for e, db in floors)
    return replace(reference, expected=tuple(expected))


def _moved(weights: Weights, sequence: Sequence, eager: list[Tensor], report: Report) -> list[float]:
    """Decibels of each call, the worst of all runs."""
    generator = torch.Generator().manual_seed(0)

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = product(x, weight, bias)
        size = y.pow(2).mean(-1, keepdim=True).sqrt()
        return y + MOVED * size * torch.randn(y.shape, generator=generator)

    worst = [math.inf] * len(eager)

    def take(_: int, j: int, logits_KV: Tensor) -> None:
        worst[j] = min(worst[j], sqnr_db(eager[j], summarize(logits_KV).vector))

    # What moves one token alone must not move all that are like it.
    run_by_layer(weights, (sequence,) * RUNS, take, report=report, multiply=multiply, once=False)
    return worst
