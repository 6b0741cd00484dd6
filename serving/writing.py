"""What is done when it is a request's turn: its prompts are read, its answers written, and both said as they come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from runtime.answers import Answer, answer, best_answers, prompt_of
from runtime.canvas import runs
from runtime.conversation import Message
from runtime.options import IN_PLACE
from runtime.text import TextArtifact, cut_at
from runtime.tokenizer import decode, encode
from serving.requests import Request, RequestError
from serving.turns import Job

OFTEN = 256  # tokens of an answer, where nobody says


@dataclass(frozen=True)
class Served:
    """name: of the model. options: of `runtime.generate`, where a request says nothing. most: tokens of an answer."""

    name: str
    artifact: TextArtifact
    options: dict[str, Any]
    most: int


@dataclass(frozen=True)
class Canvas:
    """After a step: what is written, in runs of `runtime.canvas`."""

    index: int
    step: int
    masks_left: int
    runs: list[tuple[str, str]]


@dataclass(frozen=True)
class Piece:
    """Text that will not change, after what was said before."""

    index: int
    text: str


@dataclass(frozen=True)
class Ended:
    """logprobs: (token, nats) of each token that was written, if asked for."""

    index: int
    text: str
    finish_reason: str
    logprobs: list[tuple[str, float]] | None


@dataclass(frozen=True)
class Done:
    prompt_tokens: int
    new_tokens: int


def write(served: Served, request: Request, job: Job) -> None:
    """Raises `PipelineError`, `RequestError`, and what `Job.check` raises."""
    n_prompt = n_new = index = 0
    for given in request.prompts:
        ids = _ids_of(served.artifact, given)
        asked = _asked(served, request, len(ids))
        n_prompt += len(ids)
        for one in _answers(served, request, ids, asked, index, job):
            n_new += len(one.generation.answers[0])
            job.say(Ended(index, one.text, _finish_reason(one), _logprobs(served.artifact, one)))
            index += 1
    job.say(Done(n_prompt, n_new))


def _ids_of(artifact: TextArtifact, given: str | list[int] | list[Message]) -> list[int]:
    if isinstance(given, list) and given and isinstance(given[0], int):
        return [int(i) for i in given if isinstance(i, int)]
    return encode(artifact.tokenizer, prompt_of(artifact, given, chat=False))  # type: ignore[arg-type]


def _asked(served: Served, request: Request, n_prompt: int) -> int:
    room = served.artifact.program.max_seq_len - n_prompt
    asked = min(OFTEN, served.most, max(1, room)) if request.max_new_tokens is None else request.max_new_tokens
    if asked > served.most:
        raise RequestError(f"max_tokens {asked}: at most {served.most} are written at once here", "max_tokens")
    if asked > room:
        held = served.artifact.program.max_seq_len
        raise RequestError(f"{n_prompt} tokens of prompt and {asked} new ones are more than the {held} that fit")
    return asked


def _answers(served: Served, request: Request, ids: list[int], asked: int, index: int, job: Job) -> Iterator[Answer]:
    given = {name: value for name, value in request.options.items() if value is not None}
    own = dict(served.options)
    if IN_PLACE & given.keys():  # a rule in place of the server's
        own.pop("threshold", None)
    options = own | given | {"stop_at_eos": True, "logprobs": request.logprobs}
    if request.best_of is not None:
        look = _Look(served.artifact, ids, request, index, job)  # which says nothing: there is no stream of the best
        yield from best_answers(
            served.artifact, ids, asked, options, request.n, request.best_of, request.stop, look.after_step
        )
        return
    for i in range(request.n):
        look = _Look(served.artifact, ids, request, index + i, job)
        drawn = options | ({} if options.get("seed") is None else {"seed": options["seed"] + i})
        one = answer(served.artifact, ids, asked, drawn, request.stop, look.after_step)
        if request.stream:
            look.say(one.text)
        yield one


class _Look:
    """Between two steps: is it still asked for, and what is there to say?"""

    def __init__(self, artifact: TextArtifact, ids: list[int], request: Request, index: int, job: Job) -> None:
        self.artifact, self.request, self.index, self.job = artifact, request, index, job
        self.start = 0 if artifact.program.mask_id in ids else len(ids)
        self.said = ""
        self.before: list[int] = []

    def after_step(self, step: int, tokens_BL: Tensor) -> None:
        self.job.check()
        if not self.request.stream:
            return
        tokens = tokens_BL[0, self.start :].tolist()
        mask_id = self.artifact.program.mask_id
        if self.request.canvas:
            before = self.before or [mask_id] * len(tokens)
            shown = list(runs(self.artifact, tokens, before))
            self.job.say(Canvas(self.index, step + 1, tokens.count(mask_id), shown))
            self.before = tokens
        self.say(self._certain(tokens))

    def _certain(self, tokens: list[int]) -> str:
        """What stands before the first mask and the first end, and is no beginning of a character or of a stop."""
        ends = {self.artifact.program.mask_id, *self.artifact.program.eos_ids}
        n = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        text = decode(self.artifact.tokenizer, tokens[:n])
        cut = cut_at(text, self.request.stop)
        if cut != text or n == len(tokens):
            return cut
        held = max((len(stop) - 1 for stop in self.request.stop), default=0)
        return text[: len(text) - held].rstrip("\N{REPLACEMENT CHARACTER}")

    def say(self, text: str) -> None:
        """All of an answer that is known now; what was said stays."""
        if len(text) > len(self.said) and text.startswith(self.said):
            self.job.say(Piece(self.index, text[len(self.said) :]))
            self.said = text


def _finish_reason(one: Answer) -> str:
    (answer_ids,) = one.generation.answers
    return "length" if len(answer_ids) == one.asked and not one.is_cut else "stop"


def _logprobs(artifact: TextArtifact, one: Answer) -> list[tuple[str, float]] | None:
    if one.generation.logprobs is None:
        return None
    pairs = zip(one.generation.answers[0].tolist(), one.generation.logprobs[0].tolist(), strict=True)
    return [(decode(artifact.tokenizer, [token], skip_special_tokens=False), nats) for token, nats in pairs]
