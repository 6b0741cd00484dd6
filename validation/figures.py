"""The figures of validation: what a program gave against what eager gave, each with its bound."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from validation.figure import IDENTICAL_DB, TIE_MARGIN, Figure
from validation.format import ExpectedFormat, ProgramFormat
from validation.logits import Summary, confidence, log_probability, with_rest
from validation.reference import Expected, Reference
from validation.replay import Replay

# The divergence of the program may be so much more than that of the quantized model in eager, which ties account for.
DIVERGENCE = 1.25
# A recipe that chooses its weights otherwise may not lose more than rounding to the nearest does, but for chance.
OVER_PLAIN = 1.05
MOST_CHANCE = (
    0.25  # of what rounding to the nearest loses: a few texts may make the error of a mean as large as one likes
)
FIRST = 0.25  # of the masked positions: those that decoding would write first


def sqnr_db(expected: Tensor, actual: Tensor) -> float:
    """Signal to noise: 10 log10(sum expected^2 / sum (expected - actual)^2); NaN if anything is not finite."""
    if not torch.isfinite(actual).all():
        return math.nan
    # Row by row: over a whole tensor torch adds in an order that depends on how many threads there are.
    noise = (expected.double() - actual.double()).pow(2).sum(-1).sum().item()
    signal = expected.double().pow(2).sum(-1).sum().item()
    if noise == 0:
        return IDENTICAL_DB
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def fidelity(reference: Reference, replay: Replay, bounds: dict[str, float]) -> list[Figure]:
    """The program against the same model in eager, call by call; the worst counts.

    No call free of ties has to come nearer to eager than rounding allows: `Reference.floor_db`. For the few calls that
    are beyond it, what a tie would make of them is measured: `Expected.floor_db`.
    """
    exact_bound = min(bounds["fidelity_exact_db"], reference.floor_db)
    # Without quantized activations no call has a tie, and both bounds are of the same calls.
    has_ties = any(e.tie_margin < math.inf for expected in reference.expected for e in expected)
    bound = bounds["fidelity_db"] if has_ties else min(bounds["fidelity_db"], reference.floor_db)
    judged = list(_calls(reference, replay))
    calls = [(where, sqnr_db(e.eager, actual.vector), e.tie_margin) for where, e, actual in judged]
    floors = {where: min(bound, e.floor_db) for where, e, _ in judged}
    _, farthest = _worst((db - floors[where], where) for where, db, _ in calls)
    found = next(db for where, db, _ in calls if where == farthest)
    figures = [Figure("fidelity", "fidelity_db", found, floors[farthest], True, farthest)]
    exact = {where: db for where, db, margin in calls if margin > TIE_MARGIN}
    if not exact:
        # In a wide quantized network every call has a tie; `changed_weights` then shows that each weight is right.
        return [replace(figures[0], where=f"{farthest}; no call is free of rounding ties")]
    floors = {where: min(exact_bound, e.floor_db) for where, e, _ in judged}
    _, farthest = _worst((db - floors[where], where) for where, db in exact.items())
    said = f"{farthest}; {len(exact)} of {len(calls)} calls are free of rounding ties"
    return [*figures, Figure("fidelity", "fidelity_exact_db", exact[farthest], floors[farthest], True, said)]


def quality(reference: Reference, replay: Replay, bounds: dict[str, float]) -> list[Figure]:
    """The program against the float32 model, over the rows that predict masks of whole sequences.

    How near a format can come depends on the checkpoint. So the divergence is held against that of the same quantized
    model in eager, and that of plain rounding; what else is bound is the owner's budget, `budget.NAME` in bounds.
    """
    pairs = [(where, e, actual) for where, e, actual in _calls(reference, replay) if e.float32 is not None]
    rows = [(where, e.float32, actual) for where, e, actual in pairs if e.float32 is not None]
    expected, actual = torch.cat([e.vector for _, e, _ in rows]), torch.cat([a.vector for _, _, a in rows])
    top1 = torch.cat([e.top1 == a.top1 for _, e, a in rows]).double().mean().item()
    kl = torch.cat([kl_divergence(e, a) for _, e, a in rows]).mean().item()
    in_eager = torch.cat([e.divergence for _, e, _ in pairs if e.divergence is not None]).double().mean().item()
    cosine = _worst(
        (torch.cosine_similarity(e.vector.double(), a.vector.double(), dim=-1).min().item(), w) for w, e, a in rows
    )
    distance = _worst((-(e.values - a.values).abs().max().item(), w) for w, e, a in rows)
    kl_bound = min(DIVERGENCE * in_eager + bounds["kl_slack"], bounds.get("budget.kl", math.inf))
    where = f"mean of {len(expected)} rows; the quantized model in eager has {in_eager:.3g}"
    figures = [
        Figure("quality", "top1_agreement", top1, None, True, f"{len(expected)} rows"),
        Figure("quality", "kl_divergence", kl, kl_bound, False, where),
        Figure("quality", "sqnr_db", sqnr_db(expected, actual), None, True),
        Figure("quality", "cosine", cosine[0], None, True, cosine[1]),
        Figure("quality", "max_abs_diff", -distance[0], None, False, distance[1]),
        Figure("quality", "order_agreement", _order_agreement(rows), None, True, "of what would be written first"),
    ]
    beside = [(e.plain, kl_divergence(e.float32, a)) for _, e, a in pairs if e.plain is not None and e.float32]
    if beside:
        rounded = torch.cat([plain for plain, _ in beside]).double().mean().item()
        bound = OVER_PLAIN * rounded + bounds["kl_slack"] + min(_chance(beside), MOST_CHANCE * rounded)
        ours = torch.cat([ours for _, ours in beside]).mean().item()
        figures.append(Figure("quality", "kl_beside_plain", ours, bound, False, f"plain rounding has {rounded:.3g}"))
    return [*figures, *_losses(pairs, bounds), *_same_answers(reference, replay)]


def _chance(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Two standard errors of the mean difference of two divergences, in nats, each text's rows taken together."""
    if len(pairs) < 2:
        return 0.0
    differences = torch.stack([(ours.double() - plain.double()).mean() for plain, ours in pairs])
    return 2 * float(differences.std() / math.sqrt(len(pairs)))


