"""Texts: a file of JSON lines or plain text, as tokens, of which a diffusion model sees some masked."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from runtime.chat import chat_template, render_chat
from runtime.errors import UsageError
from runtime.tokenizer import encode, special_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

SHORTEST = 8  # tokens of a text that can be used
TOKENS_PER_CHARACTER = 2.0  # above, the tokenizer tears the language to bytes
KEYS = ("text", "prompt", "messages")


def read_texts(file: Path, key: str, checkpoint: Path) -> list[str]:
    """JSON lines of "text", "prompt" or "messages", or plain text: its paragraphs.

    key: that named the file. checkpoint: whose chat template makes a text of messages. Raises `UsageError` that names
    the line.
    """
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise UsageError(f"{key}: {file} is not UTF-8: {wrong}") from error
    except OSError as error:
        raise UsageError(f"{key}: {file} cannot be read: {error.strerror or error}") from error
    if not content.strip():
        raise UsageError(f"{key}: {file} is empty")
    if not content.lstrip().startswith("{"):
        return [paragraph for paragraph in re.split(r"\n\s*\n", content) if paragraph.strip()]
    return list(_of_lines(file, content.split("\n"), checkpoint))


def _of_lines(file: Path, lines: list[str], checkpoint: Path) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            (name,) = [name for name in KEYS if name in entry]
            yield _rendered(entry[name], checkpoint) if name == "messages" else _text(entry[name])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(
                f'{file}, line {number}: expected a JSON object with a "text", a "prompt" or "messages"'
            ) from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _rendered(messages: Any, checkpoint: Path) -> str:
    template = chat_template(checkpoint)
    if template is None:
        raise UsageError(f'{checkpoint} has no chat template: give texts as "text" in place of "messages"')
    whole = [{"role": _text(message["role"]), "content": _text(message["content"])} for message in messages]
    return render_chat(template, whole, special_tokens(checkpoint))


def tokens_of(tokenizer: Tokenizer, texts: list[str], what: str, least: int) -> list[Tensor]:
    """int64 [T] of each text of at least `SHORTEST` tokens. what: the key and its file.

    Warns of a language that the tokenizer tears to bytes. Raises `UsageError` for fewer than `least` texts.
    """
    encoded = [torch.tensor(encode(tokenizer, text), dtype=torch.int64) for text in texts]
    per_character = sum(map(len, encoded)) / max(1, sum(map(len, texts)))
    if per_character > TOKENS_PER_CHARACTER:
        log.warning(
            "%s: %.1f tokens a character: the tokenizer does not know this language, and tears it to bytes",
            what,
            per_character,
        )
    usable = [tokens for tokens in encoded if len(tokens) >= SHORTEST]
    if len(usable) < least:
        raise UsageError(
            f"{what}: {len(usable)} of {len(texts)} texts have {SHORTEST} tokens or more, at least {least} are needed"
        )
    return usable


def windows(texts: list[Tensor], length: int) -> list[Tensor]:
    """Texts cut into pieces of at most `length` tokens; a rest that is too short is left out."""
    return [piece for tokens in texts for piece in tokens.split(length) if len(piece) >= min(SHORTEST, length)]


def hidden_of(n_tokens: int, ratio: float, kind: int, generator: torch.Generator) -> Tensor:
    """bool [n_tokens]: what is to be filled in, at least one token and never the first, which no row predicts.

    kind: 0 anywhere, 1 a suffix, 2 a middle.
    """
    n = min(max(1, round(ratio * (n_tokens - 1))), n_tokens - 1)
    hidden = torch.zeros(n_tokens, dtype=torch.bool)
    if kind == 0:
        hidden[1 + torch.randperm(n_tokens - 1, generator=generator)[:n]] = True
        return hidden
    start = n_tokens - n if kind == 1 else 1 + int(torch.randint(n_tokens - n, (1,), generator=generator))
    hidden[start : start + n] = True
    return hidden
