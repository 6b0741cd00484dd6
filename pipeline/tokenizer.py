"""The tokenizer and the chat template of a checkpoint folder, as transformers' Qwen2 tokenizer reads them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError, UsageError
from runtime.limited import LimitError, limited

if TYPE_CHECKING:
    from jinja2 import Template
    from tokenizers import AddedToken, Encoding, Tokenizer

TOKENIZER_FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
MAX_BYTES = 64_000_000
MAX_NESTED = 4_000_000  # lists and objects of a file, which Python makes 64 bytes and more of
# `Tokenizer.save` walks through all ids up to the largest, used or not.
MAX_ID = 2**24
TEMPLATE_SECONDS, TEMPLATE_BYTES = 10, 2**28  # that a chat template may take
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
QWEN2_DEFAULTS = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """From tokenizer.json, else from vocab.json and merges.txt; None if there is neither. Raises `InputError`."""
    if (folder / "tokenizer.json").is_file():
        return _from_tokenizer_json(folder / "tokenizer.json")
    if (folder / "vocab.json").is_file() or (folder / "merges.txt").is_file():
        return _from_vocabulary(folder)
    return None


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """No token is added to those of the text. Raises `UsageError` if the text would not come through whole."""
    try:
        text.encode()
        with _no_panic():
            encoding = tokenizer.encode(text, add_special_tokens=False)
            lost = _first_lost(tokenizer, text, encoding)
    except UnicodeEncodeError as error:
        raise UsageError(f"character {error.start} of the text, {text[error.start]!r}, is not valid Unicode") from error
    except Exception as error:
        raise UsageError(f"the tokenizer cannot encode the text: {_one_line(error)}") from error
    if lost is not None:
        raise UsageError(f"the tokenizer's vocabulary has no token for {lost!r} (U+{ord(lost):04X})")
    return encoding.ids


def decode(tokenizer: Tokenizer, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
    """Raises `InputError` for a tokenizer that cannot."""
    try:
        with _no_panic():
            return tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
    except Exception as error:
        raise InputError(f"the tokenizer cannot decode its own tokens: {_one_line(error)}") from error


def special_tokens(folder: Path) -> dict[str, str]:
    """bos_token, eos_token, …, the variables of a chat template. Raises `InputError`."""
    defaults = {} if (folder / "tokenizer.json").is_file() else QWEN2_DEFAULTS
    settings = defaults | _settings(folder)
    own = [k for k, v in settings.items() if k not in NAMED and k.endswith("_token") and isinstance(v, str | dict)]
    keys = [key for key in (*NAMED, *own) if settings.get(key) is not None]
    return {key: _content(folder, key, settings[key]) for key in keys}


def chat_template(folder: Path) -> str | None:
    """From chat_template.jinja, else from tokenizer_config.json. Raises `InputError`."""
    if (folder / "chat_template.jinja").is_file():
        return _text(folder / "chat_template.jinja")
    template = _object(folder / CONFIG).get("chat_template")
    if isinstance(template, list):
        try:
            template = {entry["name"]: entry["template"] for entry in template}["default"]
        except (KeyError, TypeError) as error:
            raise InputError(f'{folder / CONFIG}: chat_template: no "default" in the list') from error
    if template is not None and not isinstance(template, str):
        raise InputError(f"{folder / CONFIG}: chat_template: {short(template)} is no text")
    return template


def render_chat(template: str, messages: list[dict[str, str]], special_tokens: dict[str, str]) -> str:
    """The prompt for the assistant's next message. Raises `UsageError`, and `InputError` for a broken template."""
    import jinja2  # noqa: F401 (here, so that it is not imported for each text)

    if not messages:
        raise UsageError("a chat needs at least one message")
    try:
        # A template may count to infinity, or to a string of that length.
        return limited(TEMPLATE_SECONDS, TEMPLATE_BYTES, _render, template, messages, special_tokens)
    except LimitError as error:
        raise InputError(f"the chat template is broken: {error}") from error


def _render(template: str, messages: list[dict[str, str]], special_tokens: dict[str, str]) -> str:
    compiled = _compiled(template)
    try:
        return compiled.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **special_tokens
        )
    except MemoryError:
        raise
    except Exception as error:
        raise UsageError(f"the chat template does not take these messages: {_one_line(error)}") from error


# ---- tokenizer.json ----


