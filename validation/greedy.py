"""Short answers without chance, by the same few steps for the float32 model and for a program: are they the same?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from runtime.sample import most_confident
from validation.reference import Call

PROMPT, NEW, STEPS = 32, 16, 4

# Calls, each whole and of its own cache, to logits float32 [K, V] of each.
Run = Callable[[list[Call]], list[Tensor]]


def write_greedily(run: Run, prompts: tuple[Tensor, ...], n_new: int, mask_id: int) -> Tensor:
    """int64 [N, n_new]: in each of `STEPS` steps the likeliest token at the surest of the masks that are left."""
    tokens = [torch.cat([prompt, torch.full((n_new,), mask_id)]) for prompt in prompts]
    for step in range(min(STEPS, n_new)):
        masked = [(t == mask_id).nonzero()[:, 0] for t in tokens]
        masked = [where[where >= len(prompt)] for where, prompt in zip(masked, prompts, strict=True)]
        calls = [Call(t, 0, len(t), where - 1) for t, where in zip(tokens, masked, strict=True)]
        for t, where, logits_KV in zip(tokens, masked, run(calls), strict=True):
            probability_KV = logits_KV.index_fill(-1, torch.tensor([mask_id]), -torch.inf).softmax(-1)
            sure_K, likeliest_K = probability_KV.max(-1)
            first = most_confident(sure_K, -(-len(where) // (min(STEPS, n_new) - step)), None, None)
            t[where[first]] = likeliest_K[first]
    return torch.stack([t[-n_new:] for t in tokens])
