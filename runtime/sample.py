"""From the logits of masked positions to tokens, and to how sure the network is of each.

Of equally good tokens the one with the lowest id comes first, of equally sure positions the leftmost. Shapes: M masked
positions, V vocabulary. Source: `sample_tokens` of the public Dream reference, measured in `tests/golden/sampler`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

OWN = "own"  # the network's own probability of the token: what a threshold is held against
OWN_ENTROPY = "own_entropy"  # of the network's own distribution, negative


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

    alg: one of `ALGORITHMS`, by the probabilities that tokens are drawn with; or `OWN` or `OWN_ENTROPY`, before
    temperature and cuts.

    The mask itself is never chosen: where it is the best token (with a temperature: everywhere) the choice is
    among the others. Raises `FloatingPointError` for logits that are not numbers.
    """
    own_MV = logits_MV
    if temperature > 0:
        # What is banned stays a number: its part of an entropy is 0 times it.
        cooled_MV = (logits_MV / temperature).clamp_min(torch.finfo(logits_MV.dtype).min)
        logits_MV = _drop(cooled_MV, torch.arange(logits_MV.shape[-1]) == mask_id)
    best_M, tokens_M = _best_tokens(logits_MV)
    if not best_M.isfinite().all():
        raise FloatingPointError("the network gave logits that are not finite")
    if (tokens_M == mask_id).any():
        own_MV = logits_MV = _without_best(logits_MV, tokens_M, mask_id)
        best_M, tokens_M = _best_tokens(logits_MV)
    if top_p is not None and top_p < 1:
        logits_MV = _nucleus(logits_MV, top_p)
    if top_k is not None and top_k < logits_MV.shape[-1]:
        ordered_MN = logits_MV.topk(top_k + 1).values
        logits_MV = _best(logits_MV, ordered_MN, torch.full(logits_MV.shape[:1], top_k))
    probs_MV = logits_MV.softmax(-1)
    if temperature > 0:
        tokens_M = torch.multinomial(probs_MV, 1, generator=generator)[:, 0]
    if alg in (OWN, OWN_ENTROPY) and own_MV is not logits_MV:
        own_MV = _drop(own_MV, torch.arange(own_MV.shape[-1]) == mask_id) if temperature > 0 else own_MV
        probs_MV = own_MV.softmax(-1)
    if alg == OWN_ENTROPY:
        return tokens_M, -entropy(own_MV, probs_MV)
    if alg == "topk_margin":
        best_M2 = probs_MV.topk(2).values
        return tokens_M, best_M2[:, 0] - best_M2[:, 1]
    if alg == "entropy":
        return tokens_M, -entropy(logits_MV, probs_MV)
    return tokens_M, probs_MV.gather(-1, tokens_M[:, None])[:, 0]


def entropy(logits_MV: Tensor, probs_MV: Tensor) -> Tensor:
    """[M], in nats, of the distributions that these logits are of."""
    # log sum exp(logit) - sum p * logit, the first from the best one's: a tenth of the time of V logarithms.
    mean_M = torch.from_numpy(np.einsum("mv,mv->m", probs_MV.numpy(), logits_MV.detach().numpy()))
    return (logits_MV.amax(-1) - probs_MV.amax(-1).log()) - mean_M


def _best_tokens(logits_MV: Tensor) -> tuple[Tensor, Tensor]:
    """(values, ids): of equal ones the first, or the first that is no number. numpy is ten times as fast as torch."""
    tokens_M = torch.from_numpy(logits_MV.detach().numpy().argmax(-1))
    return logits_MV.gather(-1, tokens_M[:, None])[:, 0], tokens_M


def own_distributions(logits_MV: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """(logits, probabilities), float32 [M, V], with the mask only where another token is likelier."""
    _, tokens_M = _best_tokens(logits_MV)
    if (tokens_M == mask_id).any():
        logits_MV = _without_best(logits_MV, tokens_M, mask_id)
    return logits_MV, logits_MV.softmax(-1)


def _without_best(logits_MV: Tensor, tokens_M: Tensor, mask_id: int) -> Tensor:
    """The mask is dropped where it is the best token."""
    return _drop(logits_MV, (tokens_M == mask_id)[:, None] & (torch.arange(logits_MV.shape[-1]) == mask_id))


def most_confident(confidence_M: Tensor, n: int, alg_temp: float | None, generator: torch.Generator | None) -> Tensor:
    """Indices [n] of the positions to write, the surest first.

    With `alg_temp` they are drawn with probability softmax(confidence / alg_temp).
    """
    if alg_temp:
        # Gumbel's trick draws without replacement, and also where a probability is too small for a float.
        uniform_M = torch.rand(confidence_M.shape, generator=generator).clamp_min(torch.finfo(torch.float32).tiny)
        confidence_M = confidence_M / alg_temp - (-uniform_M.log()).log()
    return confidence_M.sort(descending=True, stable=True).indices[:n]  # topk takes equal ones in any order


def _nucleus(logits_MV: Tensor, top_p: float) -> Tensor:
    """Keeps the best tokens up to the one with which their probability passes `top_p`."""
    ordered_MV = logits_MV.sort(descending=True).values
    n_M = (ordered_MV.softmax(-1).cumsum(-1) <= top_p).sum(-1) + 1
    return _best(logits_MV, ordered_MV, n_M.clamp_max(logits_MV.shape[-1]))


def _best(logits_MV: Tensor, ordered_MN: Tensor, n_M: Tensor) -> Tensor:
    """Keeps the n best tokens of each row. ordered_MN: the best logits, one more than n if there is one."""
    last_M = ordered_MN.gather(-1, n_M[:, None] - 1)[:, 0]
    next_M = ordered_MN.gather(-1, n_M[:, None].clamp_max(ordered_MN.shape[-1] - 1))[:, 0]
    dropped_MV = logits_MV < last_M[:, None]
    for row in (last_M == next_M).nonzero()[:, 0].tolist():
        ties = (logits_MV[row] == last_M[row]).nonzero()[:, 0]
        n_better = int((ordered_MN[row] > last_M[row]).sum())
        dropped_MV[row, ties[n_M[row] - n_better :]] = True
    return _drop(logits_MV, dropped_MV)


def _drop(logits_MV: Tensor, dropped_MV: Tensor) -> Tensor:
    return logits_MV.masked_fill(dropped_MV, torch.finfo(logits_MV.dtype).min)