def _order_agreement(rows: list[tuple[str, Summary, Summary]]) -> float:
    """Share of the surest quarter of each sequence's masked positions that is the float32 model's too."""
    same = total = 0
    for _, expected, actual in rows:
        n = math.ceil(FIRST * len(expected.top1))
        first, second = (confidence(s).sort(descending=True, stable=True).indices[:n] for s in (expected, actual))
        same, total = same + len(set(first.tolist()) & set(second.tolist())), total + n
    return same / total


def _losses(pairs: list[tuple[str, Expected, Summary]], bounds: dict[str, float]) -> list[Figure]:
    """Nats on the tokens of the texts."""
    losses = []
    for _, e, actual in pairs:
        if e.targets is not None and e.float32 is not None and e.columns is not None:
            losses.append([-log_probability(s, e.columns, e.targets) for s in (actual, e.float32)])
    if not losses:
        return []
    program, float32 = (torch.cat(parts).mean().item() for parts in zip(*losses, strict=True))
    where = f"nats a masked token; float32 has {float32:.4g}"
    increase, allowed = program - float32, bounds.get("budget.loss")
    return [
        Figure("quality", "loss", program, None, False, where),
        Figure("quality", "loss_increase", increase, allowed, False, "nats over float32's"),
    ]


def _same_answers(reference: Reference, replay: Replay) -> list[Figure]:
    if reference.greedy is None or replay.greedy is None:
        return []
    same_NT = reference.greedy.tokens == replay.greedy
    where = (
        f"{len(same_NT)} greedy answers of {same_NT.shape[1]} tokens; {100 * same_NT.double().mean():.0f}% of tokens"
    )
    return [Figure("quality", "same_answers", same_NT.all(1).double().mean().item(), None, True, where)]


