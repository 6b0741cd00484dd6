"""From the logits of masked positions to tokens, and to how sure the network is of each.

Shapes: M masked positions, V vocabulary. Source: `sample_tokens` of the public Dream reference, measured in
`tests/golden/sampler`.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy")


def sample(
    logits_MV: Tensor,
    mask_id: int,
    alg: str,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """A token for each position, int64 [M], and its confidence, float32 [M]: the higher, the surer.

    The mask itself is never chosen: where it is the best token (with a temperature: everywhere) the choice is
    among the others. Raises `FloatingPointError` for logits that are not numbers.
    """
    if temperature > 0:
        logits_MV = logits_MV / temperature
        logits_MV = _drop(logits_MV, torch.arange(logits_MV.shape[-1]) == mask_id)
    best_M, tokens_M = logits_MV.max(-1)
    if not best_M.isfinite().all():
        raise FloatingPointError("the network gave logits that are not finite")
    if (tokens_M == mask_id).any():
        is_guessed_M1 = (tokens_M == mask_id)[:, None]
        logits_MV = _drop(logits_MV, is_guessed_M1 & (torch.arange(logits_MV.shape[-1]) == mask_id))
        best_M, tokens_M = logits_MV.max(-1)
    if top_p is not None and top_p < 1:
        logits_MV = _nucleus(logits_MV, top_p)
    if top_k is not None and top_k < logits_MV.shape[-1]:
        logits_MV = _drop(logits_MV, logits_MV < logits_MV.topk(top_k).values[:, -1:])
    probs_MV = logits_MV.softmax(-1)
    best_prob_M = probs_MV.gather(-1, tokens_M[:, None])[:, 0]
    if temperature > 0:
        tokens_M = torch.multinomial(probs_MV, 1, generator=generator)[:, 0]
    if alg == "topk_margin":
        best_M2 = probs_MV.topk(2).values
        return tokens_M, best_M2[:, 0] - best_M2[:, 1]
    if alg == "entropy":
        # sum p log p = sum p * logit - log sum exp(logit): a third of the time of V logarithms.
        return tokens_M, torch.linalg.vecdot(probs_MV, logits_MV) - (best_M - best_prob_M.log())
    return tokens_M, probs_MV.gather(-1, tokens_M[:, None])[:, 0]


def most_confident(confidence_M: Tensor, n: int, alg_temp: float | None, generator: torch.Generator | None) -> Tensor:
    """Indices [n] of the positions to write; with `alg_temp`, drawn with probability softmax(confidence / alg_temp)."""
    if alg_temp:
        # Gumbel's trick draws without replacement, and also where a probability is too small for a float.
        uniform_M = torch.rand(confidence_M.shape, generator=generator).clamp_min(torch.finfo(torch.float32).tiny)
        confidence_M = confidence_M / alg_temp - (-uniform_M.log()).log()
    return confidence_M.topk(n).indices


def _nucleus(logits_MV: Tensor, top_p: float) -> Tensor:
    """Keeps the best tokens up to the one with which their probability passes `top_p`."""
    ordered_MV, order_MV = logits_MV.sort(descending=True)
    beyond_MV = ordered_MV.softmax(-1).cumsum(-1) > top_p
    beyond_MV = torch.cat([torch.zeros_like(beyond_MV[:, :1]), beyond_MV[:, :-1]], dim=-1)
    return _drop(logits_MV, torch.zeros_like(beyond_MV).scatter(-1, order_MV, beyond_MV))


def _drop(logits_MV: Tensor, dropped_MV: Tensor) -> Tensor:
    return logits_MV.masked_fill(dropped_MV, torch.finfo(logits_MV.dtype).min)
