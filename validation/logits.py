"""Logits kept small: a row of a wide vocabulary is half a megabyte, and a reference holds a thousand rows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# Vocabularies up to this are kept whole. Wider ones as a sketch of as many numbers.
SKETCH = 1024
COLUMNS = 128  # the likeliest tokens of a row, whose logits are kept as they are


@dataclass(frozen=True)
class Summary:
    """What is kept of the logits of K rows.

    vector: float32 [K, min(V, SKETCH)], the logits or their count sketch: each logit goes, with a random sign, into
        one of SKETCH sums. So every logit counts, and sums of squares and products of two rows are those of their
        sketches but for 4% (sqrt(2 / SKETCH)), which is 0.2 dB. Charikar et al., "Finding frequent items in data
        streams", 2002.
    top1: int64 [K]. values: float32 [K, C], the logits of the asked columns. rest: float32 [K], the logarithm of the
        sum of the exponentials of all others.
    """

    vector: Tensor
    top1: Tensor
    values: Tensor
    rest: Tensor


def summarize(logits_KV: Tensor, columns_KC: Tensor | None = None) -> Summary:
    """columns: of `values`, all where the vocabulary is kept whole."""
    K, V = logits_KV.shape
    top1 = logits_KV.argmax(-1)
    if V <= SKETCH:
        whole = logits_KV.contiguous().clone()
        return Summary(whole, top1, whole, torch.full((K,), -torch.inf))
    bucket_V, sign_V = _buckets(V)
    signed = logits_KV.double() * sign_V
    sketch = torch.zeros(K, SKETCH, dtype=torch.float64).index_add_(1, bucket_V, signed).float()
    if columns_KC is None:
        columns_KC = torch.empty(K, 0, dtype=torch.int64)
    rest = logits_KV.scatter(1, columns_KC, -torch.inf).logsumexp(-1)
    return Summary(sketch, top1, logits_KV.gather(1, columns_KC), rest)


def top_columns(logits_KV: Tensor, targets_K: Tensor | None = None) -> Tensor:
    """Of the likeliest tokens, int64 [K, C]; none where the vocabulary is kept whole. A target is among them."""
    K, V = logits_KV.shape
    if V <= SKETCH:
        return torch.empty(K, 0, dtype=torch.int64)
    columns_KC = logits_KV.topk(COLUMNS, -1).indices
    if targets_K is not None:
        is_there_K = (columns_KC == targets_K[:, None]).any(1)
        columns_KC[~is_there_K, -1] = targets_K[~is_there_K]
    return columns_KC


def with_rest(summary: Summary) -> Tensor:
    """float64 [K, C + 1]: the logits of the columns, and all others as one more token's."""
    return torch.cat([summary.values, summary.rest[:, None]], dim=1).double()


def log_probability(summary: Summary, columns_KC: Tensor, targets_K: Tensor) -> Tensor:
    """float64 [K], of tokens that are among the columns; of all, where the vocabulary is kept whole."""
    is_whole = columns_KC.shape[1] == 0
    at_K = targets_K if is_whole else (columns_KC == targets_K[:, None]).int().argmax(1)
    every = with_rest(summary)
    return every.gather(1, at_K[:, None])[:, 0] - every.logsumexp(1)


def confidence(summary: Summary) -> Tensor:
    """float64 [K]: of the likeliest token of all; a target with a lower logit is no harm."""
    return summary.values.double().amax(1) - with_rest(summary).logsumexp(1)


def digest(logits_KV: Tensor) -> str:
    """sha256 of the bits of all logits."""
    return hashlib.sha256(logits_KV.contiguous().numpy().data).hexdigest()


@cache
def _buckets(V: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(V)
    bucket_V = torch.randint(SKETCH, (V,), generator=generator)
    return bucket_V, torch.randint(2, (V,), generator=generator).double() * 2 - 1
