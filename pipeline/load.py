"""Stage 1: a checkpoint folder to a model whose weights are mappings of its files."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from model import CheckpointError, ConfigError, DreamEdge, DreamEdgeConfig, load_hf_model
from model import lora as lora_adapter
from model.checkpoint_files import INDEX, weight_files
from model.lora import adapter_files, is_d2f, merge, read_adapter
from runtime.artifact import sha256
from runtime.chat import end_tokens
from runtime.defaults import own_defaults
from runtime.errors import InputError, OutputError
from runtime.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


LORA = "lora/"  # that the digests of an adapter's files begin with


@dataclass(frozen=True)
class Loaded:
    """weights: bytes of the weight files. digests: sha256 by file name. tokenizer_files: those that are there.

    The model's config, which is `config`, has the end tokens of the tokenizer and its chat template too.
    """

    model: DreamEdge
    config: DreamEdgeConfig
    folder: Path
    weights: int
    digests: dict[str, str]
    tokenizer: Tokenizer | None
    tokenizer_files: tuple[Path, ...]
    is_d2f: bool = False  # an adapter made it block-causal


def load(folder: Path, lora: str | None = None, cache: Path | None = None) -> Loaded:
    """Weights keep the type they are stored in. lora: the folder of an adapter that is merged into them; what is merged
    is kept in `cache`. Files that have not changed since this process last loaded them are not read again.

    Raises `InputError`, and `OutputError` where there is no room for what is merged.
    """
    loaded = _load(folder, lora, cache, _stamps(folder), _stamps(Path(lora)) if lora is not None else ())
    parameters = {id(parameter): parameter for parameter in loaded.model.parameters()}
    return replace(loaded, model=copy.deepcopy(loaded.model, parameters))  # the same weights; a recipe unties its own


def _stamps(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, bytes and time of change of each file; nothing where there is no folder."""
    try:
        files = sorted(folder.iterdir())
        return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    except OSError:  # that loading then speaks of
        return ()


@lru_cache(maxsize=1)
def _load(
    folder: Path,
    lora: str | None,
    cache: Path | None,
    *stamps: tuple[tuple[str, int, int], ...],  # noqa: ARG001
) -> Loaded:
    try:
        model, _, config = load_hf_model(folder, dtype=None)
        files = weight_files(folder)
    except (CheckpointError, ConfigError, OSError) as error:
        raise InputError(str(error)) from error
    own_defaults(folder)  # wrong ones are found now, not by whoever writes with the artifact
    tokenizer = load_tokenizer(folder)
    largest = max(tokenizer.get_vocab().values(), default=0) if tokenizer is not None else 0
    if largest >= config.vocab_size:
        raise InputError(f"{folder}: its tokenizer has id {largest}, its network knows 0..{config.vocab_size - 1}")
    model.config = config = replace(config, eos_token_id=(*config.eos_ids, *end_tokens(folder, tokenizer)))
    hashed = [folder / "config.json", *files, *([folder / INDEX] if (folder / INDEX).is_file() else [])]
    digests = dict(zip([file.name for file in hashed], map(sha256, hashed), strict=True))
    if lora is not None:
        assert cache is not None
        digests |= _merged(model, Path(lora), digests, cache)
        if is_d2f(Path(lora)):
            log.warning("lora: %s is a D2F adapter by its name: its artifact writes with cache=d2f", lora)
    return Loaded(
        model=model,
        config=config,
        folder=folder,
        weights=sum(file.stat().st_size for file in files),
        digests=digests,
        tokenizer=tokenizer,
        is_d2f=lora is not None and is_d2f(Path(lora)),
        tokenizer_files=tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file()),
    )


def _merged(model: DreamEdge, adapter: Path, checkpoint: dict[str, str], cache: Path) -> dict[str, str]:
    """Merge it into the model. Returns the digests of its files."""
    try:
        digests = {f"{LORA}{file.name}": sha256(file) for file in adapter_files(adapter)}
        made_of = json.dumps([checkpoint, digests, sha256(Path(str(lora_adapter.__file__)))])
        merge(model, read_adapter(adapter, model), cache / f"lora-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}")
    except CheckpointError as error:
        raise InputError(f"lora: {error}") from error
    except OSError as error:
        raise OutputError(f"{cache}: the merged weights cannot be kept: {error.strerror or error}") from error
    return digests
