"""`generate`: text in, text out, by an artifact alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor

from pipeline.config import Cache, GenerateConfig, decoding_options
from pipeline.display import mib, peak_rss
from pipeline.errors import BadArtifactError, UsageError
from pipeline.opened import Opened, open_artifact
from pipeline.tokenizer import chat_template, decode, encode, render_chat, special_tokens
from runtime.generate import Generation, OptionError, generate
from runtime.program import ProgramError

MASK = "░"


@dataclass(frozen=True)
class Answer:
    text: str
    generation: Generation


def answer_prompt(config: GenerateConfig, err: Console) -> None:
    """One prompt: the answer on stdout, a live view and what it took on stderr. Raises `PipelineError`."""
    opened = open_artifact(Path(config.artifact))
    prompt = config.prompt if config.prompt is not None else sys.stdin.read()
    view = View(opened, err)
    try:
        with view.live():
            answer = _answer(opened, config, prompt, config.chat, view)
    except KeyboardInterrupt:
        _write(sys.stdout, view.plain() + "\n")
        raise
    _write(sys.stdout, answer.text + "\n")
    err.print(_took(answer.generation), style="dim")


def answer_lines(config: GenerateConfig, err: Console) -> None:
    """JSON lines in, JSON lines out. A line that cannot be answered is told, the others are answered.

    Raises `UsageError` at the end if there was one.
    """
    if config.prompt is not None:
        raise UsageError("prompt and prompts: give one of them")
    opened = open_artifact(Path(config.artifact))
    name = "stdin" if config.prompts == "-" else str(config.prompts)
    n = n_failed = 0
    for number, line in _lines(str(config.prompts)):
        n += 1
        try:
            prompt, chat = _parsed(line, config.chat)
            answer = _answer(opened, config, prompt, chat, None)
            took = asdict(answer.generation)
            kept = {name: took[name] for name in ("forward_calls", "positions", "seconds")}
            result = {"line": number, "answer": answer.text, "new_tokens": len(answer.generation.answers[0])} | kept
        except UsageError as error:
            n_failed += 1
            err.print(f"error: {name}, line {number}: {error}", markup=False)
            result = {"line": number, "error": str(error)}
        _write(sys.stdout, json.dumps(result, ensure_ascii=False) + "\n")
    if n_failed or not n:
        raise UsageError(f"{name}: {n_failed} of {n} lines were not answered" if n else f"{name}: holds no line")


def _answer(opened: Opened, config: GenerateConfig, prompt: Any, chat: bool, view: View | None) -> Answer:
    """prompt: text, or a list of messages. Raises `UsageError`, `BadArtifactError`."""
    if chat or not isinstance(prompt, str):
        template = chat_template(opened.folder)
        if template is None:
            raise UsageError(f"{opened.folder} has no chat template: its checkpoint had none")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        prompt = render_chat(template, messages, special_tokens(opened.folder))
    ids = encode(opened.tokenizer, prompt)
    n_new = config.max_new_tokens if config.max_new_tokens is not None else int(opened.manifest["task"]["new_tokens"])
    if view is not None:
        view.prompt_len = len(ids)
    try:
        generation = generate(
            opened.program,
            ids,
            max_new_tokens=n_new,
            cache=None if config.cache is Cache.none else config.cache.value,
            on_step=None if view is None else view.update,
            **decoding_options(config),
        )
    except OptionError as error:
        raise UsageError(str(error)) from error
    except (ProgramError, FloatingPointError) as error:
        raise BadArtifactError(f"{opened.folder}: {error}") from error
    return Answer(decode(opened.tokenizer, generation.answers[0].tolist()), generation)


class View:
    """The answer as it is filled in: masks as blocks, what the last step wrote in green."""

    def __init__(self, opened: Opened, console: Console) -> None:
        self.prompt_len = 0
        self._opened, self._console = opened, console
        self._tokens: list[int] = []
        self._live: Live | None = None

    def live(self) -> Live:
        self._live = Live(console=self._console, transient=True, auto_refresh=False)
        return self._live

    def update(self, step: int, tokens: Tensor) -> None:
        before, self._tokens = self._tokens, tokens[0, self.prompt_len :].tolist()
        if self._console.is_terminal and self._live is not None:
            self._live.update(self._text(step, before), refresh=True)

    def plain(self) -> str:
        """What is written so far."""
        return self._text(0, self._tokens, with_step=False).plain

    def _text(self, step: int, before: list[int], with_step: bool = True) -> Text:
        mask_id, text = self._opened.program.mask_id, Text()
        left = self._tokens.count(mask_id)
        if with_step:
            text.append(f"step {step + 1}, {left} masks left\n", style="dim")
        before = before or [mask_id] * len(self._tokens)
        for is_mask, is_new, ids in _runs(self._tokens, before, mask_id):
            style = "dim" if is_mask else "bold green" if is_new else ""
            text.append(MASK * len(ids) if is_mask else decode(self._opened.tokenizer, ids), style=style)
        return text


def _runs(tokens: list[int], before: list[int], mask_id: int) -> Iterator[tuple[bool, bool, list[int]]]:
    """Neighbours that look alike, together: a character may be made of several tokens."""
    from itertools import groupby

    pairs = zip(tokens, before, strict=True)
    for (is_mask, is_new), run in groupby(pairs, key=lambda pair: (pair[0] == mask_id, pair[0] != pair[1])):
        yield is_mask, is_new, [token for token, _ in run]


def _lines(name: str) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank. Raises `UsageError`."""
    try:
        with sys.stdin if name == "-" else Path(name).open(encoding="utf-8", errors="surrogateescape") as opened:
            for number, line in enumerate(opened, start=1):
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
    if isinstance(entry, dict) and isinstance(entry.get("messages"), list) and "prompt" not in entry:
        return entry["messages"], True
    if isinstance(entry, dict) and isinstance(entry.get("prompt"), str) and "messages" not in entry:
        return entry["prompt"], chat
    raise UsageError('expected a JSON object with a "prompt" (text) or with "messages" (a list)')


def _took(generation: Generation) -> str:
    n = len(generation.answers[0])
    return (
        f"{n} tokens in {generation.seconds:.2f} s: {generation.tokens_per_second:.1f} tokens/s, "
        f"{generation.forward_calls} forward calls over {generation.positions} positions, peak memory {mib(peak_rss())}"
    )


def _write(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()
