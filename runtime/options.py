"""What may be asked of writing: the options, checked before the first call of the network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy")
CACHES = ("prefix", "dual", "d2f")

# Which positions a step writes, besides the plain threshold: whether the rule goes with one.
RULES = {"alpha": True, "relaxed_threshold": True, "kl_threshold": True, "gamma": False, "entropy_threshold": False}
IN_PLACE = {name for name, goes_with_one in RULES.items() if not goes_with_one}  # of a threshold


class OptionError(ValueError):
    """A prompt or an option that cannot be; the message says why."""


@dataclass(frozen=True)
class Options:
    alg: str
    temperature: float
    top_p: float | None
    top_k: int | None
    alg_temp: float | None
    eps: float
    block_length: int | None
    cache: str | None
    threshold: float | None
    stop_at_eos: bool
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

    @property
    def goes_by_certainty(self) -> bool:
        """How many tokens a step writes follows from how sure the network is, not from a schedule."""
        return any(getattr(self, name) is not None for name in ("threshold", *IN_PLACE))

    @property
    def writes_at_once(self) -> bool:
        """The call that opens a block writes by the rule, too; with the plain threshold, one token as in Fast-dLLM."""
        return any(getattr(self, name) is not None for name in RULES)

    def check(self) -> None:
        """Raises `OptionError`; written so that a NaN is refused."""
        check_whole(top_k=self.top_k, block_length=self.block_length)
        check_whole(radius=self.radius, suffix_window=self.suffix_window)
        check_whole(min_new_tokens=self.min_new_tokens, no_repeat_ngram_size=self.no_repeat_ngram_size)
        for name in ("temperature", "top_p", "alg_temp", "eps", "threshold", "eos_penalty", *RULES):
            value = getattr(self, name)
            is_needed = name in ("temperature", "eps", "eos_penalty")
            if (value is None and is_needed) or not isinstance(value, Real | None) or isinstance(value, bool):
                raise OptionError(f"{name} {value!r}: must be a number")
        if self.alg not in ALGORITHMS:
            raise OptionError(f"alg {self.alg!r}: there are {', '.join(ALGORITHMS)}")
        if self.cache not in (None, *CACHES):
            raise OptionError(f"cache {self.cache!r}: there are {', '.join(CACHES)}, and None")
        if not 0 <= self.temperature < math.inf:
            raise OptionError(f"temperature {self.temperature}: must be 0 (the best token) or above")
        if 0 < self.temperature < 1e-6:
            raise OptionError(f"temperature {self.temperature}: below 1e-6 it is 0 but for rounding: give 0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise OptionError(f"top_p {self.top_p}: must be above 0, where no token is left, and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise OptionError(f"top_k {self.top_k}: must leave at least 1 token")
        if not 0 < self.eps < 1:
            raise OptionError(f"eps {self.eps}: must be between 0 and 1")
        if self.block_length is not None and self.block_length < 1:
            raise OptionError(f"block_length {self.block_length}: must be at least 1")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise OptionError(f"threshold {self.threshold}: is a probability, 0 to 1")
        if self.alg_temp is not None and not 0 <= self.alg_temp < math.inf:
            raise OptionError(f"alg_temp {self.alg_temp}: must be 0 (the most confident) or above")
        if not 0 <= self.eos_penalty < math.inf:
            raise OptionError(f"eos_penalty {self.eos_penalty}: must be 0 (none) or above")
        if self.min_new_tokens < 0:
            raise OptionError(f"min_new_tokens {self.min_new_tokens}: must be at least 0")
        if self.no_repeat_ngram_size is not None and self.no_repeat_ngram_size < 2:
            raise OptionError(f"no_repeat_ngram_size {self.no_repeat_ngram_size}: must be at least 2 tokens")
        self._check_rules()

    def _check_rules(self) -> None:
        given = [name for name in RULES if getattr(self, name) is not None]
        if len(given) > 1:
            raise OptionError(f"{' and '.join(given)} both say which positions are written: give one of them")
        for name in given:
            if RULES[name] and self.threshold is None:
                raise OptionError(f"{name} goes with a threshold: give threshold=0.9 or another")
            if not RULES[name] and self.threshold is not None:
                raise OptionError(f"threshold and {name} both say which positions are written: give one of them")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise OptionError(f"alpha {self.alpha}: is the share that a threshold falls by, 0 to 1")
        if self.relaxed_threshold is not None and not 0 <= self.relaxed_threshold <= (self.threshold or 0):
            raise OptionError(f"relaxed_threshold {self.relaxed_threshold}: must be 0 to the threshold")
        for name in ("kl_threshold", "gamma", "entropy_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise OptionError(f"{name} {value}: are nats, at least 0")
        if self.radius < 1:
            raise OptionError(f"radius {self.radius}: must be at least 1")
        if self.suffix_window is not None and self.block_length is None:
            raise OptionError("suffix_window: what lies behind a block, so there must be blocks: give block_length")
        if self.suffix_window is not None and self.suffix_window < 0:
            raise OptionError(f"suffix_window {self.suffix_window}: must be at least 0")
        by = next((name for name in ("threshold", *given) if getattr(self, name) is not None), None)
        if self.alg == "origin" and (by or self.alg_temp):
            raise OptionError(
                f"alg 'origin' picks positions at random: it has no confidence for {by or 'threshold'} or alg_temp"
            )
        if by and self.alg_temp:
            raise OptionError(f"{by} and alg_temp both say which positions are written: give one of them")


def check_whole(**values: int | None) -> None:
    for name, value in values.items():
        if not isinstance(value, Integral | None) or isinstance(value, bool) or not -(2**63) <= (value or 0) < 2**63:
            raise OptionError(f"{name} {value!r}: must be a whole number")
