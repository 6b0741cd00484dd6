"""What validation runs: calls in every use of the contract, and what eager gives for them."""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor

from recipes.stored import Weights
from validation.activations import quantizes_activations
from validation.eager import Twin, run_by_layer
from validation.effort import effort_for
from validation.figure import TIE_MARGIN
from validation.figures import kl_divergence, sqnr_db
from validation.float32 import Float32, Request
from validation.logits import summarize
from validation.overflow import Float16Error, check_finite, overflow_watch
from validation.progress import Report, silent, within
from validation.reference import Call, Expected, Reference, Sequence

MAX_BLOCK = 32
# A right program may be so much farther off than eager's `Twin`. In float32 that has other sums: programs have
# other roots, exponentials and sums of attention besides: four times the noise (measured: up to 8 dB). In float16 it is
# exact, and a program rounds as often as eager does: twice the noise if nothing cancels (measured: it is nearer).
ROUNDING_DB = {torch.float32: 12.0, torch.float16: 3.0}
N_SHORT = 5  # of each kind


def make_reference(
    quantized: Weights,
    float32: Float32,
    plain: Weights | None,
    request: Request,
    report: Report,
) -> Reference:
    """The recorded calls with what eager gives. quantized: as the recipe made the model; float32: of it as it was.

    plain: the same, its weights rounded to the nearest, where the recipe does otherwise. Raises `Float16Error`.
    """
    config, whole, material = quantized.model.config, float32.whole, request.material
    effort, lengths = effort_for(config), (request.max_seq_len, request.max_rows)
    contract = contract_sequences(material.prompts, config.mask_token_id, *lengths, effort.at_the_end)
    candidates = short_candidates(material.prompts, effort.candidates)
    sequences = (*whole, *contract, *candidates)
    beside = None if material.is_random else plain  # which of two loses less is no question of noise
    expected, rounding = run_eager(quantized, float32, sequences, report, beside, effort.plain)
    n = len(whole) + len(contract)
    chosen = [*range(n), *(n + i for i in freest_of_ties(candidates, expected[n:]))]
    sequences = (*whole, *contract, *renumbered(candidates, [i - n for i in chosen[n:]]))
    worst_db = min((db for i in chosen for db in rounding.get(i, ())), default=math.inf)
    floor_db = worst_db - ROUNDING_DB[quantized.model.norm.weight.dtype]
    return Reference(sequences, tuple(expected[i] for i in chosen), floor_db, request.task, float32.greedy)


