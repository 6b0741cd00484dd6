"""The tokenizer of a checkpoint folder, as transformers' Qwen2 tokenizer reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from runtime.errors import InputError, UsageError
from runtime.tokenizer_files import (
    CONFIG,
    in_one_line,
    no_panic,
    read_object,
    read_text,
    refusing,
    token_text,
    tokenizer_settings,
)

if TYPE_CHECKING:
    from tokenizers import AddedToken, Encoding, Tokenizer

TOKENIZER_FILE = "tokenizer.json"
# `Tokenizer.save` walks through all ids up to the largest, used or not.
MAX_ID = 2**24
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
        with no_panic():
            encoding = tokenizer.encode(text, add_special_tokens=False)
            lost = _first_lost(tokenizer, text, encoding)
    except UnicodeEncodeError as error:
        raise UsageError(f"character {error.start} of the text, {text[error.start]!r}, is not valid Unicode") from error
    except Exception as error:
        raise UsageError(f"the tokenizer cannot encode the text: {in_one_line(error)}") from error
    if lost is not None:
        raise UsageError(f"the tokenizer's vocabulary has no token for {lost!r} (U+{ord(lost):04X})")
    return encoding.ids


def decode(tokenizer: Tokenizer, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
    """Raises `InputError` for a tokenizer that cannot."""
    try:
        with no_panic():
            return tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
    except Exception as error:
        raise InputError(f"the tokenizer cannot decode its own tokens: {in_one_line(error)}") from error


def special_tokens(folder: Path) -> dict[str, str]:
    """bos_token, eos_token, …, the variables of a chat template. Raises `InputError`."""
    defaults = {} if (folder / "tokenizer.json").is_file() else QWEN2_DEFAULTS
    settings = defaults | tokenizer_settings(folder)
    own = [k for k, v in settings.items() if k not in NAMED and k.endswith("_token") and isinstance(v, str | dict)]
    keys = [key for key in (*NAMED, *own) if settings.get(key) is not None]
    return {key: token_text(folder, key, settings[key]) for key in keys}


# ---- tokenizer.json ----


def _from_tokenizer_json(file: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    content = read_object(file)
    model, added = content.get("model"), _serialized_ids(content)
    if isinstance(model, dict) and isinstance(model.get("vocab"), dict):
        _check_ids(file, model["vocab"], added)
        if isinstance(model.get("merges"), list):
            prefix = model.get("continuing_subword_prefix")
            _pairs(file, model["merges"], model["vocab"], prefix if isinstance(prefix, str) else "")
    with refusing(file):
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
    settings, vocab = tokenizer_settings(folder), read_object(vocab_file)
    _check_ids(vocab_file, vocab, {})
    lines = read_text(merges_file).split("\n")
    merges = _pairs(merges_file, lines if lines[-1] else lines[:-1], vocab, "")
    ids, tokens = _added_tokens(folder, settings, vocab)
    with refusing(vocab_file):
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
        ids = read_object(file)
        flags = {token: {} for token in ids}
    _check_ids(file, vocab, ids)
    # As in transformers, a special token that has a name or is in the list keeps no flags of its own.
    special = [*special_tokens(folder).values(), *settings["extra_special_tokens"]]
    flags |= {token: {"special": True} for token in special if token}
    taken = vocab | ids
    unnumbered = [token for token in flags if token not in taken]
    ids |= {token: index for index, token in enumerate(unnumbered, start=max(taken.values(), default=-1) + 1)}
    with refusing(file):
        return ids, [AddedToken(token, **own) for token, own in flags.items()]


def _decoder_entries(file: Path, entries: Any) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """Ids and flags by token, from `added_tokens_decoder`."""
    if not isinstance(entries, dict):
        raise InputError(f"{file}: added_tokens_decoder: {short(entries)} is no object")
    ids: dict[str, int] = {}
    flags: dict[str, dict[str, Any]] = {}
    for index, entry in entries.items():
        token = token_text(file, f"added_tokens_decoder, {short(index)}", entry)
        if not index.isdecimal() or not token or token in ids:
            raise InputError(f"{file}: added_tokens_decoder: {short(index)}: {short(token)}: no id, or no new token")
        # Capped, because Python refuses to read numbers of thousands of digits.
        ids[token] = int(index[:20])
        flags[token] = {flag: entry[flag] for flag in FLAGS if flag in entry} if isinstance(entry, dict) else {}
    return ids, flags


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
