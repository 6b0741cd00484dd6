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
    logits_MV = _without_mask(logits_MV, mask_id, everywhere=temperature > 0)
    if top_p is not None and top_p < 1:
        logits_MV = _nucleus(logits_MV, top_p)
    if top_k is not None and top_k < logits_MV.shape[-1]:
        logits_MV = _drop(logits_MV, logits_MV < logits_MV.topk(top_k).values[:, -1:])
    log_total_M1 = logits_MV.logsumexp(-1, keepdim=True)
    if temperature > 0:
        probs_MV = (logits_MV - log_total_M1).exp()
        tokens_M = torch.multinomial(probs_MV, 1, generator=generator)[:, 0]
    else:
        tokens_M = logits_MV.argmax(-1)
    if alg == "topk_margin":
        best_M2 = (logits_MV.topk(2).values - log_total_M1).exp()
        return tokens_M, best_M2[:, 0] - best_M2[:, 1]
    if alg == "entropy":
        # sum p log p = sum p * logit - log sum exp(logit): one exponential a logit and no logarithm.
        probs_MV = (logits_MV - log_total_M1).exp()
        return tokens_M, (probs_MV * logits_MV).sum(-1) - log_total_M1[:, 0]
    chosen_M1 = logits_MV.gather(-1, tokens_M[:, None])
    return tokens_M, (chosen_M1 - log_total_M1).exp()[:, 0]


def most_confident(confidence_M: Tensor, n: int, alg_temp: float | None, generator: torch.Generator | None) -> Tensor:
    """Indices [n] of the positions to write; with `alg_temp`, drawn with probability softmax(confidence / alg_temp)."""
    if alg_temp:
        # Gumbel's trick draws without replacement, and also where a probability is too small for a float.
        uniform_M = torch.rand(confidence_M.shape, generator=generator).clamp_min(torch.finfo(torch.float32).tiny)
        confidence_M = confidence_M / alg_temp - (-uniform_M.log()).log()
    return confidence_M.topk(n).indices


def _without_mask(logits_MV: Tensor, mask_id: int, everywhere: bool) -> Tensor:
    best_M, tokens_M = logits_MV.max(-1)
    if not best_M.isfinite().all():
        raise FloatingPointError("the network gave logits that are not finite")
    hit_M = torch.ones_like(tokens_M, dtype=torch.bool) if everywhere else tokens_M == mask_id
    if not hit_M.any():
        return logits_MV
    logits_MV = logits_MV.clone()
    logits_MV[hit_M, mask_id] = torch.finfo(logits_MV.dtype).min
    return logits_MV


def _nucleus(logits_MV: Tensor, top_p: float) -> Tensor:
    """Keeps the best tokens up to the one with which their probability passes `top_p`."""
    ordered_MV, order_MV = logits_MV.sort(descending=True)
    beyond_MV = ordered_MV.softmax(-1).cumsum(-1) > top_p
    beyond_MV = torch.cat([torch.zeros_like(beyond_MV[:, :1]), beyond_MV[:, :-1]], dim=-1)
    return _drop(logits_MV, torch.zeros_like(beyond_MV).scatter(-1, order_MV, beyond_MV))


def _drop(logits_MV: Tensor, dropped_MV: Tensor) -> Tensor:
    return logits_MV.masked_fill(dropped_MV, torch.finfo(logits_MV.dtype).min)
