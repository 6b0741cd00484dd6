"""`report.json`: what a run took, and what validation saw beyond the figures, the data of the plots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recipes.options import Dtype, Recipe
from recipes.stored import Weights
from report.files import json_numbers
from runtime.processor import machine
from runtime.tokenizer import decode
from validation.effort import effort_for
from validation.figures import kl_divergence, sqnr_db
from validation.judge import Measured, Validated, figure_dict
from validation.logits import Summary, log_probability
from validation.progress import Report, within
from validation.quantization_noise import quantization_noise
from validation.reference import Call, Expected, Sequence, Task
from validation.replay import Answers
from validation.tasks import load_checker

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BINS = 61  # of the differences; odd, so that one of them is "no difference"
MEANS = ("same", "kl", "loss", "float32_loss")  # of rows that are shown by group
GROUPS = 8  # of rows, by where they are and by how much of the answer is written


def report_data(
    validated: Validated,
    noise: dict[str, Any] | None,
    tokenizer: Tokenizer | None,
    checker: Path | None,
    stages: list[dict[str, Any]],
    estimate: dict[str, Any],
    created: str,
) -> dict[str, Any]:
    """What `report.json` holds. noise: as `noise_of` gives it. checker: of the task that was solved, if any."""
    measured, replay = validated.measured, validated.measured.replay
    examples = None
    if measured.reference.task and validated.float32_answers and replay.answers and tokenizer and checker:
        answers = (validated.float32_answers, replay.answers)
        examples = _examples(tokenizer, measured.reference.task, checker, *answers)
    return {
        "valid": validated.ok,
        "created": created,
        "machine": machine() | {"threads": replay.threads},
        "stages": stages,
        "estimate": estimate,
        "program": {
            "load_seconds": replay.load_seconds,
            "run_seconds": replay.run_seconds,
            "peak_rss": replay.peak_rss,
            "anonymous": replay.anonymous,
        },
        "figures": [figure_dict(figure) for figure in validated.figures],
        "solved": asdict(validated.solved) if validated.solved else None,
        "calls": _calls(measured),
        "differences": _differences(measured),
        "agreement": _agreement(measured),
        "examples": examples,
        "noise": noise,
    }


def _calls(measured: Measured) -> list[dict[str, Any]]:
    """Each recorded call: its sizes, what it took, and how near the program comes to eager (None: not a number)."""
    replay, listed = measured.replay, []
    for sequence, expected in zip(measured.reference.sequences, measured.reference.expected, strict=True):
        for i, (call, asked) in enumerate(zip(sequence.calls, expected, strict=True)):
            entry = {
                "where": f"{sequence.name}, call {i}",
                "tokens": len(call.tokens),
                "kv_len": call.kv_len,
                "rows": len(call.rows),
                "seconds": replay.seconds[sequence.name][i],
                "fidelity_db": json_numbers(sqnr_db(asked.eager, replay.logits[sequence.name][i].vector)),
                "tie_margin": json_numbers(asked.tie_margin),
            }
            listed.append(entry)
    return listed


def _differences(measured: Measured) -> dict[str, Any]:
    """Of the logits from float32's, as a histogram: `counts` of equal bins from -`limit` to `limit`.

    median, p95: of the size of a difference. spread: the standard deviation of float32's logits. not_finite: how many
    of the program's logits are no number.
    """
    pairs = [(e.values.flatten(), a.values.flatten()) for *_, e, a in _whole(measured)]
    float32 = torch.cat([e for e, _ in pairs]).double()
    difference = torch.cat([a for _, a in pairs]).double() - float32
    numbers = difference[difference.isfinite()]
    size = numbers.abs().sort().values
    limit = size[-1].item() if len(size) and size[-1] > 0 else 1.0
    return {
        "limit": limit,
        "counts": torch.histc(numbers, BINS, -limit, limit).long().tolist(),
        "median": size[len(size) // 2].item() if len(size) else None,
        "p95": size[int(0.95 * (len(size) - 1))].item() if len(size) else None,
        "spread": json_numbers(float32.std().item()),
        "not_finite": len(difference) - len(numbers),
    }


def _agreement(measured: Measured) -> dict[str, list[dict[str, Any]]]:
    """With float32, by the position that a row predicts, by the masks that are left, and by their share in percent of
    the sequence: what generation goes through.

    Each group: its first and last position, number of masks or percent, rows, share of them that prefer float32's
    token, and mean divergence in nats. Where the rows predict tokens of a text also the loss, the program's and
    float32's.
    """
    mask_id = measured.replay.metadata["get_mask_id"]
    rows: dict[str, list[Tensor]] = {
        name: [] for name in ("position", "masks", "ratio", "same", "kl", "loss", "float32_loss")
    }
    for call, asked, e, a in _whole(measured):
        rows["position"].append(call.rows + 1)  # a row predicts the token after it
        masks = int((call.tokens == mask_id).sum())
        rows["masks"].append(torch.full((len(call.rows),), masks))
        rows["ratio"].append(torch.full((len(call.rows),), round(100 * masks / len(call.tokens))))
        rows["same"].append(e.top1 == a.top1)
        rows["kl"].append(kl_divergence(e, a))
        if asked.targets is not None and asked.columns is not None:
            rows["loss"].append(-log_probability(a, asked.columns, asked.targets))
            rows["float32_loss"].append(-log_probability(e, asked.columns, asked.targets))
    columns = {name: torch.cat(parts) for name, parts in rows.items() if parts}
    means: dict[str, Tensor] = {
        name: columns[name] for name in ("same", "kl", "loss", "float32_loss") if name in columns
    }
    return {by: _grouped(columns[by], means) for by in ("position", "masks", "ratio")}


def noise_of(
    float32: Weights, quantized: Weights, recipe: Recipe, sequences: tuple[Sequence, ...], report: Report
) -> dict[str, Any] | None:
    """Of each layer and matrix, as `ModelNoise` has it; None for a recipe that leaves float32 as it is."""
    if recipe.dtype is Dtype.float32 and recipe.linear is None and recipe.embedding is None:
        return None
    tokens = effort_for(quantized.model.config).noise  # fewer than `explain` takes
    measured = quantization_noise(float32, quantized, sequences, within("noise", report), tokens)
    found: dict[str, Any] = json_numbers(asdict(measured))
    return found


def _examples(tokenizer: Tokenizer, task: Task, checker: Path, float32: Answers, program: Answers) -> dict[str, Any]:
    """Answers of both: of the same ones that which took most steps, and the first one that differs.

    An answer is pieces of text, each with the step that wrote it and whether the other says something else there.
    """
    same_N = (float32.tokens == program.tokens).all(1)
    steps_N = torch.where(same_N, float32.steps.amax(1), -1)
    chosen = ([int(steps_N.argmax())] if same_N.any() else []) + (~same_N).nonzero()[:1, 0].tolist()
    check, shown = load_checker(checker), []
    for i in chosen:
        prompt = decode(tokenizer, task.prompts[i].tolist(), skip_special_tokens=False)
        entry: dict[str, Any] = {"number": i + 1, "prompt": prompt, "differs": not bool(same_N[i])}
        for name, mine, other in (("float32", float32, program), ("program", program, float32)):
            answer = decode(tokenizer, mine.tokens[i].tolist())
            entry[name] = {
                "pieces": _pieces(tokenizer, mine.tokens[i], mine.steps[i], mine.tokens[i] != other.tokens[i]),
                "steps": int(mine.steps[i].max()) + 1,
                "solved": check(decode(tokenizer, task.prompts[i].tolist()), answer),
            }
        shown.append(entry)
    return {"prompts": len(same_N), "same": int(same_N.sum()), "shown": shown}


def _whole(measured: Measured) -> Iterator[tuple[Call, Expected, Summary, Summary]]:
    """The calls that quality is judged by: (call, what is expected, float32's, the program's)."""
    for sequence, expected in zip(measured.reference.sequences, measured.reference.expected, strict=True):
        for i, (call, asked) in enumerate(zip(sequence.calls, expected, strict=True)):
            if asked.float32 is not None:
                yield call, asked, asked.float32, measured.replay.logits[sequence.name][i]


def _grouped(x: Tensor, means: dict[str, Tensor]) -> list[dict[str, Any]]:
    first, last = int(x.min()), int(x.max())
    n = min(GROUPS, last - first + 1)
    group = (x - first) * n // (last - first + 1)
    groups = []
    for i in range(n):
        mine = group == i
        if mine.any():
            entry = {"first": int(x[mine].min()), "last": int(x[mine].max()), "rows": int(mine.sum())}
            groups.append(entry | {name: json_numbers(y[mine].double().mean().item()) for name, y in means.items()})
    return groups


def _pieces(tokenizer: Tokenizer, tokens: Tensor, steps: Tensor, differs: Tensor) -> list[dict[str, Any]]:
    """A character may be made of several tokens: they become one piece."""
    pieces, ids = [], list[int]()
    for i, token in enumerate(tokens.tolist()):
        ids.append(token)
        text = decode(tokenizer, ids, skip_special_tokens=False)
        if "\ufffd" in text and len(ids) < 4 and i + 1 < len(tokens):
            continue
        covered = slice(i + 1 - len(ids), i + 1)
        entry = {"text": text, "step": int(steps[covered].max()), "differs": bool(differs[covered].any())}
        pieces.append(entry)
        ids = []
    return pieces
