"""Which masks of a step are written, where that follows from how sure the network is: rules, by their papers' names.

Each says of M masked positions whether they are, bool [M]; the surest is written in any case. Sources: Fast-dLLM, arXiv
2505.22618 (the threshold); Streaming-dLLM (the sliding one); LocalLeap, arXiv 2510.07081; EB sampler, arXiv 2505.24857;
KLASS; dParallel and d3LLM (the entropy's). What each costs and buys: docs/decoding.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

STEADY = 2  # steps running that a distribution has hardly changed for, in KLASS


def sliding(threshold: float, alpha: float, share_masked: float) -> float:
    """A threshold that is low at a block's end, where more is known: by alpha of it with the last mask."""
    return threshold * (1 - alpha * (1 - share_masked))


def near_anchors(columns_M: Tensor, p_M: Tensor, threshold: float, relaxed: float, radius: int) -> Tensor:
    """At least the threshold; or the relaxed one, up to `radius` positions from a mask that has the threshold."""
    is_anchor_M = p_M >= threshold
    if not is_anchor_M.any():
        return is_anchor_M
    is_near_M = (columns_M[:, None] - columns_M[is_anchor_M]).abs().amin(1) <= radius
    return is_anchor_M | (is_near_M & (p_M >= relaxed))


def within_entropy_bound(p_M: Tensor, entropy_M: Tensor, gamma: float) -> Tensor:
    """The surest, as long as their entropies but for the largest one add up to at most gamma nats."""
    order_M = p_M.sort(descending=True, stable=True).indices
    sorted_M = entropy_M[order_M]
    lost_M = sorted_M.cumsum(0) - sorted_M.cummax(0).values  # it never falls
    return torch.zeros_like(p_M, dtype=torch.bool).index_fill(0, order_M[lost_M <= gamma], True)


@dataclass
class Steadiness:
    """What the last step made of the masks of a row's block. probs_MV: all of it, kept until the next."""

    columns_M: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    probs_MV: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    steps_M: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def see(self, columns_M: Tensor, probs_MV: Tensor, kl_threshold: float) -> Tensor:
        """bool [M]: the KL from the step before was below it for `STEADY` steps running. columns_M: ascending."""
        steps_M = torch.zeros_like(columns_M)
        was_M, at_M = torch.isin(columns_M, self.columns_M), torch.searchsorted(self.columns_M, columns_M)
        for i in was_M.nonzero()[:, 0].tolist():
            before = int(at_M[i])
            kl = _kl(probs_MV[i], self.probs_MV[before])
            steps_M[i] = self.steps_M[before] + 1 if kl < kl_threshold else 0
        self.columns_M, self.probs_MV, self.steps_M = columns_M, probs_MV, steps_M
        return steps_M >= STEADY


def _kl(p_V: Tensor, q_V: Tensor) -> float:
    """In nats. What q leaves no room for counts as the least float does."""
    return float(torch.xlogy(p_V, p_V / q_V.clamp_min(torch.finfo(torch.float32).tiny)).sum())
