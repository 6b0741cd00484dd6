"""What a recipe file may say. `conf/recipe/*.yaml` are checked against these types."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from recipes.bounds import Bounds


class Dtype(Enum):
    """Of the floats that stay floats: activations, norms, biases, the cache."""

    float32 = "float32"
    float16 = "float16"


class Backend(Enum):
    xnnpack = "xnnpack"
    portable = "portable"


class Attention(Enum):
    """How a layer attends to its cache.

    delegated: executorch's cache kernel, the rest inside XNNPACK's delegate. custom_sdpa: executorch's own cache
    and attention kernels. aten: plain operators, for any runtime.
    """

    delegated = "delegated"
    custom_sdpa = "custom_sdpa"
    aten = "aten"


class Fold(Enum):
    """Between what channels' factors are moved, exactly, before weights are rounded.

    norms: each norm and the matrices that read it. up_down: up_proj and down_proj. v_o: v_proj and o_proj.
    """

    norms = "norms"
    up_down = "up_down"
    v_o = "v_o"


class Rotate(Enum):
    """What is rotated, exactly, before weights are rounded, so that no channel stands out.

    r1: the residual stream; the weights of norms go into what reads them, and become 1. r2: the values of each head.
    """

    r1 = "r1"
    r2 = "r2"


class Rounding(Enum):
    """How the integers are chosen. nearest: each by itself. hqq: torchao's half-quadratic search, without any text.

    gptq: one input after another, on what calibration text makes of them (`recipes/gptq.py`).
    """

    nearest = "nearest"
    hqq = "hqq"
    gptq = "gptq"


class Scales(Enum):
    """absmax: with room for the largest weight. least_squares: with the least loss by rounding."""

    absmax = "absmax"
    least_squares = "least_squares"


@dataclass
class LinearQuant:
    """Of every linear layer. Activations become int8 for each token while the program runs.

    group_size: inputs that share a scale, None for one scale an output channel. XNNPACK has int4 in groups
    (multiples of 32) and per channel, int8 per channel. rules: other formats by the names of layers, where `*` stands
    for anything, as `lm_head: int8`; the first that matches counts. Formats: int8, int4 (groups of 32), int4_64,
    int4_128, …, int4_channel.
    """

    weight_bits: int = 4
    group_size: int | None = 32
    rounding: Rounding = Rounding.nearest
    scales: Scales = Scales.absmax
    rules: dict[str, str] = field(default_factory=dict)


@dataclass
class EmbeddingQuant:
    """Of the embedding table. group_size: entries of a row that share a scale, None for one scale a row."""

    weight_bits: int = 8
    group_size: int | None = None


@dataclass
class Recipe:
    """better: the recipe to try where this one loses too much. weight_types: the datatypes that the delegate's linear
    weights must have, as XNNPACK names them. fold, rotate: what the network is rewritten by before weights are rounded,
    so that it computes the same (`recipes/rescaling.py`).

    outside_ops: operators that may run outside the delegate; any other fails the run. Empty with
    `backend: portable`, where all of them do.
    """

    name: str = "???"
    description: str = "???"
    better: str | None = None
    backend: Backend = Backend.xnnpack
    attention: Attention = Attention.custom_sdpa
    dtype: Dtype = Dtype.float32
    fold: list[Fold] = field(default_factory=list)
    rotate: list[Rotate] = field(default_factory=list)
    linear: LinearQuant | None = None
    embedding: EmbeddingQuant | None = None
    weight_types: list[str] = field(default_factory=list)
    outside_ops: list[str] = field(default_factory=list)
    bounds: Bounds = field(default_factory=Bounds)
