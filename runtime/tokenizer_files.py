"""The files of a tokenizer, read with suspicion: sizes, encodings, and what the tokenizers library says of them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as short
from typing import Any

from runtime.errors import InputError

CONFIG = "tokenizer_config.json"
MAX_BYTES = 64_000_000
MAX_NESTED = 4_000_000  # lists and objects of a file, which Python makes 64 bytes and more of


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with special_tokens_map.json over it if it does not itself hold the added tokens."""
    settings = read_object(folder / CONFIG)
    extra = listed_tokens(folder, settings, "extra_special_tokens") or listed_tokens(
        folder, settings, "additional_special_tokens"
    )
    if "added_tokens_decoder" not in settings:
        mapped = read_object(folder / "special_tokens_map.json")
        extra += listed_tokens(folder, mapped, "extra_special_tokens")
        extra = extra or listed_tokens(folder, mapped, "additional_special_tokens")
        settings |= mapped
    return settings | {"extra_special_tokens": extra}


def read_object(file: Path) -> dict[str, Any]:
    """Empty if there is no such file. Raises `InputError`."""
    if not file.is_file():
        return {}
    text = read_text(file)
    if text.count("[") + text.count("{") > MAX_NESTED:
        raise InputError(f"{file}: more than {MAX_NESTED} lists and objects: not a file of a tokenizer")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON: {in_one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: not a JSON object")
    return content


def read_text(file: Path) -> str:
    """Raises `InputError`."""
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise InputError(f"{file}: {size} bytes, more than {MAX_BYTES}: not a file of a tokenizer")
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8: {in_one_line(error)}") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error


@contextmanager
def refusing(file: Path) -> Iterator[None]:
    """Turns what the tokenizers library says into `InputError`."""
    try:
        with no_panic():
            yield
    except Exception as error:
        raise InputError(f"{file}: not a tokenizer: {in_one_line(error)}") from error


@contextmanager
def no_panic() -> Iterator[None]:
    """A panic of the library's Rust code is no `Exception`, and writes to stderr: here it is a quiet `ValueError`.

    A regular expression that backtracks without end is one: the library gives up after ten million steps.
    """
    sys.stderr.flush()
    with Path(os.devnull).open("w") as null:
        stderr = os.dup(2)
        os.dup2(null.fileno(), 2)
        try:
            yield
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise ValueError(in_one_line(error)) from error
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def in_one_line(error: BaseException) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 200 else f"{line[:200]}…"


def listed_tokens(folder: Path, settings: dict[str, Any], key: str) -> list[str]:
    """Special tokens without a name of their own."""
    tokens = settings.get(key) or []
    if not isinstance(tokens, list | dict):
        raise InputError(f"{folder}: {key}: {short(tokens)} is no list of tokens")
    return [token_text(folder, key, token) for token in (tokens.values() if isinstance(tokens, dict) else tokens)]


def token_text(where: Path, key: str, token: Any) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise InputError(f"{where}: {key}: {short(token)} is no token")
    return content
