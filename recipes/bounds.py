"""The bounds that a recipe file may set: what validation demands of its programs."""

from __future__ import annotations

from dataclasses import dataclass


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
