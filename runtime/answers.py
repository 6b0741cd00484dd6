"""Text in, text out: what a prompt or a chat becomes, and the answers to it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.chat import chat_template, render_chat
from runtime.defaults import GENERATION_CONFIG, with_defaults
from runtime.errors import UsageError
from runtime.generation import Generation, OnStep
from runtime.text import TextArtifact, cut_at, write
from runtime.tokenizer import decode, special_tokens

MAX_ANSWERS = 128  # to one prompt
EMPTY = "the answer is empty, its first token was an end: min_new_tokens=16 or eos_penalty=3 ask for more"


@dataclass(frozen=True)
class Answer:
    """asked: new tokens that there could have been. seed: of this answer, if it was drawn. is_cut: before a stop."""

    text: str
    generation: Generation
    asked: int
    seed: int | None = None
    is_cut: bool = False

    @property
    def likelihood(self) -> float:
        """Nats a token, by the model itself when it wrote them; 0 for an empty answer."""
        assert self.generation.logprobs is not None
        (logprobs_T,) = self.generation.logprobs
        return float(logprobs_T.double().mean()) if len(logprobs_T) else 0.0


def typed(stop: list[str] | None) -> list[str]:
    """Texts as somebody typed them: a line break cannot be typed in Hydra's quotes."""
    return [text.replace("\\n", "\n").replace("\\t", "\t") for text in stop or []]


def prompt_of(artifact: TextArtifact, given: str | list[dict[str, str]], chat: bool) -> str:
    """given: text, or messages, which the chat template makes a prompt of. Raises `UsageError`."""
    if isinstance(given, str) and not chat:
        return given
    template = chat_template(artifact.folder)
    if template is None:
        raise UsageError(f"{artifact.folder} has no chat template: its checkpoint had none")
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    return render_chat(template, messages, special_tokens(artifact.folder))


def answer(
    artifact: TextArtifact,
    ids: list[int],
    max_new_tokens: int,
    options: dict[str, Any],
    stop: Sequence[str] = (),
    on_step: OnStep | None = None,
) -> Answer:
    """options: as for `runtime.text.write`. Raises `UsageError`, `BadArtifactError`.

    A prompt with masks in it is shown as it was filled, the answer after it.
    """
    generation = write(artifact, ids, max_new_tokens, options, on_step, stop)
    shown = 0 if artifact.program.mask_id in ids else len(ids)
    prompt_ids, answer_ids = generation.tokens[0, shown : len(ids)].tolist(), generation.answers[0].tolist()
    text = decode(artifact.tokenizer, prompt_ids + answer_ids)
    if not stop:
        return Answer(text, generation, max_new_tokens, options.get("seed"))
    own = decode(artifact.tokenizer, answer_ids)
    cut = cut_at(own, stop)
    text = decode(artifact.tokenizer, prompt_ids) + cut
    return Answer(text, generation, max_new_tokens, options.get("seed"), is_cut=cut != own)


def best_answers(
    artifact: TextArtifact,
    ids: list[int],
    max_new_tokens: int,
    options: dict[str, Any],
    n: int,
    best_of: int | None = None,
    stop: Sequence[str] = (),
    on_step: OnStep | None = None,
) -> list[Answer]:
    """n answers, of seeds one after another; of `best_of` the n that the model finds likeliest, those first.

    Raises `UsageError`, `BadArtifactError`.
    """
    n_drawn = n if best_of is None else best_of
    check_counts(artifact, n, n_drawn, options)
    first = random.SystemRandom().randrange(2**31) if options.get("seed") is None else options["seed"]
    answers = [
        answer(artifact, ids, max_new_tokens, options | {"seed": seed, "logprobs": True}, stop, on_step)
        for seed in range(first, first + n_drawn)
    ]
    if best_of is not None:
        answers.sort(key=lambda one: -one.likelihood)
    return answers[:n]


def check_counts(artifact: TextArtifact, n: int, best_of: int, options: dict[str, Any]) -> None:
    """Raises `UsageError` for numbers of answers that cannot be, or that would all be the same."""
    if not 1 <= n <= MAX_ANSWERS:
        raise UsageError(f"n {n}: must be from 1 to {MAX_ANSWERS}")
    if not n <= best_of <= MAX_ANSWERS:
        raise UsageError(f"best_of {best_of}: must be at least n, {n}, and at most {MAX_ANSWERS}")
    used = with_defaults(options, artifact.own)
    if best_of > 1 and not (used["temperature"] or used["alg_temp"] or used["alg"] == "origin"):
        raise UsageError(f"{best_of} answers would be the same: give temperature=0.5 or another above 0, or alg_temp")


def said_of_own(artifact: TextArtifact, options: dict[str, Any]) -> str:
    """A line that says which options are the checkpoint's own; empty if none is."""
    used = with_defaults(options, artifact.own)
    own = [
        f"{name}={value}" for name, value in artifact.own.items() if options.get(name) is None and used[name] == value
    ]
    return f"the checkpoint's own: {' '.join(own)} ({GENERATION_CONFIG})" if own else ""
