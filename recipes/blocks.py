"""What a recipe file may say. `conf/recipe/*.yaml` are checked against these types."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


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


@dataclass
class LinearQuant:
    """Of every linear layer. Activations become int8 for each token while the program runs.

    group_size: inputs that share a scale, None for one scale an output channel. XNNPACK has int4 in groups
    (multiples of 32) and per channel, int8 per channel.
    """

    weight_bits: int = 4
    group_size: int | None = 32


@dataclass
class EmbeddingQuant:
    """Of the embedding table. group_size: entries of a row that share a scale, None for one scale a row."""

    weight_bits: int = 8
    group_size: int | None = None


@dataclass
class Bounds:
    """What validation demands. Decibels are signal-to-quantization-noise ratios of logits.

    Fidelity, the .pte against the same (quantized) model in eager:
        fidelity_db: every call. fidelity_exact_db: calls in which no activation sits on a rounding tie.
    Quality, the .pte against the float32 model:
        top1_agreement, cosine: at least. kl_divergence (nats), max_abs_diff: at most. sqnr_db: at least.
        solved_drop: points (0..100) by which the share of solved tasks may fall below the float32 model's.
    planned_memory: how much the program may plan for, in multiples of the caches and one set of activations.
    """

    fidelity_db: float = 0.0
    fidelity_exact_db: float = 0.0
    top1_agreement: float = 0.0
    kl_divergence: float = 0.0
    sqnr_db: float = 0.0
    cosine: float = 0.0
    max_abs_diff: float = 0.0
    solved_drop: float = 0.0
    planned_memory: float = 0.0


@dataclass
class Recipe:
    """weight_types: the datatypes that the delegate's linear weights must have, as XNNPACK names them.

    outside_ops: operators that may run outside the delegate; any other fails the run. Empty with
    `backend: portable`, where all of them do.
    """

    name: str = "???"
    description: str = "???"
    backend: Backend = Backend.xnnpack
    attention: Attention = Attention.custom_sdpa
    dtype: Dtype = Dtype.float32
    linear: LinearQuant | None = None
    embedding: EmbeddingQuant | None = None
    weight_types: list[str] = field(default_factory=list)
    outside_ops: list[str] = field(default_factory=list)
    bounds: Bounds = field(default_factory=Bounds)
