"""One figure of validation, for whoever shows or judges it: it takes no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Above this, in steps of an activation's int8 grid, no rounding went the other way in any measured call: eager
# and XNNPACK differ there by float32 rounding alone. See docs/validation.md.
TIE_MARGIN = 1e-4
IDENTICAL_DB = 200.0  # stands for "no difference at all"


@dataclass(frozen=True)
class Figure:
    """One measured value and its bound, None if it is reported and not judged. where: the case that gave the value."""

    group: str
    name: str
    value: float
    bound: float | None
    at_least: bool
    where: str = ""

    @property
    def ok(self) -> bool:
        if self.bound is None:
            return not math.isnan(self.value)
        return self.value >= self.bound if self.at_least else self.value <= self.bound  # NaN is never ok

    def __str__(self) -> str:
        where = f" ({self.where})" if self.where else ""
        if self.bound is None:
            return f"{self.group}: {self.name} is {self.value:.6g}{where}"
        relation = "at least" if self.at_least else "at most"
        return f"{self.group}: {self.name} is {self.value:.6g}, must be {relation} {self.bound:.6g}{where}"
