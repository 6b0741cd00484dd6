"""The end of eager's way: the last norm and the output layer, some rows and a slice of the vocabulary at a time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn

from model.dream import RMSNorm
from recipes.stored import Weights
from recipes.threads import one_thread_each
from validation.activations import quantized_noting_ties, quantizes_activations
from validation.products import product
from validation.progress import Report, silent
from validation.reference import Sequence, calls_of
from validation.stream import places
from validation.ties import TieMargins

ROWS = 512  # whose logits are computed at once
VOCAB = 8192  # rows of the output layer that are in memory at once

Take = Callable[[int, int, Tensor], None]
Multiply = Callable[..., Tensor]  # (x, weight, bias), as F.linear


@torch.no_grad()
def normed_rows(
    weights: Weights, sequences: tuple[Sequence, ...], x_1ND: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """(what the output layer is given [R, D], which of the N tokens that are [R]): the rows of all calls."""
    config = weights.model.config
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    norm.weight = nn.Parameter(weights.rows("norm.weight", dtype=dtype), requires_grad=False)
    in_stream = chain.from_iterable(places(sequences))
    rows_R = torch.cat([tokens.start + call.rows for call, tokens in zip(calls_of(sequences), in_stream, strict=True)])
    return norm(x_1ND[0, rows_R]), rows_R


@torch.no_grad()
def run_head(
    weights: Weights,
    sequences: tuple[Sequence, ...],
    x_1ND: Tensor,
    take: Take,
    dtype: torch.dtype | None,
    ties: TieMargins | None,
    report: Report = silent,
    multiply: Multiply = product,
) -> None:
    """The norm and the output layer, over what the last layer gave."""
    x_RD, rows_R = normed_rows(weights, sequences, x_1ND, dtype)
    if quantizes_activations(weights, "lm_head.weight"):
        x_RD = quantized_noting_ties(x_RD, ties, rows_R)
    _take_logits(weights, sequences, x_RD, take, report, multiply)


def _take_logits(
    weights: Weights,
    sequences: tuple[Sequence, ...],
    x_RD: Tensor,
    take: Take,
    report: Report,
    multiply: Multiply,
) -> None:
    """The output layer over some rows at a time, a slice of the vocabulary at a time."""
    calls = [(i, j, len(call.rows)) for i, sequence in enumerate(sequences) for j, call in enumerate(sequence.calls)]
    V = weights.model.config.vocab_size
    at = 0
    while calls:
        batch = [calls.pop(0)]
        while calls and sum(K for *_, K in batch) + calls[0][2] <= ROWS:
            batch.append(calls.pop(0))
        R = sum(K for *_, K in batch)
        report("rows of logits", at, len(x_RD))
        logits_RV = torch.empty(R, V)
        for start in range(0, V, VOCAB):
            head_WD = weights.rows("lm_head.weight", slice(start, min(V, start + VOCAB)), x_RD.dtype)
            logits_RV[:, start : start + VOCAB] = multiply(x_RD[at : at + R], head_WD).float()
        weights.release("lm_head.")
        weights.release("embed_tokens.")  # of a tied model
        at += R
        with one_thread_each():
            for (i, j, _), logits_KV in zip(batch, logits_RV.split([K for *_, K in batch]), strict=True):
                take(i, j, logits_KV)
