"""How far quantized models are from float32, over the same calls: what float32 gives is worked out once."""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.stored import Weights
from validation.eager import run_by_layer
from validation.figures import kl_divergence
from validation.logits import Summary, summarize, top_columns
from validation.progress import Report, silent, within
from validation.reference import Sequence


class Divergence:
    """Of models in eager from a float32 one, over all rows of some sequences of one call each."""

    def __init__(self, float32: Weights, sequences: tuple[Sequence, ...], report: Report = silent) -> None:
        self.sequences = sequences
        self._exact: dict[int, tuple[Summary, Tensor]] = {}

        def keep(i: int, _: int, logits_KV: Tensor) -> None:
            columns_KC = top_columns(logits_KV)
            self._exact[i] = summarize(logits_KV, columns_KC), columns_KC

        run_by_layer(float32, sequences, keep, torch.float32, within("float32", report))

    def of(self, weights: Weights, report: Report = silent) -> float:
        """Nats, the mean over rows."""
        rows: dict[int, Tensor] = {}

        def keep(i: int, _: int, logits_KV: Tensor) -> None:
            exact, columns_KC = self._exact[i]
            rows[i] = kl_divergence(exact, summarize(logits_KV, columns_KC))

        run_by_layer(weights, self.sequences, keep, None, report)
        return torch.cat([rows[i] for i in range(len(self.sequences))]).mean().item()