def contract_sequences(
    prompts: list[Tensor], mask_id: int, S: int, max_rows: int, at_the_end: int | None = None
) -> tuple[Sequence, ...]:
    """Every other use of the contract, on the first prompt; S, max_seq_len, is at least 4. at_the_end: of `Effort`."""
    L = min(len(prompts[0]) + MAX_BLOCK, S)
    tokens = torch.cat([prompts[0], torch.full((L,), mask_id)])[:L]
    P = L - min(MAX_BLOCK, L // 2)  # the block is [P, L)
    middle = (P + L) // 2
    other = prompts[-1].repeat(L)[: middle - P]

    def block(start: int, tokens: Tensor, kv_len: int) -> Call:
        return Call(tokens, start, kv_len, torch.arange(len(tokens))[:max_rows])

    def rows(*rows: int) -> Call:
        return Call(tokens, 0, L, torch.tensor(rows))

    whole, last = block(0, tokens, L), block(P, tokens[P:], L)
    prefill = Call(tokens[:P], 0, P, torch.tensor([P - 1]))
    longest = torch.cat([*prompts, torch.full((S,), mask_id)])[:S]
    spread = torch.linspace(0, S - 1, min(8, max_rows)).long()
    end = longest[-1:]
    if at_the_end is not None:
        end, longest = longest[: min(at_the_end, S // 2)], torch.full((S,), mask_id)
    return (
        Sequence("prefill-then-block", (prefill, last, last)),
        Sequence("rewrite-inside", (whole, block(P, other, L), block(P, tokens[P:middle], L))),
        Sequence("suffix-hidden", (whole, block(P, other, middle), block(middle, tokens[middle:], L))),
        Sequence("rows-subset", (rows(L - 1, 0, L // 2), rows(1))),
        Sequence("one-token", tuple(block(i, tokens[i : i + 1], i + 1) for i in range(4))),
        Sequence("one-inside", (whole, block(P - 1, tokens[:1], L), block(0, tokens[P : P + 1], L))),
        Sequence("max-length", (Call(longest, 0, S, spread), block(S - len(end), end, S))),
    )


def short_candidates(prompts: list[Tensor], n: int) -> tuple[Sequence, ...]:
    """n of each kind: two to four tokens at once; two, then more after them; four, then some of them again."""
    candidates = []
    for i in range(n):
        tokens = prompts[i % len(prompts)].roll(-5 * i).repeat(4)[:4]
        length, m = 2 + i % 3, 1 + i % 2

        def call(tokens: Tensor, start: int, kv_len: int) -> Call:
            return Call(tokens, start, kv_len, torch.arange(len(tokens)))

        candidates += [
            Sequence("short", (call(tokens[:length], 0, length),)),
            Sequence("short-append", (call(tokens[:2], 0, 2), call(tokens[2 : 2 + m], 2, 2 + m))),
            Sequence("short-rewrite", (call(tokens, 0, 4), call(tokens[:m], 1, 4))),
        ]
    return tuple(candidates)


def freest_of_ties(candidates: tuple[Sequence, ...], expected: list[tuple[Expected, ...]]) -> list[int]:
    """Of each kind those in which no activation comes near a rounding tie: here a single wrong weight shows.

    In longer calls of a quantized model some activation always sits so near a tie that float32 rounding moves it
    to another integer, and one such step drowns the effect of a wrong weight. See docs/validation.md.
    """
    chosen = []
    for kind in dict.fromkeys(candidate.name for candidate in candidates):
        mine = [i for i, candidate in enumerate(candidates) if candidate.name == kind]
        chosen += sorted(mine, key=lambda i: -expected[i][-1].tie_margin)[:N_SHORT]
    return chosen


def renumbered(candidates: tuple[Sequence, ...], chosen: list[int]) -> list[Sequence]:
    seen: Counter[str] = Counter()
    sequences = []
    for i in chosen:
        kind = candidates[i].name
        sequences.append(Sequence(f"{kind}-{seen[kind]:02d}", candidates[i].calls))
        seen[kind] += 1
    return sequences


def run_eager(
    quantized: Weights,
    float32: Float32,
    sequences: tuple[Sequence, ...],
    report: Report = silent,
    plain: Weights | None = None,
    most_plain: int = 10**6,
) -> tuple[list[tuple[Expected, ...]], dict[int, list[float]]]:
    """(what eager gives for every call, by sequence the decibels that rounding makes: see `Twin`).

    The first is the quantized model's, and for whole sequences the float32 model's too, with what their rows are to
    predict and, of at most so many, how far the plainly rounded model is from it. The second is of calls that are free
    of ties: of all where no activation is quantized, else of the short ones. Raises `Float16Error`.
    """
    whole, wide, targets = float32.whole, float32.logits, float32.targets
    dtype = quantized.model.norm.weight.dtype
    rounded: dict[str, Tensor] = {}

    def keep_rounded(i: int, _: int, logits_KV: Tensor) -> None:
        if dtype == torch.float16:
            check_finite("the logits", logits_KV)
        float32_summary, columns_KC = wide[beside[i].name]
        rounded[beside[i].name] = kl_divergence(float32_summary, summarize(logits_KV, columns_KC)).float()

    beside = whole[:: -(-len(whole) // most_plain)]  # few and many masks alike
    if plain is not None:
        try:
            told = within("plainly rounded", report)
            run_by_layer(plain, beside, keep_rounded, None, told, watch=overflow_watch(dtype))
        except Float16Error:  # nothing to be held against
            rounded.clear()
    eager: dict[tuple[int, int], Tensor] = {}
    divergence: dict[int, Tensor] = {}

    def keep_eager(i: int, j: int, logits_KV: Tensor) -> None:
        if dtype == torch.float16:
            check_finite("the logits", logits_KV)
        float32_summary, columns_KC = wide.get(sequences[i].name, (None, None))
        summary = summarize(logits_KV, columns_KC)
        eager[i, j] = summary.vector
        if float32_summary is not None:
            divergence[i] = kl_divergence(float32_summary, summary).float()

    twice = [i for i, sequence in enumerate(sequences) if _summed_twice(quantized, sequence)]
    other: dict[tuple[int, int], Tensor] = {}

    def keep_other(i: int, j: int, logits_KV: Tensor) -> None:
        other[twice[i], j] = summarize(logits_KV).vector

    twin = Twin(tuple(sequences[i] for i in twice), keep_other) if twice else None
    asked = (sequences, keep_eager, None, within("quantized", report), twin)
    margins = run_by_layer(quantized, *asked, overflow_watch(dtype))
    expected = []
    for i, (sequence, row) in enumerate(zip(sequences, margins, strict=True)):
        float32_summary, columns = wide.get(sequence.name, (None, None))
        kept = (float32_summary, columns, divergence.get(i))
        more = (rounded.get(sequence.name), targets.get(sequence.name))
        expected.append(tuple(Expected(eager[i, j], *kept, margin, *more) for j, margin in enumerate(row)))
    rounding: dict[int, list[float]] = {i: [] for i in twice}
    for (i, j), vector in other.items():
        if margins[i][j] > TIE_MARGIN:
            rounding[i].append(sqnr_db(eager[i, j], vector))
    return expected, rounding


def _summed_twice(weights: Weights, sequence: Sequence) -> bool:
    """Long calls of a quantized network have ties."""
    return sequence.name.startswith("short") or not quantizes_activations(weights, "lm_head.weight")
