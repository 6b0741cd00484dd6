"""`generate`: text in, text out, by an artifact alone."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor

from pipeline.config import nearest
from pipeline.console import warn_out_of_bounds
from pipeline.schema import DecodingConfig, GenerateConfig, decoding_options
from pipeline.streams import shows_all
from report.terminal import mib
from runtime.chat import chat_template, render_chat
from runtime.errors import UsageError
from runtime.generation import Generation
from runtime.infill import Infilled
from runtime.memory import peak_rss
from runtime.text import TextArtifact, cut_at, open_text_artifact, write
from runtime.tokenizer import decode, encode, special_tokens

MASK = "░"
LINE_KEYS = ["prompt", "messages"]


@dataclass(frozen=True)
class Answer:
    """asked: new tokens that there could have been."""

    text: str
    generation: Generation
    asked: int


def answer_prompt(config: GenerateConfig, err: Console) -> None:
    """One prompt: the answer on stdout, a live view and what it took on stderr. Raises `PipelineError`."""
    artifact = open_text_artifact(Path(config.artifact), config.packed_cache, config.threads)
    warn_out_of_bounds(err, artifact.folder, artifact.manifest)
    prompt = config.prompt if config.prompt is not None else _stdin().read()
    view = View(artifact, err)
    try:
        with view.live():
            answer = _answer(artifact, config, prompt, config.chat, view)
    except KeyboardInterrupt:
        say(view.plain() + "\n")
        raise
    say(answer.text + "\n")
    if note := _if_empty(answer):
        err.print(note, markup=False)
    err.print(what_it_took(answer.generation, len(answer.generation.answers[0])), style="dim")


def answer_lines(config: GenerateConfig, err: Console) -> None:
    """JSON lines in, JSON lines out. A line that cannot be answered is told, the others are answered.

    Raises `UsageError` at the end if there was one.
    """
    if config.prompt is not None:
        raise UsageError("prompt and prompts: give one of them")
    artifact = open_text_artifact(Path(config.artifact), config.packed_cache, config.threads)
    warn_out_of_bounds(err, artifact.folder, artifact.manifest)
    name = "stdin" if config.prompts == "-" else str(config.prompts)
    n = n_failed = 0
    for number, line in _lines(str(config.prompts)):
        n += 1
        try:
            prompt, chat = _parsed(line, config.chat)
            answer = _answer(artifact, config, prompt, chat, None)
            took = asdict(answer.generation)
            kept = {name: took[name] for name in ("forward_calls", "positions", "seconds")}
            result = {"line": number, "answer": answer.text, "new_tokens": len(answer.generation.answers[0])} | kept
        except UsageError as error:
            n_failed += 1
            err.print(f"error: {name}, line {number}: {error}", markup=False)
            result = {"line": number, "error": str(error)}
        say(json.dumps(result, ensure_ascii=not shows_all(sys.stdout)) + "\n")
    if n_failed or not n:
        raise UsageError(f"{name}: {n_failed} of {n} lines were not answered" if n else f"{name}: holds no line")


def _answer(artifact: TextArtifact, config: GenerateConfig, prompt: Any, chat: bool, view: View | None) -> Answer:
    """prompt: text, or a list of messages. Raises `UsageError`, `BadArtifactError`."""
    if chat or not isinstance(prompt, str):
        template = chat_template(artifact.folder)
        if template is None:
            raise UsageError(f"{artifact.folder} has no chat template: its checkpoint had none")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        prompt = render_chat(template, messages, special_tokens(artifact.folder))
    ids = encode(artifact.tokenizer, prompt)
    n_new = artifact.new_tokens if config.max_new_tokens is None else config.max_new_tokens
    # A prompt with masks in it is shown as it was filled, the answer after it.
    shown = 0 if artifact.program.mask_id in ids else len(ids)
    if view is not None:
        view.start = shown
    on_step = None if view is None else view.update
    # A line break cannot be typed in Hydra's quotes.
    stop = [text.replace("\\n", "\n").replace("\\t", "\t") for text in config.stop or []]
    generation = write(artifact, ids, n_new, decoding_options(config, config.cache), on_step, stop)
    prompt_ids, answer_ids = generation.tokens[0, shown : len(ids)].tolist(), generation.answers[0].tolist()
    text = decode(artifact.tokenizer, prompt_ids + answer_ids)
    if stop:
        text = decode(artifact.tokenizer, prompt_ids) + cut_at(decode(artifact.tokenizer, answer_ids), stop)
    return Answer(text, generation, n_new)


def _if_empty(answer: Answer) -> str:
    """What to do about an answer that ended before it began."""
    if len(answer.generation.answers[0]) or not answer.asked:
        return ""
    return "note: the answer is empty, its first token was an end: min_new_tokens=16 or eos_penalty=3 ask for more"


class View:
    """The answer as it is filled in: masks as blocks, what the last step wrote in green."""

    def __init__(self, artifact: TextArtifact, console: Console) -> None:
        self.start = 0  # of what is shown
        self._artifact, self._console = artifact, console
        self._tokens: list[int] = []
        self._live: Live | None = None

    def live(self) -> Live:
        self._live = Live(console=self._console, transient=True, auto_refresh=False)
        return self._live

    def update(self, step: int, tokens: Tensor) -> None:
        self.show(step, tokens[0, self.start :].tolist())

    def show(self, step: int, tokens: list[int]) -> None:
        before, self._tokens = self._tokens, tokens
        if before and len(before) != len(tokens):  # masks went, or became two: nothing was written
            before = tokens
        if self._console.is_terminal and self._live is not None:
            self._live.update(self._text(step, before), refresh=True)

    def plain(self) -> str:
        """What is written so far."""
        return self._text(0, self._tokens, with_step=False).plain

    def _text(self, step: int, before: list[int], with_step: bool = True) -> Text:
        mask_id, text = self._artifact.program.mask_id, Text()
        left = self._tokens.count(mask_id)
        if with_step:
            text.append(f"step {step + 1}, {left} masks left\n", style="dim")
        before = before or [mask_id] * len(self._tokens)
        for is_mask, is_new, ids in _runs(self._tokens, before, mask_id):
            style = "dim" if is_mask else "bold green" if is_new else ""
            text.append(MASK * len(ids) if is_mask else decode(self._artifact.tokenizer, ids), style=style)
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
