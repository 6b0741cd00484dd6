"""The bounds that a recipe file may set: what validation demands of its programs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Bounds:
    """What validation demands. Decibels are signal-to-quantization-noise ratios of logits.

    Fidelity, the .pte against the same (quantized) model in eager:
        fidelity_db: every call. fidelity_exact_db: calls in which no activation sits on a rounding tie.
    Quality, the .pte against the float32 model:
        kl_slack: nats by which its divergence may be above 1.25 times that of the quantized model in eager.
        solved_drop: points (0..100) by which the share of solved tasks may fall below the float32 model's.
    planned_memory: how much the program may plan for, in multiples of its caches and of what lies between delegates.
    """

    fidelity_db: float = 0.0
    fidelity_exact_db: float = 0.0
    kl_slack: float = 0.0
    solved_drop: float = 0.0
    planned_memory: float = 0.0
