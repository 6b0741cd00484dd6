"""How near a quantized activation comes to a rounding tie: where eager and a device may both be right, and differ."""

from __future__ import annotations

from itertools import accumulate
from threading import Lock

import torch
from torch import Tensor

from validation.reference import Sequence
from validation.stream import places


class TieMargins:
    """How near any dynamically quantized activation of a token comes to a rounding tie.

    In steps of the int8 grid, 0 (a tie) to 0.5; infinite where no activation is quantized. An activation nearer to a
    tie than float32 rounding can move it may become another integer on the device than in eager; both are right.
    torchao's grid: int8 for each token, from min(x, 0) to max(x, 0).
    """

    def __init__(self, n_tokens: int) -> None:
        self.margin_N = torch.full((n_tokens,), torch.inf, dtype=torch.float64)
        self._noting = Lock()  # threads may note the same token: several calls ask for one row

    def note(self, x_ND: Tensor, tokens_N: Tensor) -> None:
        x = x_ND.double()
        low = x.amin(-1, keepdim=True).clamp_max(0)
        high = x.amax(-1, keepdim=True).clamp_min(0)
        scale = ((high - low) / 255).clamp_min(torch.finfo(torch.float32).eps)
        for steps in (x / scale, low / scale):
            margin_N = (steps - steps.floor() - 0.5).abs_().amin(-1)
            with self._noting:
                self.margin_N.index_reduce_(0, tokens_N, margin_N, "amin")

    def by_call(self, sequences: tuple[Sequence, ...]) -> list[list[float]]:
        """Over the sequence so far: what a call leaves in the cache is as uncertain as the call."""
        margins = []
        for in_stream in places(sequences):
            nearest = [self.margin_N[tokens].min().item() for tokens in in_stream]
            margins.append(list(accumulate(nearest, min)))
        return margins