def _from_tokenizer_json(file: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    content = _object(file)
    model, added = content.get("model"), _serialized_ids(content)
    if isinstance(model, dict) and isinstance(model.get("vocab"), dict):
        _check_ids(file, model["vocab"], added)
        if isinstance(model.get("merges"), list):
            prefix = model.get("continuing_subword_prefix")
            _pairs(file, model["merges"], model["vocab"], prefix if isinstance(prefix, str) else "")
    with _refusing(file):
        tokenizer = Tokenizer.from_file(str(file))
    for token, index in added.items():
        if tokenizer.token_to_id(token) != index:
            raise InputError(f"{file}: added token {short(token)}: id {index} is not the next one")
    # Files that were saved while training have these, and would cut every text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _serialized_ids(content: dict[str, Any]) -> dict[str, Any]:
    """Of the entries that are whole; `Tokenizer.from_file` refuses the others."""
    entries = content.get("added_tokens")
    whole = [e for e in entries if isinstance(e, dict) and "id" in e] if isinstance(entries, list) else []
    return {entry["content"]: entry["id"] for entry in whole if isinstance(entry.get("content"), str)}


# ---- vocab.json and merges.txt ----


def _from_vocabulary(folder: Path) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    for file in (vocab_file, merges_file):
        if not file.is_file():
            raise InputError(f"{file}: missing, and there is no tokenizer.json")
    settings, vocab = _settings(folder), _object(vocab_file)
    _check_ids(vocab_file, vocab, {})
    lines = _text(merges_file).split("\n")
    merges = _pairs(merges_file, lines if lines[-1] else lines[:-1], vocab, "")
    ids, tokens = _added_tokens(folder, settings, vocab)
    with _refusing(vocab_file):
        # With the added tokens in it: `add_tokens` alone would number them anew where an id was left out.
        model = models.BPE(vocab | ids, merges, continuing_subword_prefix="", end_of_word_suffix="")
        tokenizer = Tokenizer(model)
        tokenizer.add_tokens(tokens)
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    prefix_space = bool(settings.get("add_prefix_space"))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _added_tokens(
    folder: Path, settings: dict[str, Any], vocab: dict[str, int]
) -> tuple[dict[str, int], list[AddedToken]]:
    """Their ids, and the tokens with their flags."""
    from tokenizers import AddedToken

    if "added_tokens_decoder" in settings:
        file = folder / CONFIG
        ids, flags = _decoder_entries(file, settings["added_tokens_decoder"])
    else:
        file = folder / "added_tokens.json"
        ids = _object(file)
        flags = {token: {} for token in ids}
    _check_ids(file, vocab, ids)
    # As in transformers, a special token that has a name or is in the list keeps no flags of its own.
    special = [*special_tokens(folder).values(), *settings["extra_special_tokens"]]
    flags |= {token: {"special": True} for token in special if token}
    taken = vocab | ids
    unnumbered = [token for token in flags if token not in taken]
    ids |= {token: index for index, token in enumerate(unnumbered, start=max(taken.values(), default=-1) + 1)}
    with _refusing(file):
        return ids, [AddedToken(token, **own) for token, own in flags.items()]


def _decoder_entries(file: Path, entries: Any) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """Ids and flags by token, from `added_tokens_decoder`."""
    if not isinstance(entries, dict):
        raise InputError(f"{file}: added_tokens_decoder: {short(entries)} is no object")
    ids: dict[str, int] = {}
    flags: dict[str, dict[str, Any]] = {}
    for index, entry in entries.items():
        token = _content(file, f"added_tokens_decoder, {short(index)}", entry)
        if not index.isdecimal() or not token or token in ids:
            raise InputError(f"{file}: added_tokens_decoder: {short(index)}: {short(token)}: no id, or no new token")
        # Capped, because Python refuses to read numbers of thousands of digits.
        ids[token] = int(index[:20])
        flags[token] = {flag: entry[flag] for flag in FLAGS if flag in entry} if isinstance(entry, dict) else {}
    return ids, flags


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with special_tokens_map.json over it if it does not itself hold the added tokens."""
    settings = _object(folder / CONFIG)
    extra = _listed(folder, settings, "extra_special_tokens") or _listed(folder, settings, "additional_special_tokens")
    if "added_tokens_decoder" not in settings:
        mapped = _object(folder / "special_tokens_map.json")
        extra += _listed(folder, mapped, "extra_special_tokens")
        extra = extra or _listed(folder, mapped, "additional_special_tokens")
        settings |= mapped
    return settings | {"extra_special_tokens": extra}


def _listed(folder: Path, settings: dict[str, Any], key: str) -> list[str]:
    """Special tokens without a name of their own."""
    tokens = settings.get(key) or []
    if not isinstance(tokens, list | dict):
        raise InputError(f"{folder}: {key}: {short(tokens)} is no list of tokens")
    return [_content(folder, key, token) for token in (tokens.values() if isinstance(tokens, dict) else tokens)]


def _content(where: Path, key: str, token: Any) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise InputError(f"{where}: {key}: {short(token)} is no token")
    return content


# ---- What both have ----


def _check_ids(file: Path, vocab: dict[str, Any], added: dict[str, Any]) -> None:
    """Ids are numbers of which each token has one, and each one token. Raises `InputError`."""
    try:
        "".join((*vocab, *added)).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{file}: a token has {error.object[error.start]!r}, which is not valid Unicode") from error
    owners: dict[int, str] = {}
    for token, index in (*vocab.items(), *added.items()):
        if type(index) is not int or not 0 <= index < MAX_ID:
            raise InputError(f"{file}: token {short(token)}: {short(index)} is no id")
        if vocab.get(token, index) != index:
            raise InputError(f"{file}: added token {short(token)}: id {index}, the vocabulary says {vocab[token]}")
        if owners.setdefault(index, token) != token:
            raise InputError(f"{file}: tokens {short(owners[index])} and {short(token)} have the same id {index}")


def _pairs(file: Path, entries: list[Any], vocab: dict[str, int], prefix: str) -> list[tuple[str, str]]:
    """prefix: what the second of a pair loses in a merge. Raises `InputError`."""
    pairs, place = [], "line" if file.suffix == ".txt" else "merge"
    for number, entry in enumerate(entries, start=1):
        if isinstance(entry, str) and entry.startswith("#version"):
            continue
        pair = entry.split(" ") if isinstance(entry, str) else entry
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(token, str) and token for token in pair):
            raise InputError(f"{file}: {place} {number}: {short(entry)} is no pair of tokens")
        left, right = pair
        for token in (left, right, left + right[len(prefix) :]):
            if token not in vocab:
                raise InputError(f"{file}: {place} {number}: {short(entry)}: {short(token)} is not in the vocabulary")
        pairs.append((left, right))
    return pairs


# ---- What a vocabulary lacks ----


def _first_lost(tokenizer: Tokenizer, text: str, encoding: Encoding) -> str | None:
    """The first character of which BPE dropped something, or which became an unknown token."""
    from tokenizers import models

    unknown = getattr(tokenizer.model, "unk_token", None)
    if isinstance(tokenizer.model, models.BPE):
        plain = "".join(_normalized(tokenizer, part) for part in _outside_added_tokens(tokenizer, text, encoding))
        return next((c for c in dict.fromkeys(plain) if not _has_tokens(tokenizer, c, unknown)), None)
    pairs = zip(encoding.tokens, encoding.offsets, strict=True)
    parts = (text[begin:end] for token, (begin, end) in pairs if token == unknown)
    return next((part[:1] for part in parts if part != unknown), None)


def _outside_added_tokens(tokenizer: Tokenizer, text: str, encoding: Encoding) -> Iterator[str]:
    added, start = tokenizer.get_added_tokens_decoder(), 0
    for index, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
        if index in added:
            yield text[start:begin]
            start = end
    yield text[start:]


def _normalized(tokenizer: Tokenizer, text: str) -> str:
    return tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text


def _has_tokens(tokenizer: Tokenizer, character: str, unknown: str | None) -> bool:
    """Whether each symbol that BPE starts from, which are bytes in a byte-level tokenizer, is in the vocabulary."""
    before = tokenizer.pre_tokenizer
    symbols = "".join(part for part, _ in before.pre_tokenize_str(character)) if before else character
    found = ((symbol, tokenizer.model.tokenize(symbol)) for symbol in symbols)
    return all(tokens and (symbol == unknown or tokens[0].value != unknown) for symbol, tokens in found)


# ---- Chat templates ----


def _compiled(template: str) -> Template:
    """Raises `InputError`."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Some templates mark what the assistant wrote, for training: {% generation %} … {% endgeneration %}."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    try:
        return environment.from_string(template)
    except MemoryError:
        raise
    except Exception as error:  # also what Python says of the code that jinja2 makes
        raise InputError(f"the chat template is broken: {_one_line(error)}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own would escape for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


# ---- Files ----


def _object(file: Path) -> dict[str, Any]:
    """Empty if there is no such file. Raises `InputError`."""
    if not file.is_file():
        return {}
    text = _text(file)
    if text.count("[") + text.count("{") > MAX_NESTED:
        raise InputError(f"{file}: more than {MAX_NESTED} lists and objects: not a file of a tokenizer")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: not a JSON object")
    return content


def _text(file: Path) -> str:
    """Raises `InputError`."""
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise InputError(f"{file}: {size} bytes, more than {MAX_BYTES}: not a file of a tokenizer")
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8: {_one_line(error)}") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error


@contextmanager
def _refusing(file: Path) -> Iterator[None]:
    """Turns what the tokenizers library says into `InputError`."""
    try:
        with _no_panic():
            yield
    except Exception as error:
        raise InputError(f"{file}: not a tokenizer: {_one_line(error)}") from error


@contextmanager
def _no_panic() -> Iterator[None]:
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
            raise ValueError(_one_line(error)) from error
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _one_line(error: BaseException) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 200 else f"{line[:200]}…"