def kl_divergence(expected: Summary, actual: Summary) -> Tensor:
    """Nats, float64 [K]. Tokens that were not kept count as one: it is at most the divergence over all tokens."""
    log_p, log_q = (with_rest(s).log_softmax(-1) for s in (expected, actual))
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p == -torch.inf, 0.0, terms).sum(-1)


def repeatability(first: Replay, second: Replay) -> Figure:
    """Two processes must give the same bits, for the calls that both ran."""
    differ = [
        f"{name}/{i}"
        for name, digests in second.digests.items()
        for i, digest in enumerate(digests)
        if digest != first.digests[name][i]
    ]
    n, repeated = (sum(map(len, run.digests.values())) for run in (first, second))
    where = ", ".join(differ[:3]) or (f"{repeated} of {n} calls, the shortest" if repeated < n else "")
    return Figure("repeatability", "calls_that_differ", len(differ), 0, False, where)


def metadata(replay: Replay, expected: ExpectedFormat) -> Figure:
    """What the program says of itself, against what it was made with."""
    names = sorted(replay.metadata.keys() | expected.metadata.keys())
    wrong = [name for name in names if replay.metadata.get(name) != expected.metadata.get(name)]
    return Figure("format", "wrong_metadata", len(wrong), 0, False, ", ".join(wrong))


def program_format(found: ProgramFormat, expected: ExpectedFormat) -> list[Figure]:
    """Proof of the format: what the bytes of the program hold, against what the recipe promises."""
    operators = [f"{name} x{n}" for name, n in found.operators.items() if name not in expected.outside_ops]
    figures = []
    if expected.outside_ops:
        figures.append(Figure("format", "unexpected_operators", len(operators), 0, False, ", ".join(operators)))
    model = Counter(expected.linear_shapes)
    mine = [w for w in found.linears if w.datatype in expected.weight_types and model[w.shape] > 0]
    if expected.weight_types:
        missing = model - Counter(w.shape for w in mine)
        others = Counter((w.datatype, w.shape) for w in found.linears)
        for weight_type in expected.weight_types:
            others -= Counter({(weight_type, shape): n for shape, n in model.items()})
        surplus = [f"{t} {list(s)}" for t, s in others if s not in expected.helper_shapes or t not in ("fp32", "fp16")]
        wrong = [f"no {'/'.join(expected.weight_types)} weight of {list(shape)}" for shape in missing] + surplus
        inputs = [w for w in mine if w.datatype.startswith("q") and w.input_datatype != "qdint8"]
        wrong += [f"{w.datatype} weight with {w.input_datatype} activations" for w in inputs]
        figures.append(Figure("format", "wrong_linear_weights", len(wrong), 0, False, "; ".join(wrong[:4])))
        n_weights = sum(w.shape[0] * w.shape[1] for w in mine)
        per_weight = sum(w.n_bytes for w in mine) / n_weights if n_weights else math.nan
        ideal = expected.bytes_per_weight
        figures.append(
            Figure("format", "bytes_per_weight", per_weight, 1.01 * ideal, False, f"the recipe's ideal is {ideal:.4f}")
        )
    changed = [name for name, digests in expected.weights.items() if found.constants.keys().isdisjoint(digests)]
    figures.append(Figure("format", "changed_weights", len(changed), 0, False, ", ".join(changed[:4])))
    planned = sum(found.planned_memory)
    figures.append(Figure("format", "planned_memory", planned, expected.planned_memory, False, "bytes"))
    return figures


def _calls(reference: Reference, replay: Replay) -> Iterator[tuple[str, Expected, Summary]]:
    for sequence, expected in zip(reference.sequences, reference.expected, strict=True):
        for i, (e, actual) in enumerate(zip(expected, replay.logits[sequence.name], strict=True)):
            yield f"{sequence.name}, call {i}", e, actual


def _worst(values: Iterable[tuple[float, str]]) -> tuple[float, str]:
    return min(values, key=lambda pair: -math.inf if math.isnan(pair[0]) else pair[0])
