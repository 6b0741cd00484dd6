"""What an artifact is worth on a task: prompts that a checker judges, gaps of unknown length, hidden words of texts."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.errors import UsageError
from runtime.infill import DRAWN_BY
from runtime.limits import LimitError, limited
from runtime.text import TextArtifact, fill_in, write
from runtime.tokenizer import decode, encode
from validation.settings import EvaluatedTask
from validation.tasks import Checker, load_checker, read_gaps, wilson_interval
from validation.texts import SHORTEST, hidden_of, read_texts

CHECK_BYTES = 2**28  # that a checker in a process of its own may take


@dataclass(frozen=True)
class Outcome:
    """right: of `of` things that could be, one answer or the words that were hidden. nats: of all hidden tokens of a
    text, before any was written, by the program's own distribution.
    """

    right: int
    of: int
    steps: int
    forward_calls: int
    positions: int
    seconds: float
    nats: float | None = None
    tokens: int = 0


Item = partial[Outcome]  # of (artifact, options of `runtime.generate`)


def items_of(task: EvaluatedTask, artifact: TextArtifact, n: int) -> list[Item]:
    """At most n. Raises `UsageError` for a task that is none, and for files that are wrong."""
    if task.texts is not None:
        return _texts(task, artifact, n)
    if task.prompts is None or task.checker is None:
        raise UsageError(f"task {task.name!r} has no prompts or no checker: nothing to solve")
    check, lines = load_checker(Path(task.checker)), read_gaps(Path(task.prompts))[:n]
    return [
        partial(_solve, task=task, check=check, prompt=prompt)
        if suffix is None
        else partial(_fill, task=task, check=check, prompt=prompt, suffix=suffix)
        for prompt, suffix in lines
    ]


def are_gaps(items: list[Item]) -> bool:
    """Whether all of them are gaps of unknown length."""
    return all(item.func is _fill for item in items)


def _solve(
    artifact: TextArtifact, options: dict[str, Any], task: EvaluatedTask, check: Checker, prompt: str
) -> Outcome:
    written = write(artifact, encode(artifact.tokenizer, prompt), task.new_tokens, options)
    answer = decode(artifact.tokenizer, written.answers[0].tolist())
    is_right = _checked(task, check, prompt, answer)
    cost = (written.forward_calls, written.positions, written.seconds)
    return Outcome(int(is_right), 1, len(written.history) - 1, *cost)


def _fill(
    artifact: TextArtifact, options: dict[str, Any], task: EvaluatedTask, check: Checker, prompt: str, suffix: str
) -> Outcome:
    """A gap of unknown length, as DreamOn fills it; of the options those that are given and of a gap."""
    given = {name: options[name] for name in DRAWN_BY if options.get(name) is not None}
    filled = fill_in(artifact, prompt, suffix, {"seed": 0} | given)
    is_right = _checked(task, check, prompt, decode(artifact.tokenizer, filled.tokens.tolist()), suffix)
    return Outcome(int(is_right), 1, len(filled.history) - 1, filled.forward_calls, filled.positions, filled.seconds)


def _checked(task: EvaluatedTask, check: Checker, *asked: str) -> bool:
    """A check that runs too long, or takes too much, says that the answer is wrong: it may be the answer that ran."""
    if task.limit is None:
        return bool(check(*asked))
    try:
        return bool(limited(math.ceil(task.limit), CHECK_BYTES, check, *asked))
    except LimitError:
        return False


def _texts(task: EvaluatedTask, artifact: TextArtifact, n: int) -> list[Item]:
    """Raises `UsageError`."""
    if not 0 < task.hidden < 1:
        raise UsageError(
            f"task.hidden {task.hidden:g}: is the share of a text's tokens that is hidden, between 0 and 1"
        )
    file = Path(str(task.texts))
    longest = artifact.program.max_seq_len
    usable = []
    for text in read_texts(file, "task.texts", artifact.folder):
        encoding = artifact.tokenizer.encode(text, add_special_tokens=False)
        if SHORTEST <= len(encoding.ids):
            usable.append((torch.tensor(encoding.ids[:longest]), _words_of(text, encoding.offsets[:longest])))
    if not usable:
        raise UsageError(f"task.texts: {file} has no text of {SHORTEST} tokens or more")
    generator, items = torch.Generator().manual_seed(0), []
    for i, (tokens_T, words) in enumerate(usable[:n]):
        hidden_T = hidden_of(len(tokens_T), task.hidden, 2 * (i % 2), generator)  # anywhere, or in the middle
        items.append(partial(_infill, tokens_T=tokens_T, hidden_T=hidden_T, words=words))
    return items


def _words_of(text: str, offsets: list[tuple[int, int]]) -> list[int]:
    """Of each token, which word of the text it is of: the one that its last character is in."""
    return [len(text[: max(start, end - 1) + 1].split()) for start, end in offsets]


def _infill(
    artifact: TextArtifact, options: dict[str, Any], tokens_T: Tensor, hidden_T: Tensor, words: list[int]
) -> Outcome:
    program = artifact.program
    given_T = tokens_T.masked_fill(hidden_T, program.mask_id)
    at_M = hidden_T.nonzero()[:, 0]
    nats = 0.0
    for rows_K in (at_M - 1).split(program.max_rows):
        logits_KV = program.start()(given_T, 0, len(given_T), rows_K)[0].double()
        true_K = tokens_T[rows_K + 1]
        nats -= float(logits_KV.log_softmax(-1).gather(1, true_K[:, None]).sum())
    written = write(artifact, given_T.tolist(), 0, options | {"stop_at_eos": False})
    wrong = {words[at] for at in (written.tokens[0] != tokens_T).nonzero()[:, 0].tolist()}
    asked = {words[at] for at in at_M.tolist()}
    cost = (written.forward_calls, written.positions, written.seconds)
    return Outcome(len(asked - wrong), len(asked), len(written.history) - 1, *cost, nats, len(at_M))


@dataclass(frozen=True)
class Score:
    """solved: the share (0..1) of all things that are right, low and high its 95% interval. what: those are "prompts"
    or "words". loss: nats a hidden token, and half the width of its 95% interval. Totals over n items.
    """

    task: str
    cache: str
    rule: str
    what: str
    n: int
    solved: float
    low: float
    high: float
    steps: int
    forward_calls: int
    positions: int
    seconds: float
    loss: float | None = None
    loss_error: float | None = None


def score(task: EvaluatedTask, cache: str, rule: str, outcomes: list[Outcome]) -> Score:
    right, of = sum(one.right for one in outcomes), sum(one.of for one in outcomes)
    is_text = task.texts is not None
    low, high = _clustered(outcomes) if is_text else wilson_interval(right, of)
    tokens = sum(one.tokens for one in outcomes)
    loss = sum(one.nats or 0.0 for one in outcomes) / tokens if tokens else None
    return Score(
        task=task.name,
        cache=cache,
        rule=rule,
        what="words" if is_text else "prompts",
        n=len(outcomes),
        solved=right / of,
        low=low,
        high=high,
        steps=sum(one.steps for one in outcomes),
        forward_calls=sum(one.forward_calls for one in outcomes),
        positions=sum(one.positions for one in outcomes),
        seconds=sum(one.seconds for one in outcomes),
        loss=loss,
        loss_error=None if loss is None else 1.96 * _error([(one.nats or 0.0, one.tokens) for one in outcomes]),
    )


def _clustered(outcomes: list[Outcome]) -> tuple[float, float]:
    """The words of a text are not independent of each other: the interval is that of texts."""
    share = sum(one.right for one in outcomes) / sum(one.of for one in outcomes)
    half = 1.96 * _error([(one.right, one.of) for one in outcomes])
    return max(0.0, share - half), min(1.0, share + half)


def _error(pairs: list[tuple[float, int]]) -> float:
    """The standard error of a ratio of sums over independent items."""
    n, total = len(pairs), sum(of for _, of in pairs)
    ratio = sum(value for value, _ in pairs) / total
    if n < 2:
        return math.inf
    return math.sqrt(n * statistics.fmean((value - ratio * of) ** 2 for value, of in pairs) * n / (n - 1)) / total
