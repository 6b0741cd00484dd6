"""How masks are filled in, as configuration: `conf/decoding.yaml`, which all commands share that write."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from typing import Any


class Algorithm(Enum):
    origin = "origin"
    maskgit_plus = "maskgit_plus"
    topk_margin = "topk_margin"
    entropy = "entropy"


class Cache(Enum):
    none = "none"
    prefix = "prefix"
    dual = "dual"
    d2f = "d2f"


@dataclass
class DecodingConfig:
    """The options of `runtime.generate`, by their names there. None: as `runtime.defaults` says."""

    max_new_tokens: int | None = None
    steps: int | None = None
    alg: Algorithm | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    alg_temp: float | None = None
    eps: float | None = None
    block_length: int | None = None
    threshold: float | None = None
    seed: int | None = None
    stop_at_eos: bool = True
    alpha: float | None = None
    relaxed_threshold: float | None = None
    radius: int = 4
    kl_threshold: float | None = None
    gamma: float | None = None
    entropy_threshold: float | None = None
    suffix_window: int | None = None
    eos_penalty: float = 0.0
    min_new_tokens: int = 0
    no_repeat_ngram_size: int | None = None


def decoding_options(config: DecodingConfig, cache: Cache | None) -> dict[str, Any]:
    """For `runtime.defaults.with_defaults`, without `max_new_tokens`; None where nobody said."""
    options = {f.name: getattr(config, f.name) for f in fields(DecodingConfig) if f.name != "max_new_tokens"}
    alg = None if config.alg is None else config.alg.value
    return options | {"alg": alg, "cache": None if cache is None else cache.value}
