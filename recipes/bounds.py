"""The bounds that a recipe file may set: what validation demands of its programs."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass
class Bounds:
    """What validation demands. Decibels are signal-to-quantization-noise ratios of logits.

    Fidelity, the .pte against the same (quantized) model in eager:
        fidelity_db: every call. fidelity_exact_db: calls in which no activation sits on a rounding tie.
        native_float16_db: both, where a processor adds the products of float16 in float16; None: as elsewhere.
    Quality, the .pte against the float32 model:
        kl_slack: nats by which its divergence may be above 1.25 times that of the quantized model in eager.
        solved_drop: points (0..100) by which the share of solved tasks may fall below the float32 model's.
    planned_memory: how much the program may plan for, in multiples of its caches and of what lies between delegates.
    """

    fidelity_db: float = 0.0
    fidelity_exact_db: float = 0.0
    native_float16_db: float | None = None
    kl_slack: float = 0.0
    solved_drop: float = 0.0
    planned_memory: float = 0.0

    def on(self, native_float16: bool) -> Bounds:
        """As the program is judged on a processor, which need not be the one that it was made on."""
        if not native_float16 or self.native_float16_db is None:
            return self
        least = self.native_float16_db
        lower = min(self.fidelity_db, least), min(self.fidelity_exact_db, least)
        return replace(self, fidelity_db=lower[0], fidelity_exact_db=lower[1])
