"""The shape of a Dream network, as its HF `config.json` gives it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from reprlib import repr as short
from typing import Any

from model.family import other_model


class ConfigError(ValueError):
    """A config that is not Dream's, or asks for something that is not supported."""


@dataclass(frozen=True)
class DreamEdgeConfig:
    """Names and meaning as in Dream's `config.json`; the defaults are Dream-7B's.

    eos_token_id: each token that ends a text, one or several; `eos_ids` has them as a tuple.
    """

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    max_position_embeddings: int = 131072
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    mask_token_id: int = 151666
    pad_token_id: int = 151643
    bos_token_id: int = 151643
    eos_token_id: int | tuple[int, ...] = 151643

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def max_seq_len(self) -> int:
        """Positions of a static cache, and of an exported program, unless told otherwise."""
        return min(2048, self.max_position_embeddings)

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if not _is_int(value) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")
            if value > _LARGEST_SIZE:
                raise ConfigError(f"{name} must be at most {_LARGEST_SIZE}, got {_shown(value)}")
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
                raise ConfigError(f"{name} must be a finite number above 0, got {value!r}")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ConfigError(f"tie_word_embeddings must be true or false, got {self.tie_word_embeddings!r}")
        for name in ("mask_token_id", "pad_token_id", "bos_token_id"):
            _check_tokens(name, [getattr(self, name)], self.vocab_size)
        ends = _listed(self.eos_token_id)
        _check_tokens("eos_token_id", ends, self.vocab_size)
        ends = list(dict.fromkeys(ends))
        object.__setattr__(self, "eos_token_id", tuple(ends) if len(ends) > 1 else ends[0])
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; RoPE rotates pairs")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> DreamEdgeConfig:
        """From the content of `config.json`, and of `generation_config.json`, whose end tokens count too.

        Raises `ConfigError` that names the field.
        """
        model_type = config.get("model_type")
        if model_type != "Dream":
            found = f"model_type {model_type!r}" if model_type else "no model_type"
            architectures = config.get("architectures")
            if architectures:
                found += f", architectures {architectures!r}"
            other = other_model(model_type) if isinstance(model_type, str) else None
            why = f": that is {other.name}, {other.why}" if other else ""
            raise ConfigError(f"not a Dream checkpoint: expected model_type 'Dream', found {found}{why}")
        for name, is_supported in _SUPPORTED.items():
            if name in config and not is_supported(config):
                raise ConfigError(f"unsupported: {name} = {config[name]!r} in the config")
        values = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        # transformers 4 and 5 keep these in different places, and read different ones where there are two.
        _one_value("dtype", {name: config.get(name) for name in ("torch_dtype", "dtype")}, _plain_dtype)
        ropes = {name: config.get(name) or {} for name in ("rope_scaling", "rope_parameters")}
        thetas = {f"{name}.rope_theta": rope.get("rope_theta") for name, rope in ropes.items()}
        values |= _one_value("rope_theta", {"rope_theta": config.get("rope_theta")} | thetas)
        own, more = config.get("eos_token_id"), (generation or {}).get("eos_token_id")
        if more is not None and _is_int(config.get("vocab_size")):
            _check_tokens("eos_token_id of generation_config.json", _listed(more), config["vocab_size"])
            values["eos_token_id"] = _listed(more) if own is None else [*(_listed(own) or [own]), *_listed(more)]
        # A default of Dream-7B must never stand in for a shape that the file forgot.
        needed = [f.name for f in fields(cls) if f.name not in _OPTIONAL]
        missing = [name for name in needed if name not in values or (name in _NULLABLE and values[name] is None)]
        if missing:
            raise ConfigError(f"the config lacks {', '.join(missing)}")
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json` that `from_hf` reads back to the same config."""
        return {
            "architectures": ["DreamModel"],
            "model_type": "Dream",
            "hidden_act": "silu",
            **{f.name: getattr(self, f.name) for f in fields(self)},
        }


def _listed(ids: Any) -> list[Any]:
    """`eos_token_id` may be one id or a list of them, or null."""
    return list(ids) if isinstance(ids, list | tuple) else [] if ids is None else [ids]


def _check_tokens(name: str, ids: list[Any], vocab_size: int) -> None:
    wrong = [i for i in ids if not _is_int(i) or not 0 <= i < vocab_size]
    if wrong or not ids:
        found = short(wrong[0] if wrong else ids)
        raise ConfigError(f"{name} must be a token of the vocabulary (0..{vocab_size - 1}), got {found}")


def _one_value(
    name: str, found: Mapping[str, Any], plain: Callable[[Any], Any] = lambda value: value
) -> dict[str, Any]:
    """{name: its value}, from whichever of the places have one. Raises `ConfigError` if they have different ones."""
    given = {place: value for place, value in found.items() if value is not None}
    (first, value), *others = given.items() or [(name, None)]
    for place, other in others:
        if plain(other) != plain(value):
            raise ConfigError(
                f"{first} {short(value)} and {place} {short(other)} differ, and readers take one or the other: "
                "remove the wrong one"
            )
    return {name: value}


def _plain_dtype(value: Any) -> Any:
    return value.removeprefix("torch.") if isinstance(value, str) else value


def _shown(value: int) -> str:
    return str(value) if value < 10**30 else "a number of more than 30 digits"


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_OPTIONAL = {"tie_word_embeddings"}  # configs leave it out where it is false
_NULLABLE = {"rope_theta", "eos_token_id"}  # that may stand elsewhere, with null in the usual place
_LARGEST = sys.float_info.max
_LARGEST_SIZE = 2**30  # the bytes of a matrix of two such sizes are still a number that torch can hold


def _plain_rope(rope: Any) -> bool:
    return rope is None or (
        isinstance(rope, Mapping)
        and all(rope.get(key) in (None, "default") for key in ("rope_type", "type"))
        and rope.get("partial_rotary_factor") in (None, 1, 1.0)
        and set(rope) <= {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    )


def _plain_layers(types: Any) -> bool:
    return types is None or (isinstance(types, list) and all(kind == "full_attention" for kind in types))


def _is_plain_head_dim(config: Mapping[str, Any]) -> bool:
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    return _is_int(hidden) and _is_int(heads) and config["head_dim"] * heads == hidden


# Fields that change what the network computes, and when they ask for nothing but plain Dream.
_SUPPORTED: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "hidden_act": lambda c: c["hidden_act"] == "silu",
    "use_sliding_window": lambda c: not c["use_sliding_window"],
    # Qwen2 configs carry a window size that `use_sliding_window: false` switches off.
    "sliding_window": lambda c: c["sliding_window"] is None or c.get("use_sliding_window") is False,
    "layer_types": lambda c: _plain_layers(c["layer_types"]),
    "rope_scaling": lambda c: _plain_rope(c["rope_scaling"]),
    "rope_parameters": lambda c: _plain_rope(c["rope_parameters"]),
    "partial_rotary_factor": lambda c: c["partial_rotary_factor"] in (None, 1, 1.0),
    "use_mrope": lambda c: not c["use_mrope"],
    # A class's default says false, whatever the file holds: the tensors decide.
    "attention_bias": lambda c: c["attention_bias"] in (None, True, False),
    "mlp_bias": lambda c: not c["mlp_bias"],
    "head_dim": lambda c: c["head_dim"] is None or _is_plain_head_dim(c),
    "quantization_config": lambda c: not c["quantization_config"],
    "num_experts": lambda c: not c["num_experts"],
    "logit_scale": lambda c: c["logit_scale"] in (None, 1, 1.0),
}
