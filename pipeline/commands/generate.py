"""`generate`: text in, text out, by an artifact alone."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from pipeline.config import nearest
from pipeline.decoding import DecodingConfig, decoding_options
from pipeline.opening import opened
from pipeline.schema import GenerateConfig
from pipeline.streams import shows_all
from pipeline.view import View
from report.terminal import mib
from runtime.answers import EMPTY, Answer, answer, best_answers, prompt_of, typed
from runtime.errors import UsageError
from runtime.generation import Generation
from runtime.infill import Infilled
from runtime.memory import peak_rss
from runtime.text import TextArtifact
from runtime.tokenizer import encode

LINE_KEYS = ["prompt", "messages"]


def answer_prompt(config: GenerateConfig, err: Console) -> None:
    """One prompt: the answer on stdout, a live view and what it took on stderr. Several answers are JSON lines.

    Raises `PipelineError`.
    """
    artifact = opened(config, err)
    prompt = config.prompt if config.prompt is not None else _stdin().read()
    view = View(artifact, err)
    try:
        with view.live():
            answers = _answers(artifact, config, prompt, config.chat, view)
    except KeyboardInterrupt:
        say(view.plain() + "\n")
        raise
    for one in answers:
        say((_json(_entry(one)) if config.n > 1 else one.text) + "\n")
        if note := _if_empty(one):
            err.print(note, markup=False)
        err.print(what_it_took(one.generation, len(one.generation.answers[0])), style="dim")


def answer_lines(config: GenerateConfig, err: Console) -> None:
    """JSON lines in, JSON lines out. A line that cannot be answered is told, the others are answered.

    Raises `UsageError` at the end if there was one.
    """
    if config.prompt is not None:
        raise UsageError("prompt and prompts: give one of them")
    artifact = opened(config, err)
    name = "stdin" if config.prompts == "-" else str(config.prompts)
    n = n_failed = 0
    for number, line in _lines(str(config.prompts)):
        n += 1
        try:
            prompt, chat = _parsed(line, config.chat)
            entries = [_entry(one) for one in _answers(artifact, config, prompt, chat, None)]
            result = {"line": number} | (entries[0] if config.n == 1 else {"answers": entries})
        except UsageError as error:
            n_failed += 1
            err.print(f"error: {name}, line {number}: {error}", markup=False)
            result = {"line": number, "error": str(error)}
        say(_json(result) + "\n")
    if n_failed or not n:
        raise UsageError(f"{name}: {n_failed} of {n} lines were not answered" if n else f"{name}: holds no line")


def _answers(artifact: TextArtifact, config: GenerateConfig, given: Any, chat: bool, view: View | None) -> list[Answer]:
    """given: text, or a list of messages. Raises `UsageError`, `BadArtifactError`."""
    ids = encode(artifact.tokenizer, prompt_of(artifact, given, chat))
    n_new = artifact.new_tokens if config.max_new_tokens is None else config.max_new_tokens
    if view is not None:
        view.start = 0 if artifact.program.mask_id in ids else len(ids)
    on_step = None if view is None else view.update
    stop = typed(config.stop)
    options = decoding_options(config, config.cache)
    if config.n == 1 and config.best_of is None:
        return [answer(artifact, ids, n_new, options, stop, on_step)]
    return best_answers(artifact, ids, n_new, options, config.n, config.best_of, stop, on_step)


def _entry(one: Answer) -> dict[str, Any]:
    """Of one answer, in JSON lines."""
    took = {name: getattr(one.generation, name) for name in ("forward_calls", "positions", "seconds")}
    entry = {"answer": one.text, "new_tokens": len(one.generation.answers[0])} | took
    return entry if one.generation.logprobs is None else entry | {"seed": one.seed, "likelihood": one.likelihood}


def _if_empty(answer: Answer) -> str:
    """What to do about an answer that ended before it began."""
    if len(answer.generation.answers[0]) or not answer.asked:
        return ""
    return f"note: {EMPTY}"


def _lines(name: str) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank. Raises `UsageError`."""
    try:
        with _stdin_lines() if name == "-" else Path(name).open(encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UsageError(f"prompts: {name} cannot be read: {error.strerror or error}") from error


def _parsed(line: str, chat: bool) -> tuple[Any, bool]:
    """The prompt's text, or its messages; and whether it goes into the chat template."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not JSON: {error}") from error
    surplus = [key for key in entry if key not in LINE_KEYS] if isinstance(entry, dict) else []
    if surplus:
        raise UsageError(_no_line_key(surplus[0]))
    if isinstance(entry, dict) and isinstance(entry.get("messages"), list) and "prompt" not in entry:
        return entry["messages"], True
    if isinstance(entry, dict) and isinstance(entry.get("prompt"), str) and "messages" not in entry:
        return entry["prompt"], chat
    raise UsageError('expected a JSON object with a "prompt" (text) or with "messages" (a list)')


def _no_line_key(key: str) -> str:
    close = nearest(key, LINE_KEYS)
    option = "" if close else nearest(key, [field.name for field in fields(DecodingConfig)])
    if option:
        return f"no key {key!r} in a line{option} That is given to the command, for all lines"
    return f"no key {key!r} in a line{close or '; it has a prompt or messages'}"


def what_it_took(written: Generation | Infilled, n: int) -> str:
    return (
        f"{n} tokens in {written.seconds:.2f} s: {written.tokens_per_second:.1f} tokens/s, "
        f"{written.forward_calls} forward calls over {written.positions} positions, peak memory {mib(peak_rss())}"
    )


def _json(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=not shows_all(sys.stdout))


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _stdin_lines() -> TextIO:
    """JSON is UTF-8, whatever a terminal has."""
    stdin = _stdin()
    if isinstance(stdin, io.TextIOWrapper):
        stdin.reconfigure(encoding="utf-8-sig")
    return stdin


def _stdin() -> TextIO:
    if sys.stdin is None:
        raise UsageError("no prompt is given, and stdin is closed")
    return sys.stdin
